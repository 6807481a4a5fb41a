"""Experiments: their files, what is run, what is left alone, and the tables that come of them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from mocapsnet import cli
from mocapsnet.cli import main
from mocapsnet.train.errors import Interrupted
from mocapsnet.train.experiments import (
    configuration,
    estimate,
    record,
    runs,
    schedule,
    states,
    table,
)
from mocapsnet.train.experiments.configuration import Configuration
from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.runs import Run
from mocapsnet.train.experiments.states import State
from mocapsnet.train.metrics import read_rows
from mocapsnet.train.option_values import flat, from_names, kinds, to_json

from .helpers import TINY, assert_same_run

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]

# One step an epoch; as TINY beside.
OPTIONS = {"channels": 16, "capsules": 4, "decoder": [16], "limit": 16, "batch_size": 16}
GRID = {"dataset": ["digits"], "model": ["mocapsnet"], "blocks": [1], "seed": [0]}
OWN: dict[str, Any] = {
    "title": "Learning rates",
    "grid": GRID,
    "cases": [{"name": "slow", "lr": 0.001}, {"name": "too fast", "lr": 1e30}],
    "options": OPTIONS,
    "columns": ["model"],
}


NAME = "digits-mocapsnet-blocks-1-seed-"


def own(content: dict[str, Any] = OWN, name: str = "own.json") -> Path:
    path = Path(name)
    path.write_text(json.dumps(content))
    return path


def parsed(content: dict[str, Any] = OWN) -> Configuration:
    return configuration.parse(content, "own", "own.json")


def shipped(name: str) -> Configuration:
    path = configuration.find(name)
    return configuration.parse(configuration.load(path), name, path)


def runs_of(found: Configuration, **given: Any) -> list[Run]:
    return runs.build(found, runs.select(found, {}), given, {})


def interrupt_when(ready: Callable[[], bool]) -> None:
    """Send this process what a job scheduler sends."""
    deadline = time.monotonic() + 120
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


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


# Trains nothing: copies a run, with the options that it is given; seed 1 fails, seed 2 is killed
# as where memory runs out, seed 3 does not end by itself.
FAKE = """
import json, os, pathlib, shutil, signal, sys, time
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
resumed = "--resume" in words
out = pathlib.Path(option("--resume" if resumed else "--out"))
seed = int(out.name.rpartition("-")[2])
print("threads", os.environ.get("OMP_NUM_THREADS"), "GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
print("mocapsnet: warning: a warning is no reason")
if seed == 1:
    sys.exit("mocapsnet: not enough memory: nothing is left. Fewer images need less")
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if not resumed:
    shutil.copytree("template", out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    config["options"]["optim"]["seed"] = seed
    (out / "config.json").write_text(json.dumps(config))
if seed == 3:
    (out / "waiting").touch()
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("template") / "template"
    assert main(["train", *TINY, "--limit", "16", "--epochs", "1", "--out", str(run)]) == 0
    return run


@pytest.fixture
def fake(template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configuration]:
    """An experiment of five seeds, and trainings that only look like some."""
    shutil.copytree(template, "template")
    Path("fake.py").write_text(FAKE)
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, "fake.py"))
    monkeypatch.setattr(schedule, "EVERY", 0.01)
    content = OWN | {"grid": GRID | {"seed": [0, 1, 2, 4, 3]}, "cases": []}
    content["options"] = OPTIONS | {"epochs": 1, "device": "cpu"}
    own(content)
    yield parsed(content)


def outputs(seed: int) -> str:
    return Path(f"runs/own/{NAME}{seed}/train.log").read_text()


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
    from mocapsnet.train.run_folder import write_holder

    write_holder(run)
    code, output, errors = command("experiment", "own.json", "--seeds", "0")
    assert code == 0, errors
    assert f"{run.name}: left alone, in use by process {os.getpid()}" in output
    assert "| 1 | – (running) |" in output and not (run / "train.log").exists()
    # The number of a process that has ended may be another one's.
    os.utime(run / ".lock-holder.json", (1e9, 1e9))
    assert not states.in_use(run)


