"""The end of a run: which network it has kept, and how well that does on the test images."""

from __future__ import annotations

import json
from pathlib import Path

from mocapsnet.train.best import Best
from mocapsnet.train.data import ImageSet
from mocapsnet.train.evaluation import Evaluation
from mocapsnet.train.files import write_whole

NAME = "result.json"


def write(
    run: Path,
    epoch: int,
    epochs_done: int,
    stopped_early: bool,
    best: Best | None,
    tested: Evaluation,
    images: ImageSet,
) -> None:
    """Write RUN/result.json at the end of a training.

    Args:
        epoch: of the network that is kept.
        epochs_done: of the last epoch.
    """
    result = {
        "epoch": epoch,
        "epochs_done": epochs_done,
        "stopped_early": stopped_early,
        "best_epoch": best and best.epoch,
        "best_validation_accuracy": best and best.accuracy,
        **tested.row("test"),
        "test_images": tested.images,
        "test_accuracy_by_class": {images.name(c): a for c, a in sorted(tested.by_class().items())},
    }
    write_whole(run / NAME, json.dumps(result, indent=2) + "\n")


def test_accuracy(run: Path) -> float | None:
    """Of the network that a run has kept; None if the run has not ended, or says it otherwise."""
    return _number(run, "test_accuracy")


def epochs_done(run: Path) -> float | None:
    """Those that a run had done when it last ended; None if it never has."""
    return _number(run, "epochs_done")


def _number(run: Path, name: str) -> float | None:
    try:
        return float(json.loads((run / NAME).read_bytes())[name])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def sentence(tested: Evaluation, kept: int, best: Best | None, keep: str) -> str:
    """One line about the network that a run has kept."""
    text = (
        f"test accuracy {tested.accuracy:.2%} ({tested.correct:,} of {tested.images:,}) of the "
        f"network after epoch {kept}"
    )
    if best is None:
        return text
    if keep == "best":
        return f"{text}, the best by validation accuracy ({best.accuracy:.2%})"
    return f"{text}, the last; validation accuracy was best with {best}"
