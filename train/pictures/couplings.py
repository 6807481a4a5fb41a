"""Pictures of couplings: which input capsule of a layer gives its vote to which output capsule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from mocapsnet import CapsNet, CapsNetConfig, CapsuleLayer
from mocapsnet.train.pictures.sheet import some

COLOURS = "RdBu_r"


def layer_titles(network: CapsNet) -> dict[str, str]:
    """The capsule layers by their names in the network, in order, with what a reader calls them."""
    c = network.config
    titles = {"first": f"primary capsules to {c.capsules} hidden capsules"}
    hidden = [n for n, m in network.stack.named_modules() if isinstance(m, CapsuleLayer)]
    for n, name in enumerate(hidden, start=1):
        titles[f"stack.{name}"] = f"hidden layer {n} of {len(hidden)}"
    titles["last"] = f"hidden capsules to {c.classes} classes"
    return titles


def coupling_figure(
    network: CapsNet, layer: str, couplings: Tensor, iteration: int, classes: Sequence[str]
) -> Figure:
    """Couplings of one image in one layer and routing iteration.

    The first layer is drawn as a map over the image for every hidden capsule, averaged over the
    primary capsules at a position; other layers as a table, input by output capsules.

    Args:
        layer: a name of `layer_titles`.
        couplings: of that layer for one image [iterations, N, J], see `inspect_layers`.
        iteration: counted from 1.
        classes: names of the classes.
    """
    c = couplings[iteration - 1].float().cpu()  # [N, J]
    title = f"{layer_titles(network)[layer][0].upper()}{layer_titles(network)[layer][1:]}, "
    title += f"routing iteration {iteration} of {len(couplings)}"
    if layer == "first":
        return position_maps(c, network.config, title)
    return table(c, list(classes) if layer == "last" else None, title)


def place_maps(c: Tensor, config: CapsNetConfig) -> Tensor:
    """Couplings of the primary capsules [..., N, J] by their place in the image [..., H, Wd, J].

    Averaged over the capsules of a place, or over the channels that capsules of neighbouring pixels
    are made of.
    """
    if config.grouping == "pixels":  # a capsule is `capsule_dim` values of a map [C, H, Wd]
        c = c.repeat_interleave(config.capsule_dim, -2)
    return c.unflatten(-2, (-1, *config.feature_size)).mean(-4)


def position_maps(c: Tensor, config: CapsNetConfig, title: str) -> Figure:
    """One map [H, Wd] for each output capsule, from couplings [N, J]."""
    maps = place_maps(c, config)  # [H, Wd, J]
    J = maps.shape[-1]
    columns = min(J, 8)
    rows = math.ceil(J / columns)
    figure = Figure(figsize=(1.05 * columns + 1.2, 1.15 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for j, ax in enumerate(axes.flat):
        ax.axis("off")
        if j < J:
            image = ax.imshow(maps[..., j].numpy(), cmap=COLOURS, norm=scale(maps))
            ax.set_title(f"capsule {j + 1}", size=7, pad=2)
    legend(figure, image, axes)
    subtitle = "Each map: the share of its vote that every place of the image gives that capsule"
    figure.suptitle(f"{title}\n{subtitle}", size=9)
    return figure


def table(c: Tensor, outputs: list[str] | None, title: str) -> Figure:
    """Input capsules (rows) by output capsules (columns), from couplings [N, J]."""
    N, J = c.shape
    figure = Figure(figsize=(min(0.22 * J + 2.4, 9), 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(c.numpy(), cmap=COLOURS, norm=scale(c), aspect="auto")
    axes.set(ylabel="input capsule", xlabel="class" if outputs else "output capsule")
    axes.set_yticks(ticks(N), labels=[str(n + 1) for n in ticks(N)])
    if outputs:
        named = range(J) if J <= 20 else ticks(J)
        names = [outputs[j] for j in named]
        axes.set_xticks(named, labels=names, rotation=60 if max(map(len, names)) > 2 else 0, size=8)
    else:
        axes.set_xticks(ticks(J), labels=[str(j + 1) for j in ticks(J)])
    legend(figure, image, axes)
    figure.suptitle(f"{title}\nEach row: how an input capsule shares out its vote", size=9)
    return figure


def scale(c: Tensor) -> TwoSlopeNorm:
    """White is an equal share, 1 / J; the darkest red the largest coupling, but at least 2 / J."""
    J = c.shape[-1]
    top = max(float(c.max()), 2 / J)
    return TwoSlopeNorm(1 / J, 0, top)


def legend(figure: Figure, image: Any, axes: Any) -> None:
    """The bar of colours, below."""
    norm = image.norm
    bar = figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.9, aspect=40, label="share of the vote"
    )
    equal = f"{norm.vcenter:.2g}: equal shares"
    bar.set_ticks([0, norm.vcenter, norm.vmax], labels=["0", equal, f"{norm.vmax:.2g}"])


def ticks(count: int) -> list[int]:
    """At most nine indices, the first and the last among them."""
    return some(count, 9)
