"""Capsule lengths and coupling entropy, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from mocapsnet import CapsNet, CapsuleLayer, inspect_layers
from mocapsnet.train.data import ImageSet, to_pixels
from mocapsnet.train.pictures.sheet import SMALL, TEXT, heading, some

IMAGES = 256
"""Test images that are measured."""
VOTES = 2**26
"""Numbers in the votes that are in memory at once, 256 MB in float32."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Layers:
    """What is measured of a network's capsule layers, on some test images.

    Attributes:
        lengths: quantiles `SHARES` of the capsules' lengths [layers + 1, 5], of the primary
            capsules first: what goes into each layer, and the class capsules.
        own: the median length [layers] of what each layer itself makes, before a residual stack
            adds it to its input.
        right, others: the median lengths of the class capsules of the right class, and the others.
        entropy: of the couplings [layers, iterations], see `coupling_entropy`.
    """

    images: int
    lengths: Tensor
    own: Tensor
    right: float
    others: float
    entropy: Tensor


def coupling_entropy(c: Tensor) -> Tensor:
    """How evenly capsules share out their votes, from couplings [..., N, J]: [...].

    The entropy of every input capsule's J couplings over its largest value, log J, averaged over
    the input capsules: 1 if all outputs get the same, 0 if one gets all.
    """
    J = c.shape[-1]
    if J == 1:  # nothing to share
        return c.new_ones(c.shape[:-2])
    return torch.special.entr(c).sum(-1).mean(-1) / torch.tensor(J).log()


def measure(network: CapsNet, test_set: ImageSet) -> Layers:
    """Lengths and entropies over the first `IMAGES` test images."""
    shown = test_set.first(IMAGES)
    votes = max(m.weight[:, 0].numel() for m in network.modules() if isinstance(m, CapsuleLayer))
    lengths: list[list[Tensor]] = []  # [batches][layers + 1], each flat
    own, entropy = [], []
    for part in torch.arange(len(shown), device=shown.labels.device).split(max(1, VOTES // votes)):
        images = network.preprocessing(to_pixels(shown.images[part]))
        records = list(inspect_layers(network, images).values())
        stages = [*(r.u for r in records), records[-1].v]
        lengths.append([torch.linalg.vector_norm(u, dim=-1) for u in stages])
        own.append([torch.linalg.vector_norm(r.v, dim=-1).flatten() for r in records])
        entropy.append(torch.stack([coupling_entropy(r.couplings) for r in records]))
    by_layer = [torch.cat(parts) for parts in zip(*lengths, strict=True)]
    right = torch.arange(network.config.classes, device=shown.labels.device)
    mask = shown.labels.unsqueeze(1) == right  # [B, classes]
    return Layers(
        len(shown),
        torch.stack([quantiles(values) for values in by_layer]),
        torch.stack([torch.cat(parts).median() for parts in zip(*own, strict=True)]).cpu(),
        float(by_layer[-1][mask].median()),
        float(by_layer[-1][~mask].median()) if mask.shape[1] > 1 else float("nan"),
        torch.cat(entropy, dim=2).mean(2).cpu(),
    )


def quantiles(values: Tensor) -> Tensor:
    """Those of `SHARES`, of any number of values; torch.quantile takes 16 million at most."""
    ordered = values.flatten().sort().values
    places = [round(share * (len(ordered) - 1)) for share in SHARES]
    return ordered[places].float().cpu()


def figure(network: CapsNet, measured: Layers) -> Figure:
    """Lengths above, entropies below, over the layers from the image to the classes."""
    hidden = len(measured.entropy) - 2
    picture = Figure(figsize=(max(9.0, min(0.25 * hidden + 5, 15)), 7.8), layout="constrained")
    above, below = picture.subplots(2, 1, sharex=True)
    _lengths(above, measured, residual=not isinstance(network.stack, nn.Sequential))
    _entropies(below, measured)
    lower = "\n" if hidden > 14 else ""  # many layers stand close, and the words are long
    names = {0: "primary", 1: f"{lower}first", hidden + 2: f"{lower}classes"}
    names |= {2 + n: str(n + 1) for n in some(hidden, 14)}
    for axes in (above, below):
        axes.set_xticks([*names], [*names.values()], size=SMALL)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.01, 0.5))
    below.set_xlabel("layers of capsules; numbers: hidden layers", size=TEXT)
    heading(
        picture,
        "How surely every layer sees something, and how decidedly it was voted for",
        f"Measured on {measured.images:,} test images; left the capsules next to the image, right "
        "those of the classes.",
    )
    return picture


def _lengths(axes: Axes, measured: Layers, residual: bool) -> None:
    x = range(len(measured.lengths))
    low, lower, middle, upper, high = measured.lengths.T.numpy()
    axes.fill_between(x, low, high, color="tab:blue", alpha=0.15, lw=0, label="nine tenths of them")
    axes.fill_between(x, lower, upper, color="tab:blue", alpha=0.3, lw=0, label="half of them")
    axes.plot(x, middle, color="tab:blue", marker="o", ms=3, label="the middle one (median)")
    if residual:
        axes.plot(
            x[2:-1],
            measured.own[1:-1].numpy(),
            color="tab:green",
            ls="--",
            marker=".",
            label="what the layer itself makes,\nbefore its input is added (median)",
        )
    axes.plot(
        x[-1], measured.right, "^", color="tab:orange", ms=9, label="capsule of the right class"
    )
    axes.plot(
        x[-1], measured.others, "v", color="tab:red", ms=9, label="capsules of the other classes"
    )
    axes.set_ylim(bottom=0)
    axes.set_title("Length of the capsules: how surely each sees what it stands for", size=TEXT + 1)
    axes.set_ylabel("length", size=TEXT)


def _entropies(axes: Axes, measured: Layers) -> None:
    layers, iterations = measured.entropy.shape
    shades = torch.linspace(0.75, 0, iterations).tolist() if iterations > 1 else [0.0]
    for r, shade in enumerate(shades):
        colour = (0.55 + 0.3 * shade, shade, 0.1 + 0.5 * shade)
        axes.plot(
            range(1, layers + 1),
            measured.entropy[:, r].numpy(),
            color=colour,
            marker="o",
            ms=4,
            label=f"routing iteration {r + 1}",
        )
    axes.set_title(
        "Entropy of the couplings: how evenly the capsules before the layer share out their votes",
        size=TEXT + 1,
    )
    axes.set_ylabel("1: all get the same\nless: some get more", size=TEXT)
    low = float(measured.entropy.min())
    axes.set_ylim(min(0.9, low - 0.05 * (1 - low)), 1.01)  # a thousandth is no difference