def test_other_options_are_never_mixed(fake: Configuration, command: Command) -> None:
    words = ["experiment", "own.json", "--seeds", "0"]
    assert command(*words)[0] == 0
    for other, said in {
        ("--lr", "0.1"): "was begun with --lr 0.001, and now it is asked for with --lr 0.1",
        ("--image-size", "8"): "--image-size 8 is for --dataset folder",
    }.items():
        code, _, errors = command(*words, *other)
        assert code == 2 and said in errors, errors
    # Other seeds of other options would be in the same cell.
    code, _, errors = command("experiment", "own.json", "--seeds", "4", "--lr", "0.1")
    assert code == 2 and "(digits-mocapsnet-blocks-1-seed-0)" in errors
    own(json.loads(Path("own.json").read_text()) | {"options": OPTIONS | {"channels": 8}})
    code, _, errors = command(*words)
    assert code == 2 and "was begun with --channels 16, and now it is asked for with" in errors
    # Without its record, the run's own config.json tells.
    Path("runs/own/experiment.json").unlink()
    for last in ([], ["--dry-run"]):
        code, _, errors = command(*words, *last)
        assert code == 2, errors
        assert "holds a run of other options (--channels 16 there, 8 asked for)" in errors


def test_a_grid_of_other_options_is_another_experiment(
    fake: Configuration, command: Command
) -> None:
    """Its cells would lie on one another."""
    words = ["experiment", "own.json", "--seeds", "0"]
    assert command(*words)[0] == 0
    before = json.loads(Path("own.json").read_text())
    varied = before | {"grid": before["grid"] | {"lr": [0.001, 0.01]}}
    named = before | {"cases": [{"name": "slow", "lr": 0.001}, {"name": "fast", "lr": 0.01}]}
    for other, more in ((varied, "lr"), (named, "case")):
        own(other)
        for last in ([], ["--dry-run"]):
            code, _, errors = command(*words, *last)
            assert code == 2 and errors.count("\n") == 1
            assert f"now it is dataset, model, blocks, {more}, seed; a table has cells of" in errors
    own(varied)
    shutil.rmtree("runs")
    assert command(*words)[0] == 1  # as these trainings know one rate alone
    own(before)
    code, _, errors = command(*words)
    assert code == 2 and "was begun to compare dataset, model, blocks, lr, seed, and now" in errors


def test_an_option_for_all_runs_is_given_to_those_that_can_use_it() -> None:
    for varied, given, used in (
        ({"memory": ["reversible", "stored"]}, {"anchor_every": 4}, [4, None]),
        ({"method": ["rba", "sda"]}, {"sda_mean": "batch"}, ["input", "batch"]),
        ({"crop": ["padded", "resized"]}, {"pad": 3}, [3, 0]),
    ):
        content = OWN | {"cases": [], "grid": GRID | varied, "options": OPTIONS | given}
        (name,) = given
        found = [flat(run.options) for run in runs_of(parsed(content))]
        assert [options[kinds()[name][0]] for options in found] == used


def test_a_recipe_means_what_it_means_to_a_single_training() -> None:
    words = "--recipe published --crop resized --dataset digits --seed 0".split()
    single = cli.parse(["train", *words])
    several = from_names({"recipe": "published", "crop": "resized", "dataset": "digits", "seed": 0})
    assert several == single and (single.data.test_crop, single.data.pad) == ("random", 1)


def test_more_epochs_make_runs_longer(fake: Configuration, command: Command) -> None:
    assert command("experiment", "own.json", "--seeds", "0")[0] == 0
    code, output, _ = command(
        "experiment", "own.json", "--seeds", "0", "--epochs", "9", "--dry-run"
    )
    assert code == 0 and "interrupted after 1 of 9 epochs" in output and "by its epochs" in output
    code, _, errors = command(
        "experiment", "own.json", "--seeds", "4", "--optimizer", "ranger21", "--epochs", "9"
    )
    assert code == 2 and "--optimizer adam" in errors


