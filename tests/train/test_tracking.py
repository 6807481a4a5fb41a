"""What trackers are given: TensorBoard's files are read back, another tracker is made up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker

from mocapsnet import MoCapsNet
from mocapsnet.train import tracking
from mocapsnet.train.data import ImageSet
from mocapsnet.train.errors import InputError

from .helpers import TINY, assert_same_run, rows

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def test_tensorboard_has_the_numbers_of_every_epoch_once(train: Train, command: Command) -> None:
    """The epoch that was lost with its checkpoint is written again, and seen once."""
    from PIL import Image

    run = train("run", "--epochs", "1", "--validation-share", "0.25")
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    found = events(run)
    written = rows(run)
    for name in ("train_loss", "validation_accuracy", "lr"):
        values = found.Scalars(name.replace("_", "/", 1))
        assert [value.step for value in values] == [1, 2]
        for value, row in zip(values, written, strict=True):
            assert value.value == pytest.approx(row[name], rel=1e-6)
    assert [value.step for value in found.Scalars("test/accuracy")] == [1, 2]  # two ends
    shown = found.Images("reconstructions")
    assert [image.step for image in shown] == [1, 2]
    # 12 validation images, 8 in a row: pairs of 64 x 136, 4 apart.
    assert (shown[0].width, shown[0].height) == (8 * (17 * 8 + 4) + 4, 2 * (64 + 4) + 4)
    import io

    assert Image.open(io.BytesIO(shown[0].encoded_image_string)).mode == "RGB"


def test_the_grid_shows_images_beside_reconstructions() -> None:
    torch.manual_seed(0)
    model = MoCapsNet((1, 8, 8), 3, channels=16, kernel_size=3, stride=1, capsules=4, decoder=(8,))
    images = ImageSet(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([0, 1]))
    grid = tracking.reconstruction_grid(model.train(), images)
    assert grid.dtype == torch.uint8 and grid.shape == (72, 2 * 140 + 4, 3)
    assert (grid[4:68, 4:68] == 255).all(), "the image"
    drawn = grid[4:68, 76:140].float() / 255  # after the white line
    expected = model.eval()(model.preprocessing(torch.ones(1, 1, 8, 8))).reconstruction[0, 0]
    torch.testing.assert_close(drawn[::8, ::8, 0], expected, rtol=0, atol=0.6 / 255)


class Notes(GeneralTracker):
    """A tracker that remembers what it was given."""

    name = "notes"
    requires_logging_directory = False
    made: list[Notes] = []
    broken = False
    silent_from: int | None = None

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name, self.finished = run_name, False
        self.options: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.made.append(self)

    @property
    def tracker(self) -> Notes:
        return self

    def start(self) -> None:
        if self.broken:
            raise RuntimeError("no account\nlog in first")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.silent_from is not None and (step or 0) >= self.silent_from:
            raise RuntimeError("server\nunreachable")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Notes]]:
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    Notes.made.clear()
    yield Notes.made


def test_another_tracker_gets_options_and_numbers_and_tensorboard_nothing(
    notes: list[Notes], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it would fail
    run = train("run", "--epochs", "2", "--track", "notes")
    (made,) = notes
    assert made.run_name == "mocapsnet" and made.finished
    assert made.options["optim.epochs"] == 2 and made.options["model.decoder"] == "(16,)"
    assert [step for step, _ in made.rows] == [1, 2]
    assert made.rows[1][1]["test/accuracy"] == rows(run)[1]["test_accuracy"]
    assert not (run / "tensorboard").exists()


def test_nothing_is_tracked_if_nothing_is_named(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = train("run", "--epochs", "1", "--track")
    assert not (run / "tensorboard").exists() and len(rows(run)) == 1


def test_a_tracker_that_does_not_start(
    notes: list[Notes], train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Notes, "broken", True)
        code, _, errors = command("train", *TINY, "--track", "notes", "--out", "run")
    assert code == 2 and errors.count("\n") == 1
    assert "--track notes does not start: RuntimeError: no account log in first" in errors
    train("run", "--epochs", "1")  # it left nothing behind that would be in the way


def test_a_tracker_that_fails_later_costs_no_epoch(
    notes: list[Notes], train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", "--epochs", "3")
    monkeypatch.setattr(Notes, "silent_from", 2)
    code, _, errors = command("train", *TINY, "--track", "notes", "--epochs", "3", "--out", "run")
    assert code == 0
    said = "mocapsnet: warning: a tracker did not take epoch {}: RuntimeError: server unreachable\n"
    assert errors == said.format(2) + said.format(3)
    assert [step for step, _ in notes[0].rows] == [1]
    assert_same_run(Path("run"), whole)


def test_unknown_trackers_and_missing_packages(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, errors = command("train", "--track", "tensorboard", "paper", "--out", "run")
    assert code == 2 and errors.count("\n") == 1
    assert "--track paper: Accelerate knows no such tracker; choose among aim, clearml, " in errors
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: [])
    code, _, errors = command("train", "--track", "wandb", "--out", "run")
    assert code == 2 and "--track wandb: it is not installed: pip install wandb\n" in errors
    assert not Path("run").exists()
    with pytest.raises(InputError, match="tensorboard: it is not installed"):
        tracking.check(["tensorboard"])
