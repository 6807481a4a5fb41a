"""The record of a run: one JSON line per epoch, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard/, cut back to the checkpoint the run goes on from.

    A line is written before the checkpoint of its epoch. After a kill there may therefore be one
    line more than the checkpoint knows, or a torn one; both are dropped here and written again.
    """

    def __init__(self, run: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        self.rows = [row for row in read_rows(run) if row["epoch"] <= epochs_done]
        partial = self._path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(self._path)
        self._writer = SummaryWriter(
            str(run / "tensorboard"), purge_step=epochs_done + 1 if epochs_done else None
        )

    def append(self, row: Row) -> None:
        """Record one epoch; on disk when this returns."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_rows(run: Path) -> list[Row]:
    """The rows of RUN/metrics.jsonl up to the first line that is not whole."""
    path = run / "metrics.jsonl"
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