def test_what_may_be_given_anew_reaches_a_run_that_goes_on(
    fake: Configuration, command: Command
) -> None:
    given = "--validation-share 0.25 --patience 3 --track --graph off".split()
    (run,) = runs_of(fake, validation_share=0.25, patience=3, track=[], graph="off", epochs=1)[:1]
    assert run.name == f"{NAME}0"
    folder = Path("runs/own", run.name)
    shutil.copytree("template", folder)
    config = json.loads((folder / "config.json").read_text())
    config["options"] = to_json(
        dataclasses.replace(
            run.options, watch=dataclasses.replace(run.options.watch, patience=2, track=())
        )
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").unlink()
    code, _, _ = command("experiment", "own.json", "--seeds", "0", "--epochs", "1", *given)
    assert code == 1  # as this training trains nothing
    words = f"--resume {folder} --epochs 1 --device cpu --graph off --patience 3 --track\n"
    assert words in outputs(0)


CELLS = {
    "title": "A title",
    "grid": GRID | {"model": ["rescapsnet", "mocapsnet"], "blocks": [2, 1], "seed": [0, 1, 2]},
    "options": {"epochs": 3, "channels": 64},
    "scale": {"channels": 256, "init": "paper"},
    "paper": [
        {"model": "mocapsnet", "blocks": 1, "accuracy": 97.5, "deviation": 0.25},
        {"model": "mocapsnet", "blocks": 2, "accuracy": 1, "shown": "≈ 1.00"},
    ],
    "notes": ["A note."],
}


@pytest.fixture
def fabricated() -> tuple[Record, dict[str, State]]:
    """Six runs of one network finished, two of another, and one hole of every kind."""
    found = parsed(CELLS)
    made = Record(found, {"epochs": 2, "limit": 1000}, {}, runs.select(found, {}), ["a CPU"])
    every = {}
    for run in made.runs():
        model, blocks, seed = (run.keys[name] for name in ("model", "blocks", "seed"))
        state = State("finished", 2, 0.9 + 0.01 * seed + 0.001 * blocks, 1.5)
        if model == "rescapsnet" and blocks == 1:
            state = [state, State("failed", 1, reason="no memory"), State("missing")][seed]
        elif model == "rescapsnet":
            state = State("interrupted", 1, 0.5) if seed else State("missing")
        every[run.name] = state
    return made, every


def test_a_table_is_exact(fabricated: tuple[Record, dict[str, State]]) -> None:
    page = table.markdown(*fabricated)
    assert page.splitlines()[2] == (
        "**Smaller than the paper: 1,000 training images at most instead of all; 64 channels "
        "instead of 256; 2 epochs instead of 3.** Other than the paper: --init length instead of "
        "paper. Run on: a CPU."
    )
    assert "\n7 of 12 runs are finished. " in page
    assert (
        "| blocks | digits, ResCapsNet | digits, MoCapsNet | paper |\n"
        "| --- | --- | --- | --- |\n"
        "| 1 | 90.10 (n = 1 of 3) | 91.10 ± 1.00 (n = 3) | 97.50 ± 0.25 |\n"
        "| 2 | – (interrupted, not run) | 91.20 ± 1.00 (n = 3) | ≈ 1.00 |\n"
    ) in page
    assert "* digits-rescapsnet-blocks-1-seed-1: failed: no memory\n" in page
    assert "* digits-rescapsnet-blocks-2-seed-1: interrupted after 1 of 2 epochs\n" in page
    assert page.count("* digits") == 3 and page.endswith("\n\nA note.\n")

    lines = list(csv.DictReader(io.StringIO(table.table_csv(*fabricated))))
    assert [line["blocks"] for line in lines] == ["1", "2", "1", "2"]
    assert lines[0] == {
        "dataset": "digits",
        "model": "rescapsnet",
        "blocks": "1",
        "n": "1",
        "of": "3",
        "mean": "90.1000",
        "deviation": "",
        "paper": "",
        "paper_deviation": "",
        "holes": "failed missing",
    }
    assert [lines[2][name] for name in ("mean", "deviation", "paper", "paper_deviation")] == [
        "91.1000",
        "1.0000",
        "97.5000",
        "0.2500",
    ]
    each = list(csv.DictReader(io.StringIO(table.runs_csv(*fabricated))))
    assert len(each) == 12
    (failed,) = (line for line in each if line["state"] == "failed")
    assert (failed["run"], failed["epochs"], failed["of"], failed["reason"]) == (
        "digits-rescapsnet-blocks-1-seed-1",
        "1",
        "2",
        "no memory",
    )


def test_a_report_is_written_of_the_record_alone(
    fabricated: tuple[Record, dict[str, State]], command: Command
) -> None:
    made, _ = fabricated
    folder = Path("runs/own")
    folder.mkdir(parents=True)
    record.write(folder, made)
    again = record.read(folder)
    assert again is not None and dataclasses.replace(again, commands=[]) == made
    own(CELLS)
    code, output, errors = command("experiment", "own.json", "--report")
    assert code == 0, errors
    assert "0 of 12 runs are finished" in output and "2 epochs instead of 3" in output
    assert (folder / "table.md").read_text() in output
    with Image.open(folder / "table.png") as picture:
        assert picture.width > 400
    assert command("experiment", "table1", "--report")[0] == 2


def test_cells_are_drawn_against_blocks_or_below_one_another(
    fabricated: tuple[Record, dict[str, State]],
) -> None:
    from mocapsnet.train.experiments.picture import draw, figure

    made, every = fabricated
    (axes,) = figure(made, table.cells(made, every)).axes
    assert axes.get_xlabel() == "blocks of two capsule layers"
    handles, labels = axes.get_legend_handles_labels()
    assert sorted(labels) == ["MoCapsNet", "MoCapsNet, the paper", "ResCapsNet"]
    ours = handles[labels.index("MoCapsNet")].lines[0]
    assert list(ours.get_ydata()) == pytest.approx([91.1, 91.2])
    without = every | {run.name: State("missing") for run in made.runs() if run.keys["blocks"] == 1}
    (axes,) = figure(made, table.cells(made, without)).axes
    handles, labels = axes.get_legend_handles_labels()
    assert math.isnan(handles[labels.index("MoCapsNet")].lines[0].get_ydata()[0])
    found = shipped("table5")
    made = Record(found, {}, {}, runs.select(found, {}))
    every = {run.name: State("missing") for run in made.runs()}
    (axes,) = figure(made, table.cells(made, every)).axes
    assert axes.get_yticklabels()[1].get_text() == "lr 0.01, capsules 32, batch size 64"
    assert draw(made, table.cells(made, every)).startswith(b"\x89PNG")


def test_the_papers_tables() -> None:
    """Section 4.1 and the tables: how many runs, of what, and some of the numbers beside."""
    counts = {name: len(runs_of(shipped(name))) for name in ("table1", "table2", "table3")}
    others = ("table5", "deep")
    counts |= {name: len(runs_of(shipped(name))) for name in others}
    assert counts == {
        "table1": 2 * 2 * 8 * 3,
        "table2": 2 * 2 * 8 * 3,
        "table3": 2 * 3 * 4 * 3,
        "table5": 2 * 6 * 3,
        "deep": 1,
    }
    for name, epochs in {"table1": {30, 60}, "table2": {60}, "table5": {100}}.items():
        assert {run.options.optim.epochs for run in runs_of(shipped(name))} == epochs
    for run in runs_of(shipped("table1")):
        optim, model = run.options.optim, run.options.model
        assert (optim.optimizer, optim.lr, optim.batch_size) == ("adam", 1e-3, 128)
        assert (model.channels, model.capsules, model.iterations) == (256, 32, 3)
        assert optim.epochs == (30 if run.options.data.dataset == "mnist" else 60)
    rates = {(r.options.optim.optimizer, r.options.optim.lr) for r in runs_of(shipped("table3"))}
    assert rates == {("adam", 1e-3), ("ranger21", 1e-2)}

    def paper(name: str, **keys: Any) -> float:
        (entry,) = (e for e in shipped(name).paper if e.keys == keys)
        return entry.accuracy

    assert paper("table1", dataset="mnist", model="mocapsnet", blocks=7) == 99.54
    assert paper("table1", dataset="svhn", model="rescapsnet", blocks=4) == 91.87
    assert paper("table2", dataset="cifar100", model="mocapsnet", blocks=8) == 43.48
    assert [len(shipped(n).paper) for n in counts] == [32, 32, 24, 12, 1]


def test_runs_have_readable_names_and_are_ordinary_commands() -> None:
    first, *_ = runs_of(shipped("table3"))
    assert first.name == "cifar10-rescapsnet-blocks-1-rba-adam-seed-0"
    from mocapsnet import cli

    recipe = runs_of(shipped("table3"), recipe="published", normalisation="image")
    assert recipe[-1].options.optim.planned_steps == 128
    case = {"name": "fast, or too fast?", "lr": 1.0}
    (run,) = runs_of(parsed(OWN | {"cases": [case]}))
    assert run.name == "digits-mocapsnet-blocks-1-fast-or-too-fast-seed-0"
    for run in [*runs_of(shipped("table5"))[-2:], *runs_of(parsed(), limit=5), *recipe[-4:]]:
        options = cli.parse(run.arguments("x"))
        assert dataclasses.replace(options, out=None) == run.options  # type: ignore[type-var]


def test_options_of_the_command_line_reach_the_runs() -> None:
    found = shipped("table1")
    keys = runs.select(found, {"dataset": ["cifar10"], "blocks": [3], "seed": [7]})
    given = {"gamma": 0.5, "bundles": True, "mixed_precision": "bf16", "epochs": 2, "channels": 32}
    one, two = runs.build(found, keys, given, {"cifar10": "/images"})
    assert (one.name, two.name) == (
        "cifar10-rescapsnet-blocks-3-seed-7",
        "cifar10-mocapsnet-blocks-3-seed-7",
    )
    for run in (one, two):
        assert run.options.machine.mixed_precision == "bf16" and run.options.bundles
        assert (run.options.optim.epochs, run.options.model.channels) == (2, 32)
        assert (run.options.data.dataset, run.options.data.data_dir) == ("folder", "/images")
    # Of no use to a network without momentum.
    assert (one.options.model.gamma, two.options.model.gamma) == (0.9, 0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("experiment table9", "table9 is neither an experiment (collapse, deep,"),
        ("experiment table1 --datasets mnits", "--datasets is 'mnits', but must be one of digits"),
        ("experiment table1 --seeds 1 1", "--seeds: 1 is given twice"),
        ("experiment table1 --jobs 0", "--jobs must be at least 1, got 0"),
        ("experiment table1 --epochs 0", "-seed-0: --epochs must be greater than 0, got 0"),
        ("experiment table1 --seed 3", "--seed is for mocapsnet train; an experiment has --seeds"),
        ("experiment table5 --lr 1", "--lr 1.0: table5 compares values of it"),
        ("experiment table1 --folders svhn", "--folders svhn: must be DATASET=DIR"),
        ("experiment table1 --folders cifar10=x", "of a data set that is asked for (mnist, svhn)"),
        ("experiment table1 --copy no/x.json", "--copy no/x.json: there is no folder no"),
    ],
)
def test_one_clear_error_for_a_wrong_command(words: str, said: str, command: Command) -> None:
    code, _, errors = command(*words.split())
    assert code == 2 and said in errors and errors.count("\n") == 1, errors
    assert not Path("runs").exists()


