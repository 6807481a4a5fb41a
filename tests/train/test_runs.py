"""Whole runs: what they write, that they repeat, and that nothing is lost when they stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from mocapsnet.train.evaluation import Evaluation
from mocapsnet.train.trainer import Trainer

from .helpers import (
    TINY,
    assert_same_run,
    checkpoint,
    optimizer_state,
    process,
    rows,
    run_process,
    run_two,
    weights,
)

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]

CHECKPOINT = {"model.safetensors", "optimizer.safetensors", "state.json"}
PICTURES = [
    "learning_curves.png",
    "reconstructions.png",
    "confusion_matrix.png",
    "worst_images.png",
]
INSIDE = [
    "mistakes.png",
    "dimensions.png",
    "places.png",
    "couplings.png",
    "layers.png",
    "bundles.png",
]


def test_two_epochs_on_digits_from_the_command_line() -> None:
    done = run_process("train", "--epochs", "2", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = Path("run")
    written = {path.name for path in run.iterdir()} - {".lock"}
    assert written == {
        "config.json",
        "metrics.jsonl",
        "start.json",
        "tensorboard",
        "result.json",
        "checkpoints",
        "model",
        *PICTURES,
    }
    for name in written:
        assert name in done.stdout.split("run holds:")[1]
    for name in PICTURES:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert any((run / "tensorboard").iterdir())
    assert {p.name for p in checkpoint(run).iterdir()} == CHECKPOINT
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["optim"]["batch_size"] == 32
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    first, second = rows(run)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["step"] == 2 * 43  # 1,347 images in batches of 32
    assert (first["lr"], second["lr"]) == (1e-3, pytest.approx(0.96e-3))
    # Chance is 10 %; two seeds reached 86 and 90 %.
    assert second["test_accuracy"] > 0.5
    assert second["test_loss"] < first["test_loss"]
    assert f"{second['test_accuracy']:.2%}" in done.stdout
    # Without a terminal there is a line per epoch and no bar.
    assert done.stdout.count("epoch 1/2") == 1 and "\r" not in done.stdout + done.stderr


def test_same_seed_same_bits_other_seed_other_bits(train: Train) -> None:
    a, b = train("a", "--epochs", "1"), train("b", "--epochs", "1")
    assert_same_run(a, b)
    c = train("c", "--epochs", "1", "--seed", "1")
    assert rows(a) != rows(c)


@pytest.mark.parametrize("optimizer", ["adam", "ranger21"])
def test_interrupted_in_an_epoch_and_resumed(
    optimizer: str, train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--optimizer", optimizer, "--epochs", "3")
    whole = train("whole", *options)
    step, calls = Trainer._step, 0

    def interrupted_step(self: Trainer, *arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # three steps an epoch: the second step of epoch 2
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted_step)
        code, _, errors = command("train", *TINY, "--out", "stopped", *options)
    assert code == 130
    assert "stopped in epoch 2" in errors and "mocapsnet train --resume stopped" in errors
    assert checkpoint(Path("stopped")).name == "epoch-0001"
    code, output, errors = command("train", "--resume", "stopped")
    assert code == 0, errors
    assert "after epoch 1" in output
    assert_same_run(whole, Path("stopped"))
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        p.name for p in Path("stopped").iterdir()
    )


def at_step(number: int, act: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """`Trainer._step`, which does something in the middle of its `number`-th call."""
    step, calls = Trainer._step, 0

    def acting(self: Trainer, *arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return step(self, *arguments)

    return acting


def stop_at_once() -> None:
    raise KeyboardInterrupt


def ask_to_stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def interrupts() -> Iterator[Callable[[object], object]]:
    """Sets what SIGINT does, at first what it does in a terminal: a shell without job control lets
    what it starts in the background, tests too, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda action: signal.signal(signal.SIGINT, action)
    signal.signal(signal.SIGINT, before)


