"""What is run and what is left alone, interrupts, failures, devices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from mocapsnet.train.errors import Interrupted
from mocapsnet.train.experiments import record, schedule, states
from mocapsnet.train.experiments.configuration import Configuration
from mocapsnet.train.metrics import read_rows
from mocapsnet.train.run_folder import still_held, write_holder

from ..helpers import assert_same_run
from .helpers import GRID, NAME, OWN, Command, Train, interrupt_when, outputs, own, runs_of


@pytest.mark.slow
def test_an_experiment_that_is_interrupted_goes_on(command: Command, train: Train) -> None:
    """One run is finished and skipped; the other is stopped in its first epochs and resumed."""
    own(OWN | {"cases": [], "grid": GRID | {"seed": [0, 1]}})
    words = ["experiment", "own.json", "--epochs", "12", "--device", "cpu"]
    second, first = (Path("runs/own", f"{NAME}{seed}") for seed in (1, 0))
    train(str(second), "--limit", "16", "--epochs", "12", "--seed", "1")
    before = (second / "config.json").read_bytes()

    run = first.absolute()
    watch = threading.Thread(target=interrupt_when, args=[lambda: len(read_rows(run).rows) >= 2])
    watch.start()
    code, output, errors = command(*words)
    watch.join()
    assert code == 130, errors
    assert f"stopped in {first.name}; what was done is kept" in errors
    done = len(read_rows(first).rows)
    assert 2 <= done < 12
    assert (
        f"* {first.name}: interrupted after {done} of 12" in Path("runs/own/table.md").read_text()
    )

    code, output, errors = command(*words)
    assert code == 0, errors
    assert "2 runs: 1 finished, 1 interrupted; 1 at a time on CPU" in output
    assert f"{first.name}: continued after epoch {done}" in output
    assert (second / "config.json").read_bytes() == before and not (second / "train.log").exists()
    log = (first / "train.log").read_text()
    assert log.count("$ mocapsnet train") == 2 and f"train --resume {first}" in log
    whole = train("whole", "--limit", "16", "--epochs", "12", "--seed", "0")
    assert_same_run(whole, first)
    both = [100 * read_rows(run).rows[-1]["test_accuracy"] for run in (first, second)]
    mean, deviation = statistics.fmean(both), statistics.stdev(both)
    page = Path("runs/own/table.md").read_text()
    assert page in output and f"| 1 | {mean:.2f} ± {deviation:.2f} (n = 2) |" in page
    code, output, _ = command(*words, "--dry-run")
    assert code == 0 and output.splitlines()[-1].startswith("2 runs: 2 finished; about 0:00:00")


def test_trainings_end_with_an_experiment_that_is_killed() -> None:
    parent = os.fork()
    if parent == 0:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(sleep, preexec_fn=schedule.end_with_parent)
        Path("child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(Path("child").read_text()))
        deadline = time.monotonic() + 30
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_runs_fail_alone_are_tried_again_and_share_the_threads(
    fake: Configuration, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    words = ["experiment", "own.json", "--jobs", "3", "--seeds", "0", "1", "2", "4"]
    code, output, errors = command(*words)
    assert code == 1 and "2 of 4 runs failed" in errors
    reasons = json.loads(Path("runs/own/failures.json").read_text())
    assert sorted(reasons.items()) == [
        (f"{NAME}1", "not enough memory: nothing is left. Fewer images need less"),
        (f"{NAME}2", "killed by SIGKILL, as the system does where memory runs out"),
    ]
    assert "threads 2 GPU" in outputs(0)
    code, output, _ = command(*words)
    assert code == 1 and "4 runs: 2 failed, 2 finished" in output
    assert [outputs(seed).count("$ mocapsnet") for seed in (0, 1, 2, 4)] == [1, 2, 2, 1]


def test_every_run_has_a_gpu(
    fake: Configuration, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert schedule.place(None, "auto").jobs == 2 and schedule.place(None, "cpu").devices == ()
    where = schedule.place(3, "auto")
    given = [where.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert given == ["3", "5", "3"]
    mine = [run for run in runs_of(fake) if run.keys["seed"] in (0, 4)]
    every = states.states_of(mine, Path("runs/own"))
    assert schedule.train_all(mine, every, Path("runs/own"), where, list, "") == []
    assert "GPU 3" in outputs(0) and "GPU 5" in outputs(4)


def test_an_interrupt_ends_what_runs_and_says_how_to_go_on(fake: Configuration) -> None:
    mine = [run for run in runs_of(fake) if run.keys["seed"] == 3]
    folder, written = Path("runs/own"), []
    child, before = folder / mine[0].name, psutil.Process().children()

    watch = threading.Thread(
        target=interrupt_when, args=[child.joinpath("waiting").absolute().exists]
    )
    watch.start()
    with pytest.raises(Interrupted, match=f"stopped in {mine[0].name}; .* Go on with: again"):
        schedule.train_all(
            mine,
            states.states_of(mine, folder),
            folder,
            schedule.place(1, "cpu"),
            lambda: written.append(1),
            "again",
        )
    watch.join()
    assert written and (child / "waiting").exists()
    new = [p for p in psutil.Process().children() if p not in before]
    assert not [p for p in new if p.status() != psutil.STATUS_ZOMBIE]
    assert states.Failures(folder).reasons == {}


def test_one_experiment_at_a_time(fake: Configuration, command: Command) -> None:
    folder = Path("runs/own")
    with record.claimed(folder):
        code, _, errors = command("experiment", "own.json")
        assert code == 2 and f"{folder} is in use by process {os.getpid()} on " in errors
        assert command("experiment", "own.json", "--dry-run", "--seeds", "0")[0] == 0
    assert not (folder / record.RECORD).exists() and not states.in_use(folder)


def test_a_run_that_another_process_trains_is_left_alone(
    fake: Configuration, command: Command
) -> None:
    run = Path("runs/own/digits-mocapsnet-blocks-1-seed-0")
    run.mkdir(parents=True)
    write_holder(run)
    code, output, errors = command("experiment", "own.json", "--seeds", "0")
    assert code == 0, errors
    assert f"{run.name}: left alone, in use by process {os.getpid()}" in output
    assert "| 1 | – (running) |" in output and not (run / "train.log").exists()
    # One of another machine says from time to time that it is there, until it is lost.
    note = run / ".lock-holder.json"
    note.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert states.in_use(run)
    os.utime(note, (time.time() - states.QUIET - 1,) * 2)
    assert not states.in_use(run)
    still_held(run)
    assert states.in_use(run)
    write_holder(run)
    # The number of a process that has ended may be another one's.
    os.utime(run / ".lock-holder.json", (1e9, 1e9))
    assert not states.in_use(run)
