"""What each dimension of a class capsule holds: the classical grid of Sabour et al. 2017, figure 4.

Of one test image per class: every row changes one dimension of its class capsule and keeps the
others, every column by another amount, and the decoder draws the image again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mocapsnet import CapsNet
from mocapsnet.train.data import ImageSet, to_pixels
from mocapsnet.train.pictures.sheet import SMALL, TEXT, centres, heading, paste, rgb

STEPS = torch.linspace(-0.25, 0.25, 11)
PER_PAGE = 10
"""Classes in one picture; of more, there are more pictures."""
ROWS = 16
"""Of larger class capsules, the dimensions that change the image most."""
CHANGE = "RdBu_r"
CANDIDATES = 20
"""Test images of a class among which its example is looked for."""


class Example(NamedTuple):
    """A test image [C, H, W], its class, the capsule [D] of that, and what it is taken for."""

    pixels: Tensor
    capsule: Tensor
    label: int
    taken_for: int


def pages(network: CapsNet, test_set: ImageSet) -> list[list[Example]]:
    """The example of every class that has a test image, at most `PER_PAGE` for a figure."""
    found = examples(network, test_set)
    return [found[n : n + PER_PAGE] for n in range(0, len(found), PER_PAGE)]


@torch.no_grad()
def examples(network: CapsNet, test_set: ImageSet) -> list[Example]:
    """One test image of every class that has any.

    That with the longest capsule among the first ones which the network gets right, or among the
    first ones if it gets none right.
    """
    chosen = []
    for label in range(network.config.classes):
        first = (test_set.labels == label).nonzero().flatten()[:CANDIDATES]
        if not len(first):
            continue
        pixels = to_pixels(test_set.images[first])
        out = network(network.preprocessing(pixels))
        guesses = out.lengths.argmax(1)
        n = int((out.lengths[:, label] + (guesses == label).float()).argmax())
        chosen.append(Example(pixels[n], out.capsules[n, label], label, int(guesses[n])))
    return chosen


@torch.no_grad()
def sweep(network: CapsNet, capsule: Tensor, label: int) -> Tensor:
    """Images [D, steps, C, H, W] decoded from one class capsule [D], a dimension of it moved."""
    D, S = len(capsule), len(STEPS)
    moved = capsule.repeat(D, S, 1)
    moved[range(D), :, range(D)] += STEPS.to(capsule)
    every = capsule.new_zeros(D * S, network.config.classes, D)
    every[:, label] = moved.flatten(0, 1)
    return network.decoder(every).unflatten(0, (D, S))


def by_strength(drawn: Tensor) -> list[int]:
    """The dimensions in the order of how much they change the image [D, steps, C, H, W]."""
    change = (drawn[:, -1] - drawn[:, 0]).square().flatten(1).sum(1)
    return change.argsort(descending=True, stable=True).tolist()


def figure(network: CapsNet, found: list[Example]) -> Figure:
    """A panel for each example."""
    D = network.config.class_dim
    rows = min(D, ROWS)
    columns = min(len(found), PER_PAGE // 2)
    lines = -(-len(found) // columns)
    _, H, W = network.config.image_shape
    height = 2.35 * (rows + 1) * H / ((len(STEPS) + 1) * W)
    picture = Figure(
        figsize=(max(3.0 * columns, 9.0), (height + 0.6) * lines + 0.9), layout="constrained"
    )
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    for axes, example in zip(panels, found, strict=False):
        drawn = sweep(network, example.capsule, example.label)
        _panel(axes, example, drawn, by_strength(drawn)[:rows], network.class_names)
    for axes in panels[len(found) :]:
        axes.axis("off")
    which = "each" if rows == D else f"each of the {rows} strongest"
    heading(
        picture,
        f"What {which} of the {D} dimensions of a class capsule stands for",
        "Top: a test image. Below it, framed: the image drawn again from the capsule of its class "
        "alone.",
        "Every row changes one dimension of that capsule, by the amount written below, and keeps "
        "the others; those that change the image most come first.",
        "Right, from the first to the last drawing of a row: red became brighter, blue darker.",
    )
    return picture


def _panel(
    axes: Axes, example: Example, drawn: Tensor, order: list[int], names: tuple[str, ...]
) -> None:
    _, S, _, H, W = drawn.shape
    rows = [row_of(drawn[n], change_scale(drawn)) for n in order]
    top = torch.ones(S + 1, H, W, 3)
    top[S // 2] = rgb(example.pixels)
    axes.imshow(paste(torch.stack([top, *rows])).numpy(), interpolation="antialiased")
    x, y = centres(S + 1, W), centres(len(order) + 1, H)
    axes.add_patch(
        Rectangle(
            (x[S // 2] - W / 2 - 0.5, H),
            W + 1,
            len(order) * (H + 1),
            fill=False,
            edgecolor="tab:orange",
            linewidth=1.5,
        )
    )
    labels = {0: f"{STEPS[0]:+.2f}", S // 2: "as it is", S - 1: f"{STEPS[-1]:+.2f} "}
    axes.set_xticks([x[i] for i in labels], [*labels.values()], size=SMALL)
    axes.set_yticks(y, ["image", *(f"dim. {n + 1}" for n in order)], size=SMALL)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    wrong = example.taken_for != example.label
    taken = f", taken for {names[example.taken_for]}" if wrong else ""
    axes.set_title(
        f"{names[example.label]}{taken}",
        size=TEXT,
        parse_math=False,
        color="tab:red" if wrong else "black",
    )


def change_scale(drawn: Tensor) -> float:
    """The largest change of brightness from the first drawing of a row to its last, or a fifth."""
    return max(float((drawn[:, -1] - drawn[:, 0]).mean(1).abs().max()), 0.2)


def row_of(drawn: Tensor, scale: float) -> Tensor:
    """Drawings [steps, C, H, W], and how the brightness changed, as [steps + 1, H, W, 3]."""
    change = (drawn[-1] - drawn[0]).mean(0).cpu()  # [H, W]
    colours = colormaps[CHANGE]((change / scale / 2 + 0.5).numpy())[..., :3]
    return torch.cat([rgb(drawn), torch.from_numpy(colours).to(torch.float32)[None]])
