"""Many small pictures as one: pasted into a white sheet, much faster than axes of their own."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

TITLE, TEXT, SMALL = 13, 10, 8
"""Sizes of letters: of a picture's title, of the line below it that says how to read it, and of
labels."""


def paste(cells: Tensor, gap: int = 1) -> Tensor:
    """Cells [rows, columns, h, w, 3] as one picture [rows (h + gap) - gap, ..., 3]."""
    rows, columns, h, w, _ = cells.shape
    sheet = cells.new_ones(rows, h + gap, columns, w + gap, 3)
    sheet[:, :h, :, :w] = cells.permute(0, 2, 1, 3, 4)
    return sheet.flatten(2, 3).flatten(0, 1)[: rows * (h + gap) - gap, : columns * (w + gap) - gap]


def centres(count: int, size: int, gap: int = 1) -> list[float]:
    """Where the middles of so many cells lie along a side of what `paste` made."""
    return [i * (size + gap) + (size - 1) / 2 for i in range(count)]


def rgb(pixels: Tensor) -> Tensor:
    """Pixels [..., C, H, W] of any number of channels as [..., H, W, 3], clamped to [0, 1]."""
    C = pixels.shape[-3]
    coloured = pixels if C == 3 else pixels[..., :1, :, :].expand(*pixels.shape[:-3], 3, -1, -1)
    return coloured.clamp(0, 1).movedim(-3, -1).cpu()


def heading(figure: Figure, title: str, *reading: str) -> None:
    """What one sees, in one bold line, and below it how to read it. Class names are no formulas."""
    width, height = figure.get_size_inches()
    top = 0.08  # inches
    parts = [(title, TITLE, "bold"), *((line, TEXT, "normal") for line in reading)]
    for text, size, weight in parts:
        for line in textwrap.wrap(text, int(width * 72 / (0.6 * size))):
            shown = figure.text(0.5, 1 - top / height, line, size=size, weight=weight)
            shown.set(ha="center", va="top", parse_math=False)
            top += 1.5 * size / 72
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, 1 - (top + 0.05) / height), h_pad=0.08)  # type: ignore[call-arg]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG; returns its path. Labels that stand out of the figure too."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)
    return path


def some(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly, the first and the last among them."""
    most = min(most, count)
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})
