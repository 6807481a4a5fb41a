"""Draws what the components of a class capsule do: python docs/figures/components.py RUN PICTURE

Of the first test image of three digits: a row for each of the components that change its
reconstruction most, which is drawn with that component moved by up to 0.4 either way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import mocapsnet
from mocapsnet.train.data import builtin

DIGITS = (3, 4, 7)
STEPS = torch.linspace(-0.4, 0.4, 7)
ROWS = 3


@torch.no_grad()
def moved(model: mocapsnet.CapsNet, capsules: Tensor, label: int) -> Tensor:
    """Reconstructions [class_dim, steps, H, W] of one image's capsules [classes, class_dim]."""
    alone = torch.zeros_like(capsules)
    alone[label] = capsules[label]
    every = alone.expand(alone.shape[1], len(STEPS), *alone.shape).clone()
    for component in range(alone.shape[1]):
        every[component, :, label, component] += STEPS
    drawn = model.decoder(every.flatten(0, 1))
    return drawn[:, 0].unflatten(0, every.shape[:2])


def sheet(drawn: Tensor) -> Tensor:
    """The rows that change most, side by side with a white line between: [rows * H, steps * W]."""
    change = (drawn[:, -1] - drawn[:, 0]).square().sum((1, 2))
    chosen = drawn[change.argsort(descending=True)[:ROWS].sort().values]
    framed = torch.nn.functional.pad(chosen, (0, 1, 0, 1), value=1.0)
    return torch.cat([torch.cat(list(row), dim=1) for row in framed])


def main(run: str, picture: str) -> None:
    model = mocapsnet.load(run)
    _, test = builtin.load("digits", "data", download=False)
    found = model.predict(test.images)
    figure = Figure(figsize=(12, 2.1), layout="constrained")
    for axes, digit in zip(figure.subplots(1, len(DIGITS)), DIGITS, strict=True):
        right = (test.labels == digit) & (found.labels == digit)
        n = int(right.nonzero()[0])
        axes.imshow(sheet(moved(model, found.capsules[n], digit)), cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"a {digit}", size=10)
        axes.axis("off")
    FigureCanvasAgg(figure)
    figure.savefig(Path(picture), dpi=120, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