def test_unknown_options_are_those_of_no_training(command: Command) -> None:
    code, _, errors = command("experiment", "table1", "--epoch", "3")
    assert code == 2 and "Unrecognized options: --epoch, 3" in errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": 3}, "title: must be a text of one line"),
        ({"tilte": "x"}, "tilte: unknown; there are title, about"),
        ({"grid": None}, "grid: must be an object, not None"),
        ({"grid": {"dataset": ["digits"]}}, "grid.model: is missing"),
        ({"grid": GRID | {"seed": 0}}, "grid.seed: must be a list of values, not 0"),
        ({"grid": GRID | {"seed": []}}, "grid.seed: must be a list of values, not []"),
        ({"grid": GRID | {"seed": ["a"]}}, "grid.seed[0] is 'a', but must be an integer"),
        ({"grid": GRID | {"seed": [1, 1]}}, "grid.seed[1]: 1 stands there twice"),
        ({"grid": GRID | {"batch-size": [1]}}, "grid.batch-size[0]: no option of mocapsnet train"),
        ({"cases": {}}, "cases: must be a list, not {}"),
        ({"cases": [3]}, "cases[0]: must be an object of options, not 3"),
        ({"cases": [{"name": "a"}, {"lr": 1}]}, "cases[1]: all cases must have a name, or none"),
        ({"cases": [{"name": 1, "lr": 1}]}, "cases[0].name: must be a text, not 1"),
        (
            {"cases": [{"name": "a b", "lr": 1}, {"name": "a/b", "lr": 2}]},
            "cases[1]: 'a-b' stands there twice",
        ),
        ({"cases": [{"name": "/", "lr": 1}]}, "cases[0].name: must have letters or digits"),
        ({"cases": [{"seed": 1}]}, "cases[0].seed: stands in the grid as well"),
        ({"options": {"lr": "fast"}}, "options.lr is 'fast', but must be a number"),
        ({"where": [{"if": {}}]}, 'where[0]: must be {"if": {...}, "then": {...}}'),
        ({"where": [{"if": {"lr": 1}, "then": {}}]}, "where[0].if.lr: must be one of dataset,"),
        ({"columns": ["seed"]}, "columns: 'seed' is nothing that runs differ in"),
        ({"paper": [{"blocks": 1}]}, "paper[0].accuracy: must be a number, not None"),
        ({"paper": [{"blocks": 9, "accuracy": 1}]}, "paper[0]: is for none of the runs"),
        (
            {"paper": [{"blocks": 1, "accuracy": 1}, {"accuracy": 1}]},
            "paper[1]: is for the cells of paper[0] too",
        ),
        ({"scale": {"lrr": 1}}, "scale.lrr: no option of mocapsnet train"),
        ({"notes": [1]}, "notes[0]: must be a text, not 1"),
    ],
)
def test_one_clear_error_for_a_wrong_file(
    change: dict[str, Any], said: str, command: Command
) -> None:
    own(OWN | change)
    code, _, errors = command("experiment", "own.json", "--dry-run")
    assert code == 2 and f"own.json: {said}" in errors and errors.count("\n") == 1, errors


