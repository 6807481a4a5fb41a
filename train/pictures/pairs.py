"""Images beside their reconstructions, many in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor


def side_by_side(pixels: Tensor, reconstruction: Tensor | None) -> Tensor:
    """Pairs [B, C, H, 2 W + 1] of images and reconstructions [B, C, H, W], a white line between;
    images alone where a network has no decoder."""
    if reconstruction is None:
        return pixels.cpu()
    gap = pixels.new_ones(*pixels.shape[:3], 1)
    return torch.cat([pixels, gap, reconstruction], dim=3).cpu()


def pairs_figure(
    pairs: Tensor,
    captions: Sequence[str],
    wrong: Sequence[bool],
    title: str,
    columns: int = 8,
    inches: float = 1.45,
) -> Figure:
    """Pairs in rows, each under its caption, which is red where it is wrong.

    Args:
        pairs: as of `side_by_side`, pixels in [0, 1].
        captions: of at most three lines, with room for about 16 letters an inch.
        inches: width of a pair.
    """
    B, C, H, width = pairs.shape
    lines = 1 + max(caption.count("\n") for caption in captions)
    # One white picture with the pairs pasted in: much faster than axes of their own for each.
    top, between = max(2, H * (lines + 1) // 6), max(2, H // 4)
    rows = -(-B // columns)
    sheet = torch.ones(rows * (H + top), columns * (width + between) - between, C)
    height = inches * (H + top) / (width + between)
    figure = Figure(figsize=(inches * columns, height * rows + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    for i, (pair, caption, bad) in enumerate(zip(pairs, captions, wrong, strict=True)):
        y, x = i // columns * (H + top) + top, i % columns * (width + between)
        sheet[y : y + H, x : x + width] = pair.permute(1, 2, 0)
        axes.text(
            x + width / 2 - 0.5,
            y - 1,
            caption,
            ha="center",
            va="bottom",
            size=7,
            linespacing=1.1,
            parse_math=False,
            color="tab:red" if bad else "black",
        )
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, size=10)
    return figure
