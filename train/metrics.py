"""The record of a run: one JSON line per epoch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mocapsnet.train.files import write_whole

Row = dict[str, Any]

PARTS = ("loss", "margin", "reconstruction", "accuracy")


class MetricsLog:
    """RUN/metrics.jsonl, cut back to the checkpoint the run goes on from.

    A line is written before the checkpoint of its epoch. After a kill there may therefore be one
    line more than the checkpoint knows, or a torn one; both are dropped here and written again.
    Any other line that cannot be read is moved to RUN/metrics.damaged.
    """

    def __init__(self, run: Path, epochs_done: int) -> None:
        self._path = run / "metrics.jsonl"
        rows, damaged = read_rows(run)
        self.rows = [row for row in rows if row["epoch"] <= epochs_done]
        if damaged:
            aside = run / "metrics.damaged"
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged.values())
            print(
                f"mocapsnet: warning: {describe_damage(self._path, damaged)}; moved to {aside}",
                file=sys.stderr,
            )
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: Row) -> None:
        """Record one epoch; on disk when this returns."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Rows(NamedTuple):
    """What RUN/metrics.jsonl holds: the rows, and by their numbers from 1 the damaged lines."""

    rows: list[Row]
    damaged: dict[int, bytes]


def read_rows(run: Path) -> Rows:
    """Read what can be read of RUN/metrics.jsonl; a last line torn by a kill is passed over."""
    path = run / "metrics.jsonl"
    rows: list[Row] = []
    damaged: dict[int, bytes] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines) or line[:1] not in (b"", b"{"):
            damaged[number] = line
    return Rows(rows, damaged)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    splits = ("train", judged_by(row))
    needed = {"epoch", "step", *(f"{split}_{part}" for split in splits for part in PARTS)}
    if not needed <= row.keys():
        return None
    return row if all(type(value) in (int, float) for value in row.values()) else None


def judged_by(row: Row) -> str:
    """The images that an epoch was judged by: "validation" where some are held out, else "test"."""
    return "validation" if "validation_accuracy" in row else "test"


def describe_damage(path: Path, damaged: dict[int, bytes]) -> str:
    """One sentence about lines that could not be read."""
    lines = "line" if len(damaged) == 1 else "lines"
    return f"{path}: {lines} {', '.join(map(str, damaged))} cannot be read"
