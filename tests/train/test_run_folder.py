"""The run folder: who holds it, what is in it when a run stops, and what an edit breaks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mocapsnet.train import checkpoints, loop, run_folder

from .helpers import TINY, assert_same_run, checkpoint, rows, run_two

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def holder(train: Train) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder of a finished run, "run"."""
    train("run", "--epochs", "1")
    code = (
        "import pathlib, sys; from mocapsnet.train import run_folder;"
        "from accelerate import Accelerator;"
        "held = run_folder.claimed(pathlib.Path('run'), Accelerator(cpu=True), new=False);"
        "held.__enter__(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_one_training_at_a_time(holder: subprocess.Popen[str], command: Command) -> None:
    before = contents(Path("run"))
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 2 and errors.count("\n") == 1
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in errors
    assert contents(Path("run")) == before
    assert command("evaluate", "run", "--device", "cpu")[0] == 0  # reading needs no lock
    done = run_two("train", "--resume", "run", "--epochs", "2")
    assert done.returncode != 0
    assert done.stderr.count(f"run is in use by process {holder.pid}") == 1
    # What a process leaves that had no time to clean up.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path("run/.lock").exists() and Path("run/.lock-holder.json").exists()
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    assert not Path("run/.lock-holder.json").exists()


def test_two_trainings_that_start_in_one_folder(train: Train, command: Command) -> None:
    Path("run").mkdir()
    with FileLock("run/.lock"):
        code, _, errors = command("train", *TINY, "--out", "run")
    assert code == 2 and "run is in use by another process" in errors
    train("run", "--epochs", "1")


def test_finished_and_gone_beyond(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "3")
    (run / "confusion_matrix.png").touch()  # `visualize` draws it again
    before = contents(run)
    code, output, errors = command("train", "--resume", "run")
    assert (code, errors) == (0, "")
    assert output == "run is finished, 3 of 3 epochs; give --epochs to go on\n"
    code, _, errors = command("train", "--resume", "run", "--epochs", "1")
    assert code == 2 and "--epochs 1: run has done 3 epochs already" in errors
    assert contents(run) == before


def test_a_copy_of_a_finished_run_is_finished(train: Train, command: Command) -> None:
    """Whatever times its files have got."""
    run = train("run", "--epochs", "1")
    for newest in (checkpoint(run) / "state.json", run / "result.json"):
        shutil.copytree(run, "copy", copy_function=shutil.copyfile)
        os.utime(Path("copy") / newest.relative_to(run), (2e9, 2e9))
        code, output, _ = command("train", "--resume", "copy")
        assert code == 0 and output.startswith("copy is finished, 1 of 1 epochs")
        shutil.rmtree("copy")


@pytest.mark.usefixtures("pictures")
def test_a_run_killed_while_it_ended_ends_when_continued(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit(9)

    whole = train("whole", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_pictures", killed)
        assert command("train", *TINY, "--out", "run", "--epochs", "1")[0] == 9
    assert command("train", "--resume", "run")[0] == 0
    assert {p.name for p in Path("run").iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("before", ["config.json", "checkpoint"])
def test_a_run_killed_before_it_began(
    before: str, train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json comes first, and without it the folder is as good as empty."""

    def killed(*_: object) -> None:
        raise SystemExit(9)

    whole = train("whole", "--epochs", "1")
    arguments = ["train", *TINY, "--out", "run", "--epochs", "1"]
    with monkeypatch.context() as patch:
        if before == "config.json":
            patch.setattr(run_folder, "write_config", killed)
        else:
            patch.setattr(checkpoints, "save", killed)
        assert command(*arguments)[0] == 9
    if before == "config.json":
        code, _, errors = command("train", "--resume", "run")
        assert code == 2 and "run has no config.json" in errors
        Path("run/config.json.123.tmp").write_text("{")
        assert command(*arguments)[0] == 0
    else:
        code, _, errors = command("evaluate", "run")
        assert code == 2 and "stopped before it began" in errors
        assert command("train", "--resume", "run")[0] == 0
    assert_same_run(whole, Path("run"))


def test_stray_files_among_the_checkpoints(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    for name in ("epoch-0009", "epoch-0001 (copy)", "epoch-final", "notes.txt"):
        (run / "checkpoints" / name).touch()
    (run / "checkpoints" / "epoch-best").mkdir()
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0 and "after epoch 1" in output, errors
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    assert [row["epoch"] for row in rows(run)] == [1, 2]


def edit(config: dict[str, Any], path: str, value: Any) -> None:
    *groups, last = path.split(".")
    for group in groups:
        config = config[group]
    if value is None:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("options.data.dataset", "cifra", "data.dataset is 'cifra', but must be one of digits, mn"),
        ("options.optim.lr", "fast", "optim.lr is 'fast', but must be a number"),
        ("options.optim.lr", -1, "--lr must be greater than 0, got -1"),
        ("options.optim.seed", True, "optim.seed is True, but must be an integer"),
        ("options.model.decoder", [16, "x"], "model.decoder is [16, 'x'], but must be a list"),
        ("options.model.decoder", [0], "decoder: every width must be at least 1"),
        ("options.model.gamma", 2, "gamma must lie between 0 and 1"),
        ("options.model.blocks", None, "model.blocks is missing"),
        ("options.model.depth", 3, "unknown option model.depth"),
        ("options.optim", None, "optim.optimizer is missing"),
        ("options.data", 7, "data must be an object, not 7"),
        ("options", None, "options must be an object, not None"),
        ("format", "new", "is of format new"),
    ],
)
def test_an_edit_that_breaks_config_json(
    path: str, value: Any, expected: str, folder_of_a_run: Path, command: Command
) -> None:
    config = json.loads((folder_of_a_run / "config.json").read_text())
    edit(config, path, value)
    (folder_of_a_run / "config.json").write_text(json.dumps(config))
    for arguments in ("evaluate run --device cpu", "train --resume run --epochs 9"):
        code, _, errors = command(*arguments.split())
        assert code == 2 and expected in errors, errors
        assert errors.startswith("mocapsnet: ") and errors.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"format": 1}'])
def test_another_file_in_place_of_config_json(
    content: bytes, folder_of_a_run: Path, command: Command
) -> None:
    (folder_of_a_run / "config.json").write_bytes(content)
    code, _, errors = command("evaluate", "run")
    assert code == 2 and "run/config.json" in errors and errors.count("\n") == 1


@pytest.fixture
def folder_of_a_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ "run", with a checkpoint before the first epoch."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mocapsnet.train.trainer.Trainer.epoch", stop)
        assert command("train", *TINY, "--out", "run")[0] == 130
    return Path("run")


def test_config_json_says_what_the_images_are(folder_of_a_run: Path) -> None:
    config = json.loads((folder_of_a_run / "config.json").read_text())
    assert config["image_shape"] == [1, 8, 8]
    assert config["classes"] == list("0123456789")
    assert config["options"]["data"]["data_dir"] == str(Path("data").absolute())


def test_two_processes_may_write_one_file() -> None:
    code = (
        "import pathlib, sys; from mocapsnet.train.files import write_whole;"
        "print('ready', flush=True); sys.stdin.readline();"
        "[write_whole(pathlib.Path('file'), sys.argv[1] * 5000) for _ in range(100)]"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, word], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for word in "ab"
    ]
    for one in both:
        assert one.stdout is not None and one.stdout.readline() == b"ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
    for one in both:
        one.communicate()
    assert [one.returncode for one in both] == [0, 0]
    assert Path("file").read_text() in ("a" * 5000, "b" * 5000)
    assert [path.name for path in Path().glob("file*")] == ["file"]


def test_what_is_not_trained_yet_is_said_to_be(folder_of_a_run: Path, command: Command) -> None:
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    assert "run, not trained yet (its first epoch is not done): test accuracy" in output


def test_a_network_s_folder_is_no_run(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    for words in ("evaluate", "visualize", "train --resume"):
        code, _, errors = command(*words.split(), "run/model")
        assert code == 2
        assert f"run/model holds a network alone; give the run's folder: {run.resolve()}" in errors


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
@pytest.mark.usefixtures("pictures")
def test_all_files_have_the_mode_that_the_umask_gives(command: Command) -> None:
    before = os.umask(0o027)
    try:
        assert command("train", *TINY, "--out", "run", "--epochs", "1")[0] == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in Path("run").rglob("*")}
    assert len(modes) > 10
    for path, mode in modes.items():
        assert mode == (0o750 if path.is_dir() else 0o640), (path, oct(mode))


def test_a_full_disk_leaves_the_last_checkpoint(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated by a limit on the size of files, below which all but the optimiser's stay."""
    resource = pytest.importorskip("resource")
    whole = train("whole", "--epochs", "2")
    run = train("run", "--epochs", "1")
    optimizer = (checkpoint(run) / checkpoints.OPTIMIZER).stat().st_size
    before = {path.name: path.read_bytes() for path in checkpoint(run).iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer - 1, limits[1]))
    try:
        code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and errors.count("\n") == 1
    assert "File too large; stopped in epoch 2" in errors
    assert "The last checkpoint, run/checkpoints/epoch-0001, is whole" in errors
    assert {path.name: path.read_bytes() for path in checkpoint(run).iterdir()} == before
    assert command("train", "--resume", "run", "--epochs", "2")[0] == 0
    assert_same_run(whole, run)
