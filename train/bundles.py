"""Conflicting bundles: training images of different classes that a layer no longer tells apart.

A bundle is all images whose outputs of a layer are the same number for number, as far as training
could notice: a difference counts that is large enough to change a weight when it is scaled as in a
step of gradient descent. With the learning rate eta, batches of B images, and w the largest
absolute weight of the layer that reads the output a, images i and j are in one bundle if, rounded
to float32,

    w - eta / B a_i  =  w - eta / B a_j    in every component.

So outputs are the same if they differ by less than about eps B / eta, eps being the distance of
float32 numbers at w: 0.002 for w from 1/2 to 1, 32 images and 0.001. Of equal numbers all are
equal to each other, so every image is in exactly one bundle. With p_k the share of class k in a
bundle b of the images X, the bundle entropy is

    H = sum_b |b| / |X| H_b,    H_b = - sum_k p_k ln p_k:

0 if no bundle holds images of two classes, the entropy of all labels, ln K for K equally frequent
classes, if there is but one bundle. Conflicts that arise in a layer cannot be undone by those
behind it.

Source: Peer, Stabinger, Rodriguez-Sanchez 2021, "Conflicting bundles: adapting architectures
towards the improved training of deep neural networks", and the code published with it. The last
layer, there the logits and here the class capsules, has no entropy by that definition. Adam scales
steps otherwise than gradient descent; the definition is kept, so that numbers can be compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocapsnet import CapsNet
from mocapsnet.inspection import layer_calls
from mocapsnet.train import checkpoints
from mocapsnet.train.data import ImageSet, to_pixels
from mocapsnet.train.files import write_whole
from mocapsnet.train.metrics import describe_damage
from mocapsnet.train.options import OptimOptions

FILE = "bundles.jsonl"
IMAGES = 1024
"""Training images that are compared, the first ones."""
BATCH = 128
"""Of them at a time through the network."""


class Bundles(NamedTuple):
    """After so many epochs, of what enters every layer of capsules, the primary capsules first:
    how many bundles, and their weighted entropy in nats. `labels` is the entropy of all labels."""

    epoch: int
    images: int
    labels: float
    bundles: list[int]
    entropy: list[float]


def same(a: Tensor, weight: float, step: float) -> list[bytes]:
    """For each of the outputs a [B, ...] what is the same for all of its bundle, and no other's.

    Args:
        weight: the largest absolute weight of the layer that reads a.
        step: learning rate over the size of a batch.
    """
    moved = (weight - step * a.float().flatten(1) + 0.0).cpu()  # adding 0 makes -0 to 0
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in moved.numpy()]


def numbered(outputs: list[bytes]) -> Tensor:
    """The number of the bundle [B], counted from 0, of what `same` found."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(output, len(numbers)) for output in outputs])


def weighted_entropy(bundle: Tensor, labels: Tensor) -> float:
    """H of the module's docstring, in nats, from bundle numbers and labels [B] each."""
    bundles, classes = int(bundle.max()) + 1, int(labels.max()) + 1
    counts = torch.bincount(bundle * classes + labels, minlength=bundles * classes)
    counts = counts.view(bundles, classes).double()
    sizes = counts.sum(1)
    return float(torch.special.entr(counts / sizes.unsqueeze(1)).sum(1) @ sizes) / len(labels)


@torch.no_grad()
def measure(network: CapsNet, train_set: ImageSet, optim: OptimOptions, epoch: int) -> Bundles:
    """The bundles after so many epochs: of the first `IMAGES` training images, not cropped."""
    shown = train_set.first(IMAGES)
    was_training = network.training
    network.eval()
    step = optim.lr / optim.batch_size
    seen: dict[str, list[bytes]] = {}  # what enters a layer, of every image
    for pixels in shown.images.split(BATCH):
        calls = layer_calls(network, network.preprocessing(to_pixels(pixels)))
        for name, (layer, u, _) in calls.items():
            seen.setdefault(name, []).extend(same(u, float(layer.weight.abs().max()), step))
    network.train(was_training)
    labels = shown.labels.cpu()
    found = [numbered(outputs) for outputs in seen.values()]
    return Bundles(
        epoch,
        len(shown),
        weighted_entropy(torch.zeros_like(labels), labels),
        [int(bundle.max()) + 1 for bundle in found],
        [weighted_entropy(bundle, labels) for bundle in found],
    )


def history(
    run: Path, network: CapsNet, train_set: ImageSet, optim: OptimOptions, epochs_done: int
) -> list[Bundles]:
    """What the run recorded, and of checkpoints that it did not, measured now.

    Leaves the network with the weights of one of the checkpoints.
    """
    rows = {row.epoch: row for row in read(run) if row.epoch <= epochs_done}
    for checkpoint, epoch in checkpoints.whole(run).items():
        if epoch not in rows:
            checkpoints.load_weights(checkpoint, network)
            rows[epoch] = measure(network, train_set, optim, epoch)
    return [rows[epoch] for epoch in sorted(rows)]


def record(
    run: Path, network: CapsNet, train_set: ImageSet, optim: OptimOptions, epoch: int
) -> None:
    """Measure, and write it to RUN/bundles.jsonl, in the place of that epoch's and later ones."""
    measured = measure(network, train_set, optim, epoch)
    rows = [*(row for row in read(run) if row.epoch < epoch), measured]
    write_whole(run / FILE, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def read(run: Path) -> list[Bundles]:
    """What RUN/bundles.jsonl holds, by epoch; warns of lines that cannot be read."""
    path = run / FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [_row(line) for line in lines]
    damaged = {n: line for n, line in enumerate(lines, start=1) if rows[n - 1] is None}
    if damaged:
        print(f"mocapsnet: warning: {describe_damage(path, damaged)}", file=sys.stderr)
    return sorted((row for row in rows if row is not None), key=lambda row: row.epoch)


def _row(line: bytes) -> Bundles | None:
    try:
        row: Any = json.loads(line)
        values = Bundles(**row)
    except (ValueError, TypeError):
        return None
    single = [values.epoch, values.images, values.labels]
    several = [values.bundles, values.entropy]
    if not all(isinstance(some, list) for some in several):
        return None
    if len(values.bundles) != len(values.entropy):
        return None
    numbers = [*single, *values.bundles, *values.entropy]
    return values if all(type(number) in (int, float) for number in numbers) else None
