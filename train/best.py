"""The best epoch of a run so far, by validation accuracy: what to keep, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """An epoch, from 1, and the share of the validation images that was right after it."""

    epoch: int
    accuracy: float

    def __str__(self) -> str:
        return f"{self.accuracy:.2%} after epoch {self.epoch}"


def better(best: Best | None, epoch: int, accuracy: float) -> Best:
    """The better of the two; of equal ones the earlier."""
    return Best(epoch, accuracy) if best is None or accuracy > best.accuracy else best


def gave_up(best: Best | None, epochs_done: int, patience: int | None) -> bool:
    """Whether `patience` epochs have not brought a better one."""
    return patience is not None and best is not None and epochs_done - best.epoch >= patience
