"""What a command prints while it works; only the main process calls these functions."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from mocapsnet import CapsNet
from mocapsnet.train.metrics import Row, judged_by
from mocapsnet.train.options import TrainOptions

# Seconds between two lines where the output is no terminal, and a bar would fill a log.
LINE_EVERY = 30.0


COMPILING = (
    "\nthe first step compiles the GPU kernels, unless they are in Triton's cache from before"
)


class Clock:
    """Tells how long a run will still take, from how long its epochs took, tests included."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._images = 0

    def start(self) -> None:
        """Begin, if it has not begun."""
        if self._started is None:
            self._started = time.monotonic()

    def add(self, images: int) -> None:
        """So many more images are trained with."""
        self._images += images

    def left(self, images: int) -> str:
        """The time that so many images will take, as 1:02:03; "?" before the first ones."""
        if self._started is None or not self._images:
            return "?"
        seconds = (time.monotonic() - self._started) / self._images * images
        return str(tqdm.format_interval(seconds))


class Progress:
    """A pass over images: a bar on a terminal, else a line every half minute.

    Args:
        text: what is done, "epoch 2/30".
        total: the images of it.
        shown: False for all but one process.
        before: images that were done earlier.
    """

    def __init__(self, text: str, total: int, shown: bool, before: int = 0) -> None:
        # disable=None: no bar where the output is not a terminal.
        self._bar = tqdm(
            total=total,
            initial=before,
            desc=text,
            unit=" images",
            leave=False,
            disable=None if shown else True,
        )
        self._text, self._total, self._before, self._done = text, total, before, before
        self._lines = shown and self._bar.disable
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, images: int, facts: str = "") -> None:
        """So many more images are done; `facts` stand behind the numbers."""
        self._done += images
        self._bar.set_postfix_str(facts, refresh=False)
        self._bar.update(images)
        now = time.monotonic()
        if self._lines and now - self._printed >= LINE_EVERY:
            self._printed = now
            print(
                f"{self._text}: {self._done:,} of {self._total:,} images, "
                f"{(self._done - self._before) / (now - self._started):,.0f} images/s"
                + (f", {facts}" if facts else ""),
                flush=True,
            )


def describe(
    options: TrainOptions,
    model: CapsNet,
    images: dict[str, int],
    accelerator: Accelerator,
    run: Path,
    epochs_done: int,
    steps_done: int,
    eager: str | None,
) -> None:
    """Print what is trained, on what, where it goes, and what the first step waits for.

    Args:
        images: how many there are for "training", "validation" and "test".
        eager: why steps are not a CUDA graph; None if they are.
    """
    parameters = sum(p.numel() for p in model.parameters())
    step = "a step is one CUDA graph" if eager is None else f"no CUDA graph of a step: {eager}"
    counts = [f"{count:,} {name}" for name, count in images.items()]
    place = f"after epoch {epochs_done}"
    if steps_done:
        place = f"in epoch {epochs_done + 1}, after {steps_done:,} steps of it"
    blocks = f"{options.model.blocks} block(s), " if model.has_capsules else ""
    goes_on = epochs_done or steps_done
    print(
        f"{options.model.name}, {blocks}{parameters:,} parameters; {options.data.dataset}, "
        f"{model.config.classes} classes, {', '.join(counts[:-1])} and {counts[-1]} images of "
        f"{'x'.join(map(str, model.config.image_shape))}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}\n"
        + (f"continuing {run} {place}" if goes_on else f"writing to {run}")
        + (f"\n{step}{COMPILING}" if accelerator.device.type == "cuda" else ""),
        flush=True,
    )


def summary(row: Row, epochs: int, left: str) -> str:
    """One line about one epoch; `left` is how long the others will take."""
    split = judged_by(row)
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:7.2%}  "
        f"{split} loss {row[f'{split}_loss']:.4f}, accuracy {row[f'{split}_accuracy']:7.2%}  "
        f"{row['train_images_per_second']:,.0f} images/s"
        + (f"  {left} left" if row["epoch"] < epochs else "")
    )


def list_folder(run: Path) -> None:
    """Print what a finished run wrote."""
    print(f"{run} holds:")
    meaning = {
        "config.json": "options, versions, command lines",
        "metrics.jsonl": "the numbers of each epoch",
        "start.json": "capsule lengths and gradients by layer before the first step, first losses",
        "tensorboard": "the same, for TensorBoard",
        "bundles.jsonl": "conflicting bundles of each epoch, see visualize --bundles",
        "model": "the trained network, for mocapsnet.load and mocapsnet predict",
        "result.json": "which epoch's network was kept, and its test",
        "checkpoints": "the state after the last epoch, and what is kept beside it",
        "learning_curves.png": "loss and accuracy over the epochs",
        "reconstructions.png": "test images beside their reconstructions",
        "confusion_matrix.png": "true against predicted classes",
        "worst_images.png": "test images with the largest loss",
    }
    for name, text in meaning.items():
        if (run / name).exists():
            print(f"  {name:<22}{text}")