WITHIN = {  # three steps an epoch: when a signal comes, and where the run stops
    "in an epoch": (5, signal.SIGTERM, "stopped in epoch 2 after 2 of 3 steps", 1, 2),
    "in the first": (1, signal.SIGINT, "stopped in epoch 1 after 1 of 3 steps", 0, 1),
    "in its last step": (6, signal.SIGINT, "stopped in epoch 2 after 3 of 3 steps", 1, 3),
}


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "ranger21"),
        ("--schedule", "cosine", "--mix", "cutmix", "--gradient-accumulation", "2"),
        ("--validation-share", "0.3", "--keep", "best", "--bundles", "--batch-size", "12"),
    ],
    ids=lambda options: options[1],
)
@pytest.mark.parametrize("when", WITHIN)
@pytest.mark.usefixtures("pictures", "interrupts")
def test_a_stopped_run_goes_on_at_the_same_step(
    when: str,
    options: tuple[str, ...],
    train: Train,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number, sent, said, epochs, steps = WITHIN[when]
    options = (*options, "--epochs", "3")
    whole = train("whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", at_step(number, lambda: ask_to_stop(sent)))
        code, _, errors = command("train", *TINY, "--out", "stopped", *options)
    assert code == 130
    assert f"{said}; continue with: mocapsnet train --resume stopped" in errors
    stopped = Path("stopped")
    names = {path.name for path in (stopped / "checkpoints").iterdir()}
    assert names == {f"epoch-{epochs:04d}", f"epoch-{epochs:04d}-steps-{steps:06d}"}
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == epochs
    with monkeypatch.context() as patch:
        left = 9 - (number if when != "in the first" else 1)
        patch.setattr(Trainer, "_step", at_step(left + 1, stop_at_once))  # there are no more
        code, output, errors = command("train", "--resume", "stopped")
    assert code == 0, errors
    assert f"continuing stopped in epoch {epochs + 1}, after {steps} steps of it" in output
    assert_same_run(whole, stopped)
    assert (stopped / "start.json").read_text() == (whole / "start.json").read_text()


@pytest.mark.usefixtures("pictures")
def test_where_ctrl_c_is_ignored_a_run_goes_on(
    train: Train, interrupts: Callable[[object], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts(signal.SIG_IGN)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", at_step(2, lambda: ask_to_stop(signal.SIGINT)))
        run = train("whole", "--epochs", "1")
    assert checkpoint(run).name == "epoch-0001"


@pytest.mark.usefixtures("pictures")
def test_all_processes_stop_if_one_is_asked(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one, of which this one hears when they add up what a step has found."""
    reduce, calls = Accelerator.reduce, 0

    def with_another(self: Accelerator, found: torch.Tensor, how: str) -> torch.Tensor:
        nonlocal calls
        if isinstance(found, torch.Tensor) and found.shape[1:] == (4,):
            calls += 1
            found[0, 0] += calls == 4
        return reduce(self, found, how)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "reduce", with_another)
        code, _, errors = command("train", *TINY, "--out", "stopped", "--epochs", "2")
    assert code == 130 and "stopped in epoch 2 after 1 of 3 steps" in errors
    assert command("train", "--resume", "stopped")[0] == 0
    assert_same_run(train("whole", "--epochs", "2"), Path("stopped"))


@pytest.mark.usefixtures("pictures")
def test_a_second_signal_stops_in_the_middle_of_a_step(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_twice() -> None:
        ask_to_stop()
        ask_to_stop()

    whole = train("whole", "--epochs", "2")
    for seconds, said in ((0.0, "epoch 2;"), (60.0, "epoch 2 after 2 of 3 steps;")):
        with monkeypatch.context() as patch:
            patch.setattr("mocapsnet.train.stopping.AT_ONCE", seconds)
            patch.setattr(Trainer, "_step", at_step(5, ask_twice))
            run = f"stopped-{seconds}"
            code, _, errors = command("train", *TINY, "--out", run, "--epochs", "2")
        assert code == 130 and f"stopped in {said} continue with" in errors
        assert command("train", "--resume", run)[0] == 0
        assert_same_run(whole, Path(run))


@pytest.mark.usefixtures("pictures")
def test_stopped_while_it_is_tested(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr("mocapsnet.train.loop.evaluate", lambda *_: ask_to_stop())
        code, _, errors = command("train", *TINY, "--out", "stopped", "--epochs", "1")
    assert code == 130 and "stopped in epoch 1 after 3 of 3 steps" in errors
    monkeypatch.setattr(Trainer, "_step", at_step(1, stop_at_once))  # no step is left
    assert command("train", "--resume", "stopped")[0] == 0
    assert_same_run(whole, Path("stopped"))


@pytest.mark.usefixtures("pictures")
def test_the_state_within_an_epoch_is_kept_from_time_to_time(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run that is killed loses no more than that time."""
    whole = train("whole", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr("mocapsnet.train.loop.CHECKPOINT_EVERY", 0.0)
        patch.setattr(Trainer, "_step", at_step(6, stop_at_once))  # nothing is kept then
        code, _, errors = command("train", *TINY, "--out", "killed", "--epochs", "2")
    assert code == 130 and "stopped in epoch 2; continue with" in errors
    names = {path.name for path in Path("killed/checkpoints").iterdir()}
    assert names == {"epoch-0001", "epoch-0001-steps-000002"}
    code, output, _ = command("train", "--resume", "killed")
    assert code == 0 and "in epoch 2, after 2 steps of it" in output
    assert_same_run(whole, Path("killed"))
    assert len(list(Path("killed/checkpoints").iterdir())) == 1


@pytest.mark.usefixtures("pictures")
def test_a_run_made_shorter_ends_without_the_epoch_it_had_begun(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", at_step(5, ask_to_stop))
        assert command("train", *TINY, "--out", "stopped", "--epochs", "2")[0] == 130
    code, _, errors = command("train", "--resume", "stopped", "--epochs", "1")
    assert code == 0, errors
    assert json.loads(Path("stopped/result.json").read_text()) == json.loads(
        (whole / "result.json").read_text()
    )
    assert rows(Path("stopped")) == rows(whole)


@pytest.mark.usefixtures("pictures")
def test_a_state_that_is_not_finite_is_not_kept(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mocapsnet.train.loop._finite", lambda _: False)
    monkeypatch.setattr(Trainer, "_step", at_step(2, ask_to_stop))
    code, _, errors = command("train", *TINY, "--out", "run", "--epochs", "1")
    assert code == 130 and "stopped in epoch 1; continue with" in errors
    assert checkpoint(Path("run")).name == "epoch-0000"


@pytest.mark.usefixtures("pictures")
def test_a_state_within_an_epoch_that_is_damaged_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", at_step(2, ask_to_stop))
        assert command("train", *TINY, "--out", "run", "--epochs", "1")[0] == 130
    path = Path("run/checkpoints/epoch-0000-steps-000002/state.json")
    state = json.loads(path.read_text())
    state["position"]["steps"][1].pop()
    path.write_text(json.dumps(state))
    code, _, errors = command("train", "--resume", "run")
    assert code == 2 and f"{path} is damaged" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.usefixtures("pictures")
def test_interrupted_before_the_first_epoch_is_done(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    whole = train("whole", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupt)
        assert command("train", *TINY, "--out", "stopped", "--epochs", "1")[0] == 130
    assert command("train", "--resume", "stopped")[0] == 0
    assert_same_run(whole, Path("stopped"))


def test_one_and_one_epochs_are_two(train: Train, command: Command) -> None:
    """A run that is finished can be made longer; its metrics are continued."""
    whole, parts = train("whole", "--epochs", "2"), train("parts", "--epochs", "1")
    code, _, errors = command("train", "--resume", "parts", "--epochs", "2")
    assert code == 0, errors
    assert_same_run(whole, parts)
    config = json.loads((parts / "config.json").read_text())
    assert config["options"]["optim"]["epochs"] == 2 and len(config["commands"]) == 2


def test_resume_keeps_the_options_of_the_run(train: Train, command: Command) -> None:
    train("adam", "--epochs", "1", "--lr", "0.002")
    code, _, errors = command("train", "--resume", "adam", "--lr", "0.1")
    assert code == 2 and "--lr 0.1 does not go with --resume: the run has 0.002" in errors
    train("ranger", "--epochs", "1", "--optimizer", "ranger21")
    code, _, errors = command("train", "--resume", "ranger", "--epochs", "2")
    assert code == 2 and "ranger21 plans its learning rate" in errors


def test_metrics_have_no_duplicate_or_torn_line_after_a_kill(
    train: Train, command: Command
) -> None:
    """A kill between an epoch's line and its checkpoint leaves a line too many, perhaps torn."""
    whole, killed = train("whole", "--epochs", "3"), train("killed", "--epochs", "1")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text(lines[0] + lines[1] + lines[2][:40])
    (killed / "checkpoints" / "epoch-0002.tmp").mkdir()
    assert command("train", "--resume", "killed", "--epochs", "3")[0] == 0
    assert_same_run(whole, killed)


def test_a_damaged_line_of_the_metrics_is_set_aside(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mocapsnet.train.pictures.inside.write", lambda *_: iter(()))  # long
    run = train("run", "--epochs", "3")
    path = run / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    damaged = second[:40] + b"\xff\n"
    path.write_bytes(first + damaged + b'{"epoch": 7}\n' + third)
    said = f"mocapsnet: warning: {path}: lines 2, 3 cannot be read"
    code, _, errors = command("visualize", "run", "--device", "cpu")
    assert code == 0 and errors == said + "\n"
    code, _, errors = command("train", "--resume", "run", "--epochs", "4")
    assert code == 0 and errors == f"{said}; moved to {run}/metrics.damaged\n"
    assert (run / "metrics.damaged").read_bytes() == damaged + b'{"epoch": 7}\n'
    assert path.read_bytes().startswith(first + third)
    assert [row["epoch"] for row in rows(run)] == [1, 3, 4]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed(sent: signal.Signals, train: Train, command: Command) -> None:
    options = ["--out", "killed", "--epochs", "400"]
    child = subprocess.Popen(
        process("train", *TINY, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    first = Path("killed/checkpoints/epoch-0003")
    deadline = time.monotonic() + 120
    while not first.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    if sent == signal.SIGTERM:
        assert child.returncode == 130
        assert b"continue with: mocapsnet train --resume killed" in errors
    else:
        assert child.returncode == -signal.SIGKILL
    whole_ones = [p for p in Path("killed/checkpoints").glob("epoch-*") if p.suffix != ".tmp"]
    done = int(max(whole_ones).name[6:10])
    assert 3 <= done < 400
    code, _, errors = command("train", "--resume", "killed", "--epochs", str(done + 1))
    assert code == 0, errors
    assert [row["epoch"] for row in rows(Path("killed"))] == list(range(1, done + 2))
    whole = train("whole", "--epochs", str(done + 1))
    assert_same_run(whole, Path("killed"))


def test_evaluate_gives_the_reported_accuracy(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "2")
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    last = rows(run)[-1]
    assert f"test accuracy {last['test_accuracy']:.2%}" in output
    assert f"loss {last['test_loss']:.4f} (margin {last['test_margin']:.4f}" in output
    assert output.split("accuracy by class: ")[1].splitlines()[0].count("%") == 10


def test_accuracy_by_class() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [1, 1, 0]])
    tested = Evaluation(0.0, 0.0, 0.0, confusion)
    assert list(tested.by_class().items()) == [(2, 0.0), (0, 0.75)]


@pytest.mark.usefixtures("pictures")
def test_visualize_draws_the_pictures_again_and_more(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    drawn = {name: (run / name).read_bytes() for name in PICTURES}
    for name in PICTURES:
        (run / name).unlink()
    options = ["--device", "cpu", "--image", "47", "--bundles"]
    code, said, errors = command("visualize", "run", *options)
    assert code == 0, errors
    assert "bundles.png shows epoch 1 alone" in said
    assert {name: (run / name).read_bytes() for name in PICTURES} == drawn
    for name in INSIDE:
        assert f"run/{name}\n" in said and (run / name).read_bytes().startswith(b"\x89PNG")
    for wrong, why in [("48", "48 test images, 0 to 47"), ("gone.png", "gone.png: does not exist")]:
        code, _, errors = command("visualize", "run", "--device", "cpu", "--image", wrong)
        assert code == 2 and why in errors


# 33 images in batches of 16: the last batch has one image for two or more shares, so all but one
# are empty. With a learning rate that does not move the weights, Adam's first moment is a fixed
# combination of the three batches' gradients.
SPLIT = ["--limit", "33", "--epochs", "1", "--lr", "1e-12"]


def assert_same_gradients(a: Path, b: Path) -> None:
    """Equal but for the order of float32 sums.

    A gradient entry is a sum over 16 images of sums over at most 4,096 routed or decoded values;
    another order changes it by about sqrt(16 * 4096) = 256 roundings of 6e-8 of its size. Sizes
    are bounded by the largest entry of the tensor. Wrong weights are off by a factor.
    """
    for one, other in zip(
        optimizer_state(a)["state"].values(), optimizer_state(b)["state"].values(), strict=True
    ):
        assert one["step"] == other["step"] == 3
        scale = one["exp_avg"].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            one["exp_avg"], other["exp_avg"], rtol=0, atol=256 * 2**-24 * scale
        )
    (first,), (second,) = rows(a), rows(b)
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=256 * 2**-24), name


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation_changes_nothing(parts: int, train: Train) -> None:
    plain = train("plain", *SPLIT)
    accumulated = train("accumulated", *SPLIT, "--gradient-accumulation", str(parts))
    assert_same_gradients(plain, accumulated)


def test_two_processes_give_the_result_of_one(train: Train, command: Command) -> None:
    """By torchrun, over gloo, with two micro-batches each; then one process goes on."""
    alone = train("alone", *SPLIT)
    done = run_process(
        "train", *TINY, *SPLIT, "--gradient-accumulation", "2", "--out", "both", processes=2
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout and done.stdout.count("epoch 1/1") == 1
    assert_same_gradients(alone, Path("both"))
    code, output, errors = command("evaluate", "both", "--device", "cpu")
    assert code == 0, errors
    assert f"test accuracy {rows(alone)[0]['test_accuracy']:.2%}" in output
    code, _, errors = command("train", "--resume", "both", "--epochs", "2")
    assert code == 0, errors


def test_all_processes_are_told_what_cannot_be_read() -> None:
    done = run_two("train", *TINY, "--dataset", "folder", "--data-dir", "nowhere", "--out", "run")
    assert done.returncode == 2
    assert "--data-dir nowhere is not a folder" in done.stderr
    assert "Traceback" not in done.stderr and not Path("run").exists()


def test_two_processes_resume_bit_for_bit() -> None:
    shared = [*TINY, "--limit", "33", "--gradient-accumulation", "2"]
    for arguments in (
        [*shared, "--out", "whole", "--epochs", "2"],
        [*shared, "--out", "parts", "--epochs", "1"],
        ["--resume", "parts", "--epochs", "2"],
    ):
        done = run_two("train", *arguments)
        assert done.returncode == 0, done.stderr
    assert_same_run(Path("whole"), Path("parts"))


def test_loss_that_is_not_finite(command: Command) -> None:
    """A huge learning rate: the first step's loss is finite, its update is not."""
    arguments = [*TINY, "--epochs", "2", "--lr", "1e30", "--out", "run"]
    code, _, errors = command("train", *arguments)
    assert code == 1
    assert "the loss is not finite at step 2 (epoch 1): total " in errors
    assert "margin" in errors and "last good checkpoint: run/checkpoints/epoch-0000" in errors
    good = weights(Path("run"))
    assert all(w.isfinite().all() for w in good.values())
    assert rows(Path("run")) == []


def test_weights_that_are_not_finite_are_not_saved(command: Command) -> None:
    """One step per epoch: its loss is finite, and no other step follows to show the damage."""
    arguments = [*TINY, "--batch-size", "48", "--epochs", "1", "--lr", "3e37", "--out", "run"]
    code, _, errors = command("train", *arguments)
    assert code == 1
    assert "after step 1 (epoch 1)" in errors and "run/checkpoints/epoch-0000" in errors
    assert checkpoint(Path("run")).name == "epoch-0000"
    assert rows(Path("run")) == []


def test_first_bad_step_is_named_when_looked_at_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU twenty steps are checked at once."""
    from mocapsnet.train.errors import Diverged

    sums = torch.ones(20, 4)
    sums[7, 0], sums[7, 2], sums[9] = torch.inf, torch.inf, torch.nan
    with pytest.raises(Diverged, match=r"step 48 \(epoch 3\): total inf, margin 1.0, .*; last"):
        Trainer._stop_if_not_finite(None, sums, 40, 2, "last")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["truncated", "other model", "optimizer", "missing", "config"])
def test_damaged_runs_are_one_clear_error(damage: str, train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    saved = checkpoint(run)
    path = saved / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
        expected = f"{path} is missing or damaged"
    elif damage == "other model":
        content = load_file(path)
        name = sorted(content)[0]
        save_file(content | {name: torch.zeros(3)}, path)
        expected = f"{path} belongs to another model: {name} is (3,)"
    elif damage == "optimizer":
        (saved / "optimizer.safetensors").write_bytes(b"nothing")
        expected = f"{saved}/optimizer.safetensors is missing or damaged"
    elif damage == "missing":
        saved.rename(saved.with_suffix(".tmp"))
        expected = "holds no checkpoint"
    else:
        (run / "config.json").write_text("{")
        expected = "config.json is damaged"
    before = (run / "metrics.jsonl").read_bytes()
    commands = [("train", "--resume", "run", "--epochs", "2")]
    if damage != "optimizer":
        commands.append(("evaluate", "run"))
    for arguments in commands:
        code, _, errors = command(*arguments)
        assert code == 2
        assert errors.count("mocapsnet: ") == 1 and expected in errors
        assert "Traceback" not in errors
    assert (run / "metrics.jsonl").read_bytes() == before


# The second process is told to stop, alone, while both test their first epoch.
TOLD_WHILE_TESTING = """
import signal
from mocapsnet.train import loop
test = loop.evaluate
def evaluate(*arguments):
    found = test(*arguments)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return found
loop.evaluate = evaluate
"""


def test_two_processes_stop_together_if_one_is_told_while_they_test() -> None:
    words = ["train", *TINY, "--epochs", "2", "--out"]
    assert run_two(*words, "whole").returncode == 0
    done = run_two(*words, "run", setup=TOLD_WHILE_TESTING)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("stopped in epoch 1 after 3 of 3 steps; continue with") == 1
    done = run_two("train", "--resume", "run")
    assert done.returncode == 0 and "in epoch 1, after 3 steps of it" in done.stdout, done.stderr
    assert_same_run(Path("whole"), Path("run"))


def test_all_processes_are_told_what_fails_in_one() -> None:
    """Memory that is free on the device of one of them, or images that only one can see."""
    for function, said in (
        ("memory.free_bytes = lambda _: 0", "this training needs at least"),
        ("data.load = lambda *_, **__: (_ for _ in ()).throw(OSError('gone'))", "gone"),
    ):
        setup = f"""
from mocapsnet.train import data, memory
if os.environ["RANK"] == "1":
    {function}
"""
        done = run_two("train", *TINY, "--epochs", "1", "--out", "run", setup=setup)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count(said) == 1 and not Path("run").exists()
