"""Where the numbers of a run go besides its metrics.jsonl: the trackers that Accelerate knows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, broadcast_object_list

from mocapsnet import CapsNet
from mocapsnet.train import data
from mocapsnet.train.errors import InputError
from mocapsnet.train.metrics import Row
from mocapsnet.train.option_values import flat
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.pictures.pairs import side_by_side
from mocapsnet.train.run_folder import TENSORBOARD

PROJECT = "mocapsnet"

# Images of the grid of reconstructions, the pairs in a row of it, and how high one is at least.
SHOWN, COLUMNS, HEIGHT = 32, 8, 64


def check(names: Sequence[str]) -> None:
    """Raises: InputError if Accelerate does not know a tracker, or its package is not there."""
    from accelerate import tracking

    known = tracking.LOGGER_TYPE_TO_CLASS
    for name in names:
        if name not in known:
            raise InputError(
                f"--track {name}: Accelerate knows no such tracker; choose among "
                f"{', '.join(sorted(map(str, known)))}, or give --track alone for none"
            )
        own = name in LoggerType.list()
        if own and LoggerType(name) not in tracking.get_available_trackers():
            raise InputError(f"--track {name}: it is not installed: pip install {name}")


def start(accelerator: Accelerator, run: Path, options: TrainOptions, epochs_done: int) -> None:
    """Start the trackers asked for, in the main process. Collective.

    TensorBoard's files go to RUN/tensorboard, cut back to the checkpoint that a run goes on from;
    the others get a new run of the project "mocapsnet", with the options.

    Raises: InputError if one does not start, as without an account or a network.
    """
    names = sorted(set(options.watch.track), key=lambda name: name == TENSORBOARD)
    problem = [""]
    if names and accelerator.is_main_process:
        try:
            accelerator.log_with = [_tracker(name, run, epochs_done) for name in names]
            accelerator.init_trackers(PROJECT)
            for tracker in accelerator.trackers:
                if tracker.name != TENSORBOARD:  # there it would be another run
                    tracker.store_init_configuration(_plain(options))
        except Exception as error:  # noqa: BLE001 - what other packages raise
            problem[0] = f"--track {' '.join(names)} does not start: {_said(error)}"
    broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])


def _tracker(name: str, run: Path, epochs_done: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == TENSORBOARD:
        return kind(TENSORBOARD, run, purge_step=epochs_done + 1 if epochs_done else None)
    if kind.requires_logging_directory:
        return kind(PROJECT, run)
    return kind(PROJECT)


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The options as trackers take them: numbers and text."""
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in flat(options).items()
    }


def log(accelerator: Accelerator, row: Row, epoch: int) -> None:
    """Track the numbers of an epoch: "train_loss" as "train/loss"."""
    values = {
        name.replace("_", "/", 1): value
        for name, value in row.items()
        if name not in ("epoch", "step")
    }
    with _going_on(f"epoch {epoch}"):
        accelerator.log(values, step=epoch)


def log_reconstructions(
    accelerator: Accelerator, model: CapsNet, images: data.ImageSet, epoch: int
) -> None:
    """Show the first images beside their reconstructions, if TensorBoard is tracked."""
    boards = [tracker for tracker in accelerator.trackers if tracker.name == TENSORBOARD]
    if not boards or model.decoder is None:
        return
    grid = reconstruction_grid(model, images).numpy()
    with _going_on(f"the reconstructions of epoch {epoch}"):
        for board in boards:
            board.log_images({"reconstructions": grid[None]}, step=epoch, dataformats="NHWC")
            board.writer.flush()


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """A tracker that fails, as without a network, costs what it was to get, not the training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what other packages raise
        print(
            f"mocapsnet: warning: a tracker did not take {what}: {_said(error)}",
            file=sys.stderr,
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()
def reconstruction_grid(model: CapsNet, images: data.ImageSet) -> torch.Tensor:
    """The first images, each beside its reconstruction, as one picture [H, W, 3] of bytes."""
    from torchvision.utils import make_grid

    was_training = model.training
    model.eval()
    pixels = data.to_pixels(images.first(SHOWN).images)
    pairs = side_by_side(pixels, model(model.preprocessing(pixels)).reconstruction)
    model.train(was_training)
    times = -(-HEIGHT // pairs.shape[2])
    pairs = pairs.repeat_interleave(times, 2).repeat_interleave(times, 3)
    grid = make_grid(pairs[:, :3].float(), nrow=COLUMNS, padding=4, pad_value=1.0)
    return (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


def close(accelerator: Accelerator) -> None:
    """Let every tracker write what it still holds."""
    for tracker in accelerator.trackers:
        with _going_on("its last numbers"):
            tracker.finish()
    accelerator.trackers.clear()