def test_a_file_that_is_no_json(command: Command) -> None:
    for content, said in {
        '{"title": "x",}': "own.json is not JSON: ",
        "[]": "own.json must hold an object, not []",
        '{"title": "x", "title": "y"}': "own.json: title stands twice in one object",
    }.items():
        Path("own.json").write_text(content)
        code, _, errors = command("experiment", "own.json")
        assert code == 2 and said in errors and errors.count("\n") == 1, errors


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    content = json.loads(page.partition("```json\n")[2].partition("```")[0])
    mine = runs_of(configuration.parse(content, "own", "docs/paper.md"))
    assert len(mine) == 2 * 2 * 3
    assert {run.options.optim.epochs for run in mine if run.keys["blocks"] == 2} == {20}


# Measures nothing: writes what a benchmark would.
BENCHMARK = """
import json, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output") + 1])
blocks = [int(w) for w in words[words.index("--blocks") + 1 : words.index("--batch")]]
if "depth" in words and not pathlib.Path("repaired").exists():
    sys.exit("depth: relative error 1; nothing was measured")
rows = [
    {"candidate": f"{model}, {kind}", "blocks": n, "peak_bytes": (base + 2 * n) * 1e6}
    for model, kind, base in (("ResCapsNet", "published", 100), ("ResCapsNet", "fused", 10),
    ("MoCapsNet", "published", 90), ("MoCapsNet", "fused, reversible", 9)) for n in blocks
]
found = {"machine": {"device": "a machine"}, "settings": {"blocks": blocks, "batch": 128}}
if "memory" in words:
    found["settings"] |= {"images": words[words.index("--images") + 1], "channels": 256}
(out / f"{words[1]}.json").write_text(json.dumps(found | {"rows": rows}))
(out / f"{words[1]}.md").write_text("What " + words[1] + " found")
"""


