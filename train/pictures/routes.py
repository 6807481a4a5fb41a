"""How one image is routed: couplings of every layer and routing iteration, in two pictures."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from mocapsnet import CapsNet, inspect_layers
from mocapsnet.train.pictures.couplings import COLOURS, place_maps
from mocapsnet.train.pictures.sheet import SMALL, TEXT, centres, heading, paste, rgb, some

Names = tuple[str, ...]

ACROSS = 10
"""Tables in a row; of more layers, there are more rows."""
MAPS_ACROSS = 16
CELL = 96
"""Pixels of a side of a table or map, at least."""


EQUAL_FIRST = (
    "Red: it gets more of the vote than an equal share, blue: less.",
    "Routing begins with equal shares (white); every iteration moves them to where the votes "
    "agree.",
)


class Route(NamedTuple):
    """What a network makes of one image.

    pixels [C, H, W] in [0, 1], the lengths of the class capsules [classes], and the couplings
    [iterations, N, J] of every layer. `truth` is the class, if it is known.
    """

    pixels: Tensor
    lengths: Tensor
    couplings: list[Tensor]
    truth: int | None = None


def route(network: CapsNet, pixels: Tensor, truth: int | None = None) -> Route:
    """For pixels [C, H, W] in [0, 1]."""
    records = list(inspect_layers(network, network.preprocessing(pixels[None])).values())
    lengths = torch.linalg.vector_norm(records[-1].v[0], dim=-1)
    couplings = [r.couplings[:, 0].float().cpu() for r in records]
    return Route(pixels, lengths.cpu(), couplings, truth)


def scale(couplings: list[Tensor]) -> Normalize:
    """Of log2(J c), from some power of 1/2 of an equal share to the same power of 2.

    So that of every layer all but a hundredth of its last couplings are within, and 2 at least.
    """
    spread = [(c[-1] * c.shape[-1]).clamp_min(2.0**-9).log2().abs().flatten() for c in couplings]
    most = max(float(s.sort().values[int(0.99 * (len(s) - 1))]) for s in spread)
    limit = min(max(math.ceil(most), 1), 4)
    return Normalize(-limit, limit)


def coloured(c: Tensor, norm: Normalize) -> Tensor:
    """Couplings [..., N, J] as colours [..., N, J, 3]: red above an equal share, blue below."""
    shares = (c * c.shape[-1]).clamp_min(2.0**-20).log2()
    return torch.from_numpy(colormaps[COLOURS](norm(shares.numpy()))[..., :3]).float()


def enlarge(cells: Tensor, side: int = CELL) -> Tensor:
    """Cells [..., h, w, 3] with sides of at least `side` pixels, none of theirs left out."""
    h, w, _ = cells.shape[-3:]
    flat = cells.movedim(-1, -3).flatten(0, -4)
    large = F.interpolate(flat, (max(side, h), max(side, w)), mode="nearest-exact")
    large = F.pad(large, (1, 1, 1, 1), value=0.7)  # a frame, as equal shares are white
    return large.unflatten(0, cells.shape[:-3]).movedim(-3, -1)


def tables_figure(network: CapsNet, seen: Route) -> Figure:
    """Tables, input by output capsules, of all layers behind the first; a row per iteration."""
    *hidden, last = seen.couplings[1:]
    norm = scale(seen.couplings[1:])
    rounds, inputs, outputs = last.shape
    bands = [hidden[n : n + ACROSS] for n in range(0, len(hidden), ACROSS)]
    heights = [1.15 * rounds + 0.4] * len(bands) + [3.2, 0.3]  # inches
    picture = Figure(figsize=(13, sum(heights) + 1.4), layout="constrained")
    grid = picture.add_gridspec(len(heights), 1, height_ratios=heights)
    for n, band in enumerate(bands):
        cells = enlarge(coloured(torch.stack(band, 1), norm))  # [rounds, layers, h, w, 3]
        labels = [f"layer {n * ACROSS + i + 1}" for i in range(len(band))]
        _band(picture.add_subplot(grid[n]), cells, labels, min(len(hidden), ACROSS))
    bottom = grid[-2].subgridspec(1, rounds + 1, width_ratios=[1, *[1.6] * rounds])
    image, *tables = (picture.add_subplot(bottom[n]) for n in range(rounds + 1))
    _image(image, seen, network.class_names)
    _votes(tables, last, norm, seen, network.class_names)
    _bar(picture, picture.add_subplot(grid[-1]), norm)
    heading(
        picture,
        "Which capsule votes for which: the couplings of one image, layer by layer",
        *_hidden_words(hidden),
        f"Bottom: rows are the last {inputs} hidden capsules, columns the {outputs} classes; "
        "framed: the one that the network sees.",
        *EQUAL_FIRST,
    )
    return picture


def _hidden_words(hidden: list[Tensor]) -> list[str]:
    """How to read the tables of the hidden layers, and what they show if they are all white."""
    if not hidden:
        return []
    c = torch.stack([couplings[-1] for couplings in hidden])  # [layers, N, J]
    J = c.shape[-1]
    words = (
        f"Each square: rows are the {J} capsules before one of the {len(hidden)} hidden layers, "
        f"columns the {J} of that layer."
    )
    off = float((c * J - 1).abs().max())
    if off < 0.1:
        words += f" All their shares are within {max(off, 0.001):.1%} of equal ones."
    return [words]


def places_figure(network: CapsNet, seen: Route) -> Figure:
    """For every capsule of the first layer a map over the image; a row per iteration."""
    maps = place_maps(seen.couplings[0], network.config)  # [rounds, H, Wd, J]
    rounds, H, W, J = maps.shape
    norm = scale([maps])
    cells = enlarge(coloured(maps, norm).movedim(3, 1))  # [rounds, J, h, w, 3]
    bands = cells.split(MAPS_ACROSS, 1)
    across = min(J, MAPS_ACROSS)
    heights = [0.8 * rounds * H / W + 0.4] * len(bands) + [0.3]
    picture = Figure(
        figsize=(max(0.8 * across + 2.6, 11), max(sum(heights), 2.5) + 1.4), layout="constrained"
    )
    grid = picture.add_gridspec(
        len(heights), 2, height_ratios=heights, width_ratios=[1.8, 0.8 * across + 0.6]
    )
    _image(picture.add_subplot(grid[:-1, 0]), seen, network.class_names)
    for n, band in enumerate(bands):
        labels = [f"capsule {n * MAPS_ACROSS + j + 1}" for j in range(band.shape[1])]
        _band(picture.add_subplot(grid[n, 1]), band, labels, across)
    _bar(picture, picture.add_subplot(grid[-1, :]), norm)
    heading(
        picture,
        "Which place of the image votes for which capsule of the first layer",
        f"Each map lies over the image and belongs to one of the layer's {J} capsules.",
        *EQUAL_FIRST,
    )
    return picture


def _band(axes: Axes, cells: Tensor, labels: list[str], across: int) -> None:
    """Cells [rounds, columns, h, w, 3], the columns labelled above, the rows at the left."""
    rounds, columns, h, w, _ = cells.shape
    blank = cells.new_ones(rounds, across - columns, h, w, 3)
    gap = 8
    axes.imshow(paste(torch.cat([cells, blank], 1), gap).numpy())
    axes.set_xticks(centres(columns, w, gap), labels, size=SMALL)
    names = [f"iteration {r + 1}" for r in range(rounds)]
    axes.set_yticks(centres(rounds, h, gap), names, size=SMALL)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


def _image(axes: Axes, seen: Route, names: Names) -> None:
    axes.imshow(rgb(seen.pixels).numpy(), interpolation="nearest")
    axes.axis("off")
    best = int(seen.lengths.argmax())
    said = f"the network sees: {names[best]}\n(length {float(seen.lengths[best]):.2f})"
    wrong = seen.truth not in (None, best)
    if wrong:
        said += f"\nit is: {names[seen.truth or 0]}"
    axes.set_title(said, size=TEXT, parse_math=False, color="tab:red" if wrong else "black")


def _votes(tables: list[Axes], c: Tensor, norm: Normalize, seen: Route, names: Names) -> None:
    """The votes for the classes, couplings [iterations, N, J]: a table for each iteration."""
    _, N, J = c.shape
    best = int(seen.lengths.argmax())
    marked = {best} if seen.truth is None else {best, seen.truth}
    few = [j for j in some(J, 10) if min(abs(j - m) for m in marked) > J / 30]
    shown = [*range(J)] if J <= 20 else sorted({*marked, *few})
    upright = max(len(names[j]) for j in shown) <= 2
    for r, axes in enumerate(tables):
        axes.imshow(coloured(c[r], norm).numpy(), aspect="auto", interpolation="nearest")
        frame = Rectangle((best - 0.5, -0.5), 1, N, fill=False, edgecolor="tab:orange", lw=1.5)
        frame.set_clip_on(False)
        axes.add_patch(frame)
        axes.set_title(f"for the classes, iteration {r + 1}", size=SMALL + 1)
        axes.set_xticks(
            shown,
            [names[j] for j in shown],
            size=SMALL,
            parse_math=False,
            rotation=0 if upright else 90,
        )
        rows = some(N, 5) if r == 0 else []
        axes.set_yticks(rows, [str(n + 1) for n in rows], size=SMALL)
    tables[0].set_ylabel("hidden capsule", size=SMALL)


def _bar(picture: Figure, axes: Axes, norm: Normalize) -> None:
    """What the colours mean."""
    limit = int(norm.vmax or 1)
    ticks = range(-limit, limit + 1)
    names = {-1: "half", 0: "an equal share", 1: "twice"}
    more = {-limit: " or less", limit: " or more"}  # colours end there
    bar = picture.colorbar(ScalarMappable(norm, COLOURS), cax=axes, orientation="horizontal")
    bar.set_ticks(
        [*ticks],
        labels=[
            names.get(t, f"1/{2**-t}" if t < 0 else f"{2**t} times") + more.get(t, "")
            for t in ticks
        ],
        size=SMALL,
    )
    bar.set_label("share of its vote that a capsule gives, against an equal share", size=SMALL)
    axes.set_box_aspect(0.02)
