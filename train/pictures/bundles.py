"""Conflicting bundles by layer, over training; what they are: see `mocapsnet.train.bundles`."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mocapsnet import CapsNet, ConvMoCapsNet
from mocapsnet.train.bundles import Bundles
from mocapsnet.train.pictures.sheet import SMALL, TEXT, heading, some

TITLE = "Which layers no longer tell images of different classes apart"


def figure(network: CapsNet, measured: list[Bundles]) -> Figure:
    """A map, layers by epochs; of a single epoch a line."""
    layers = names(network, len(measured[-1].entropy))
    last = measured[-1]
    picture = Figure(
        figsize=(11, max(4.6, min(0.17 * len(last.entropy) + 2.6, 11))), layout="constrained"
    )
    axes = picture.subplots()
    if len(measured) == 1:
        _line(axes, last, layers)
    else:
        _map(picture, axes, measured, layers)
    top = max(max(row.entropy) for row in measured)
    heading(
        picture,
        TITLE,
        f"The first {last.images:,} training images, bundled where a layer's outputs are the same "
        "as far as training could notice;",
        "shown is how mixed the classes within the bundles are (entropy): 0, no bundle holds two "
        f"classes; {last.labels:.2f}, all images are in one bundle.",
        *(["No layer confuses any two classes at any time."] if top == 0 else []),
    )
    return picture


def names(network: CapsNet, count: int) -> list[str]:
    """What the layers are called, from the image on, as in the picture of lengths."""
    before = ["primary"] if isinstance(network, ConvMoCapsNet) else ["primary", "first"]
    return [*before, *(str(n + 1) for n in range(count - len(before)))]


def _map(picture: Figure, axes: Axes, measured: list[Bundles], layers: list[str]) -> None:
    values = np.array([row.entropy for row in measured]).T  # [layers, epochs]
    limit = measured[-1].labels or 1.0
    image = axes.imshow(
        values, cmap="magma_r", vmin=0, vmax=limit, aspect="auto", interpolation="nearest"
    )
    epochs = some(len(measured), 16)
    axes.set_xticks(epochs, [str(measured[n].epoch or "before") for n in epochs], size=SMALL)
    axes.set_xlabel("epoch", size=TEXT)
    rows = [0, 1, *(2 + n for n in some(len(values) - 2, 20))]
    axes.set_yticks(rows, [layers[n] for n in rows], size=SMALL)
    axes.set_ylabel("layer of capsules; numbers: hidden layers", size=TEXT)
    bar = picture.colorbar(image, ax=axes, label="bundle entropy in nats")
    bar.set_ticks([0, limit / 2, limit])
    bar.set_ticklabels(
        ["0: all told apart", f"{limit / 2:.2f}", f"{limit:.2f}: none told apart"], size=SMALL
    )
    if values.size <= 200:
        for (layer, n), value in np.ndenumerate(values):
            colour = "white" if value > limit / 2 else "black"
            text = f"{value:.2f}" if value else "0"
            axes.text(n, layer, text, ha="center", va="center", size=SMALL, color=colour)


def _line(axes: Axes, row: Bundles, layers: list[str]) -> None:
    count = len(row.entropy)
    axes.plot(range(count), row.entropy, marker="o", ms=4, color="tab:blue")
    axes.axhline(row.labels, color="gray", ls="--", lw=1)
    axes.text(0, row.labels, " no two images are told apart", va="bottom", size=SMALL, color="gray")
    axes.set_ylim(-0.03 * row.labels, 1.12 * max(row.labels, math.ulp(1)))
    shown = [0, 1, *(2 + n for n in some(count - 2, 14))]
    axes.set_xticks(shown, [layers[n] for n in shown], size=SMALL)
    axes.set_xlabel("layer of capsules; numbers: hidden layers", size=TEXT)
    axes.set_ylabel(f"bundle entropy in nats, after epoch {row.epoch}", size=TEXT)
    axes.grid(alpha=0.3)