def test_memory_and_time_are_measured_by_benchmarks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("fake.py").write_text(BENCHMARK)
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, "fake.py"))
    code, output, errors = command("experiment", "figure3", "--dry-run")
    assert code == 0 and output.count("not run") == 3, errors
    words = ["experiment", "figure3", "--blocks", "2", "1", "4"]
    code, output, errors = command(*words)
    assert code == 1 and "1 of 3 benchmarks failed, depth: depth: relative error 1" in errors
    page = Path("runs/figure3/table.md").read_text()
    assert "blocks 1 2 4 instead of 1 2 3 4 5 6 7 8" in page.splitlines()[2]
    assert "2 of 3 benchmarks are finished" in page and "* depth: failed: depth: relative" in page
    paper = "4,462 | 4,612 | 4,858 | 5,199 | 5,204 | 5,502 | 5,572 | 5,786 | 190.5 |\n"
    assert f"| MNIST | ResCapsNet | the paper | {paper}" in page
    assert "| MNIST | ResCapsNet | published | 102 | 104 | – | 108 | – | – | – | – | 2.0 |" in page
    assert "| SVHN | MoCapsNet | fused, reversible | 11 | 13 | – | 17 " in page
    assert page in output and "## memory-cifar10\n\nWhat memory found" in page

    Path("repaired").touch()
    code, output, errors = command(*words)
    assert code == 0 and output.count("finished before") == 2, errors
    assert "3 of 3 benchmarks are finished" in Path("runs/figure3/table.md").read_text()
    code, _, errors = command("experiment", "figure3")
    assert code == 2 and "memory-mnist holds results with other options (--blocks 1 2 4" in errors
    code, _, errors = command("experiment", "figure3", "--epochs", "2")
    assert code == 2 and "--epochs is for experiments that train; figure3 measures" in errors
    lines = list(csv.DictReader(Path("runs/figure3/table.csv").open()))
    assert len(lines) == 6 * 8 + 12 * 3
    code, output, _ = command("experiment", "figure3", "--report")
    assert code == 0 and "3 of 3" in output
    with Image.open("runs/figure3/table.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmarks": []}, "benchmarks: must be a list of benchmarks, and is empty"),
        ({"benchmarks": [3]}, "benchmarks[0]: must be an object of name, benchmark, options"),
        ({"grid": {}}, "grid: unknown; there are title, about, notes, benchmarks"),
        ({"paper": [{"model": "x"}]}, "paper[0]: must be an object of dataset, benchmark, model"),
        ({"compare": {}}, "paper[0]: names a benchmark or a model that is not there"),
    ],
)
def test_one_clear_error_for_a_wrong_file_of_benchmarks(
    change: dict[str, Any], said: str, command: Command
) -> None:
    own(configuration.load(configuration.find("figure3")) | change)
    code, _, errors = command("experiment", "own.json", "--dry-run")
    assert code == 2 and f"own.json: {said}" in errors and errors.count("\n") == 1, errors


