"""Runs beside each other: how they started, layer by layer, and how far they have got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from mocapsnet.train.errors import InputError
from mocapsnet.train.pictures.sheet import SMALL, heading, save, some

ADAM_EPSILON = 1e-8
MARKS = "os^vDPX*"
LAYERS = 16
"""As many of them are named below an axis."""


def draw(
    path: Path,
    names: Sequence[str],
    starts: Sequence[dict[str, Any]],
    accuracies: Sequence[Sequence[tuple[int, float]]],
    lengths: list[list[str]],
    gradients: list[list[str]],
) -> None:
    """Write the picture: first losses, accuracies, and what each layer starts with.

    Args:
        starts: what each run's start.json holds.
        accuracies: epochs and accuracies after them, of each run.
        lengths, gradients: tables with a row for each layer and a column for each run.
    Raises: InputError if it cannot be written there.
    """
    counts = sorted({int(n) for found in starts for n in found.get("losses", {})})
    trained = bool(counts)  # else they have not got far enough to say how
    figure = Figure(figsize=(12, 4.2 + 4 * trained + 0.22 * len(names)), layout="constrained")
    heading(
        figure,
        "How the runs started" + trained * ", and how far they have got",
        f"{'Below: b' if trained else 'B'}efore the first step. Gradients far under the dashed "
        "line move nothing, as Adam divides by their size plus 1e-8.",
    )
    panels = figure.subplots(1 + trained, 2, squeeze=False)
    colours = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    styles = [
        {"color": colours(n % colours.N), "marker": MARKS[n % len(MARKS)], "ms": 4, "lw": 1.2}
        for n in range(len(names))
    ]
    length, gradient = panels[-1]
    by_layer(length, lengths, styles, "Length of the capsules that a layer makes")
    by_layer(gradient, gradients, styles, "Gradient of a layer's weights, root mean square")
    gradient.axhline(ADAM_EPSILON, color="black", lw=1, ls="--")
    if trained:
        early, late = panels[0]
        for found, curve, style in zip(starts, accuracies, styles, strict=True):
            losses = {0: found, **{int(n): part for n, part in found.get("losses", {}).items()}}
            margins = [part.get("margin", float("nan")) for part in losses.values()]
            early.plot(list(losses), margins, **style)
            late.plot([epoch for epoch, _ in curve], [100 * share for _, share in curve], **style)
        early.set(title="Loss of the classes, in training", xlabel="steps", ylabel="per image")
        early.set_xscale("symlog", linthresh=100)
        early.set_xticks([0, *counts], [f"{n:,}" for n in (0, *counts)])
        early.xaxis.set_minor_locator(NullLocator())
        late.set(title="Accuracy, of images not trained on", xlabel="epoch", ylabel="%")
        late.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.title.set_size(11)
    figure.legend(length.lines, names, loc="outside lower center", ncols=2, frameon=False)
    try:
        save(figure, path)
    except (OSError, ValueError) as error:  # no folder, or an ending that is no picture's
        raise InputError(f"{path} cannot be written: {error}") from error


def by_layer(
    axes: Axes, table: list[list[str]], styles: Sequence[dict[str, Any]], title: str
) -> None:
    """A line for each run over the layers, which are named below."""
    layers = [row[0] for row in table[1:]]
    for column, style in enumerate(styles, start=1):
        values = {n: float(row[column]) for n, row in enumerate(table[1:]) if row[column]}
        axes.plot(list(values), list(values.values()), **style)
    shown = some(len(layers), LAYERS)
    axes.set_xticks(shown, [layers[n] for n in shown], rotation=45, ha="right", size=SMALL)
    axes.set(title=title, yscale="log")
