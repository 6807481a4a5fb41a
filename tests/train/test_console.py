"""What one sees of a run while it works."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mocapsnet import CapsNetConfig, CapsuleLoss, build_model
from mocapsnet.train import console
from mocapsnet.train.data import ImageSet
from mocapsnet.train.evaluation import Evaluation, evaluate
from mocapsnet.train.plots import learning_curves

from .helpers import TINY

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the console sees, to be set."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    return clock


def test_lines_every_half_minute(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("epoch 1/2", 3000, shown=True) as progress:
        for now[0] in (10, 29, 31, 60, 61, 62):
            progress.update(100, f"loss {now[0]}")
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2: 300 of 3,000 images, 10 images/s, loss 31",
        "epoch 1/2: 500 of 3,000 images, 8 images/s, loss 61",
    ]


def test_one_process_tells(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("epoch 1/2", 3000, shown=False) as progress:
        now[0] = 100
        progress.update(100)
    assert capsys.readouterr().out == ""


def test_time_left(now: list[float]) -> None:
    clock = console.Clock()
    assert clock.left(100) == "?"
    now[0] = 1000  # what came before does not count
    clock.start()
    assert clock.left(100) == "?"
    clock.add(50)
    now[0] = 1010
    clock.start()
    assert clock.left(100) == "00:20"
    assert clock.left(50 * 360 * 2) == "2:00:00"


def test_a_run_without_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    code, output, errors = command("train", *TINY, "--epochs", "2", "--out", "run")
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0] == "reading digits"
    step = r"\d of 48 images, [\d,]+ images/s, loss 0\.\d{4}, accuracy [\d.]+%, whole run \d\d:\d\d"
    assert len([line for line in lines if re.match(rf"epoch 1/2: \d?{step} left$", line)]) == 3
    assert len([line for line in lines if re.match(r"testing: \d+ of 48 images, ", line)]) == 6
    assert [line[-5:] == " left" for line in lines if line.startswith("epoch 1/2  ")] == [True]
    assert [line[-5:] == " left" for line in lines if line.startswith("epoch 2/2  ")] == [False]
    assert errors == ""


def test_bars_on_a_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    code, output, errors = command("train", *TINY, "--epochs", "1", "--out", "run")
    assert code == 0
    assert "epoch 1/1: " in errors and "testing: " in errors
    assert "testing: " not in output


@pytest.mark.parametrize("epochs", [1, 2, 7, 30])
def test_epochs_on_axes_are_whole(epochs: int) -> None:
    names = [f"{split}_{n}" for split in ("train", "test") for n in ("accuracy", "margin")]
    names += ["train_reconstruction", "test_reconstruction"]
    rows = [{"epoch": 1 + i} | dict.fromkeys(names, 0.5) for i in range(epochs)]
    for axes in learning_curves(rows).axes:
        ticks = axes.get_xticks()
        assert len(ticks) and (ticks == ticks.round()).all()


def test_more_processes_than_images_to_test_with() -> None:
    model = build_model(
        "capsnet",
        CapsNetConfig((1, 8, 8), 3, channels=8, kernel_size=3, stride=1, capsules=2, decoder=(4,)),
    )
    images = ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    shares: list[tuple[torch.Tensor, ...]] = []

    def tested(process: int, processes: int, together: bool) -> Evaluation:
        def reduce(values: tuple[torch.Tensor, ...], _: str) -> tuple[torch.Tensor, ...]:
            if not together:
                shares.append(values)
                return values
            return tuple(sum(parts) for parts in zip(*shares, strict=True))  # type: ignore[misc]

        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=processes,
            process_index=process,
            is_main_process=process == 0,
            reduce=reduce,
        )
        return evaluate(accelerator, model, CapsuleLoss(), images, 8)  # type: ignore[arg-type]

    for process in range(3):
        tested(process, 3, together=False)
    assert not any(part.any() for part in shares[2])
    found = tested(2, 3, together=True)
    shares.clear()
    alone = tested(0, 1, together=False)
    assert found.images == 2 and torch.equal(found.confusion, alone.confusion)
    assert found.loss == pytest.approx(alone.loss)