@pytest.mark.parametrize("option", ["--copy mine.json", "--report", "--dry-run"])
def test_what_is_asked_of_no_experiment_is_refused(option: str, command: Command) -> None:
    code, _, errors = command("experiment", *option.split())
    assert code == 2 and f"{option.split()[0]} needs the NAME of an experiment" in errors
    assert not Path("mine.json").exists()


def test_experiments_are_listed_and_copied(command: Command) -> None:
    code, output, _ = command("experiment")
    assert code == 0 and all(name in output for name in configuration.names())
    code, output, _ = command("experiment", "table5", "--copy", "mine.json")
    assert code == 0 and "mocapsnet experiment mine.json" in output
    assert configuration.load(Path("mine.json")) == shipped("table5").content
    assert command("experiment", "table5", "--copy", "mine.json")[0] == 2


def test_time_is_a_line_between_the_fewest_and_the_most_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = []

    def time_steps(options: Any, images: Any, where: Any) -> tuple[float, float]:
        timed.append(options.model.blocks)
        return 1.0 + options.model.blocks, 0.5

    monkeypatch.setattr(estimate, "time_steps", time_steps)
    found = parsed(OWN | {"cases": [], "grid": GRID | {"blocks": [1, 2, 5], "seed": [0, 1]}})
    mine = runs_of(found, epochs=2)
    every = {run.name: State("missing") for run in mine}
    guesses = estimate.estimate(mine, every, schedule.place(1, "cpu"), lambda _: None)
    assert sorted(timed) == [1, 5]
    start = guesses[mine[0].name].seconds - 2 * (2.0 * 1 + 0.5 * 1)
    for run in mine:
        expected = start + 2 * ((1.0 + run.keys["blocks"]) * 1 + 0.5 * 1)
        assert guesses[run.name].seconds == pytest.approx(expected)
    assert guesses["digits-mocapsnet-blocks-2-seed-1"].source == "3 steps with 1 and with 5 blocks"


def test_steps_are_timed_with_the_real_network() -> None:
    images = estimate.Images(16, 16, (1, 8, 8), tuple("0123456789"))
    for precision in ("no", "bf16"):  # in one process, which has one of Accelerate's states
        (run, _) = runs_of(parsed(), device="cpu", mixed_precision=precision)
        step, test = estimate.time_steps(run.options, images, schedule.place(1, "cpu"))
        assert 0 < step < 10 and 0 < test < 10
