"""The picture of an experiment: accuracy against blocks, or one line for every row of the table."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.table import Cell, heading, layout

COLOURS = ["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"]

Series = dict[str, list[Cell]]


def draw(record: Record, found: Sequence[Cell]) -> bytes:
    """The figure as a PNG."""
    drawn = figure(record, found)
    FigureCanvasAgg(drawn)
    out = io.BytesIO()
    drawn.savefig(out, dpi=120, format="png")
    return out.getvalue()


def figure(record: Record, found: Sequence[Cell]) -> Figure:
    """Ours filled with deviations, the paper's hollow, a panel for every data set."""
    rows, columns = layout(record, found)
    panels: dict[str, Series] = {}
    for cell in found:
        label = ", ".join(heading(cell.keys[name]) for name in columns if name != "dataset")
        panel = heading(cell.keys["dataset"])
        panels.setdefault(panel, {}).setdefault(label or "this library", []).append(cell)
    against_blocks = rows == ["blocks"] and len({cell.keys["blocks"] for cell in found}) > 1
    height = 4.2 if against_blocks else 1.8 + 0.34 * max(map(_height, panels.values()))
    drawn = Figure(figsize=(1.0 + 5.6 * len(panels), height), layout="constrained")
    for axes, (name, series) in zip(
        drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        (_lines if against_blocks else _dots)(axes, series, rows)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axes in drawn.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, 2 * len(panels)),
        frameon=False,
    )
    done = sum(len(cell.accuracies) for cell in found)
    holes = sum(len(cell.holes) for cell in found)
    unfinished = f"\n{done} of {done + holes} runs finished" if holes else ""
    drawn.suptitle(record.configuration.title + unfinished, size=11)
    return drawn


def _height(series: Series) -> int:
    return max(map(len, series.values()))


def _lines(axes: Axes, series: Series, rows: list[str]) -> None:
    """Accuracy against blocks."""
    blocks = sorted({cell.keys["blocks"] for cells in series.values() for cell in cells})
    for i, (label, cells) in enumerate(series.items()):
        shift = 0.06 * (i - (len(series) - 1) / 2)
        theirs = [c for c in cells if c.paper is not None]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "capsize": 3, "ms": 6}
        axes.errorbar(
            [c.keys["blocks"] + shift for c in cells],
            [math.nan if c.mean is None else c.mean for c in cells],  # a hole breaks the line
            [c.deviation or 0.0 for c in cells],
            fmt="o-",
            label=label,
            **style,
        )
        if theirs:
            axes.errorbar(
                [c.keys["blocks"] + shift for c in theirs],
                [c.paper.accuracy for c in theirs if c.paper],
                [c.paper.deviation or 0.0 for c in theirs if c.paper],
                fmt="s:",
                mfc="white",
                alpha=0.7,
                label=f"{label}, the paper",
                **style,
            )
    axes.set(xlabel="blocks of two capsule layers", ylabel="test accuracy in %")
    axes.set_xlim(blocks[0] - 0.5, blocks[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dots(axes: Axes, series: Series, rows: list[str]) -> None:
    """A line for every row of the table, the first on top."""
    names: list[str] = []
    for cells in series.values():
        names += [n for n in (_row(cell, rows) for cell in cells) if n not in names]
    for i, (label, cells) in enumerate(series.items()):
        shift = 0.16 * (i - (len(series) - 1) / 2)
        colour = COLOURS[i % len(COLOURS)]
        ours = [c for c in cells if c.mean is not None]
        theirs = [c for c in cells if c.paper is not None]
        axes.errorbar(
            [c.mean or 0.0 for c in ours],
            [names.index(_row(c, rows)) + shift for c in ours],
            xerr=[c.deviation or 0.0 for c in ours],
            fmt="o",
            color=colour,
            capsize=3,
            label=label,
        )
        if theirs:
            axes.errorbar(
                [c.paper.accuracy for c in theirs if c.paper],
                [names.index(_row(c, rows)) + shift for c in theirs],
                xerr=[c.paper.deviation or 0.0 for c in theirs if c.paper],
                fmt="s",
                mfc="white",
                color=colour,
                alpha=0.7,
                label=f"{label}, the paper",
            )
    axes.set(xlabel="test accuracy in %")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _row(cell: Cell, rows: list[str]) -> str:
    return ", ".join(
        heading(cell.keys[name])
        if isinstance(cell.keys[name], str)
        else f"{name.replace('_', ' ')} {heading(cell.keys[name])}"
        for name in rows
    )
