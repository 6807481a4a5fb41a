"""Test images moved at random, and two of them laid over each other.

An image is first scaled and turned about its centre, then shifted, all in one bilinear sampling on
the image's device; beyond its edges it is black. Angles are in degrees, positive clockwise, shifts
in whole pixels, right and down; factors above 1 enlarge. These are the conventions of
`torchvision.transforms.functional.affine`.

What is drawn depends on the seed and on the number of images alone: it is the same on every device,
for any batch size and any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocapsnet.train.data.image_set import ImageSet

# Images that are sampled at a time.
BATCH = 1024


@dataclass(frozen=True)
class Motion:
    """How far images may be moved; each is drawn uniformly.

    Attributes:
        shift: most pixels, in each direction by itself.
        rotate: most degrees, either way.
        scale: least and greatest factor, one for height and width.
        keep_whole: a shift is drawn from those that leave no pixel that is not black outside; if
            none does, it is the one that leaves as much outside on one side as on the other, as far
            as `shift` allows.
    """

    shift: int = 0
    rotate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    keep_whole: bool = False

    @property
    def still(self) -> bool:
        """Whether images stay as they are."""
        return not self.shift and not self.rotate and self.scale == (1.0, 1.0)

    def words(self) -> str:
        parts = []
        if self.shift:
            inside = ", what is not black staying inside" if self.keep_whole else ""
            pixels = "pixel" if self.shift == 1 else "pixels"
            parts.append(f"shifted by up to {self.shift} {pixels}{inside}")
        if self.rotate:
            parts.append(f"turned by up to {self.rotate:g} degrees")
        if self.scale != (1.0, 1.0):
            parts.append("scaled by {:g} to {:g}".format(*self.scale))
        return ", ".join(parts)


class Moved(NamedTuple):
    """Moved images, and which share of their brightness was left outside."""

    images: ImageSet
    lost: float


def move(images: ImageSet, motion: Motion, seed: int, use: int = 0) -> Moved:
    """Every image of a set moved at random.

    Args:
        use: with another number other moves are drawn from the same seed.
    """
    drawn = torch.rand(len(images), 4, generator=_generator(seed, use), dtype=torch.float64)
    low, high = motion.scale
    scales = low + (high - low) * drawn[:, 0]
    angles = motion.rotate * (2 * drawn[:, 1] - 1)
    parts, shares = [], []
    for batch, scale, angle, place in zip(
        images.images.split(BATCH),
        scales.split(BATCH),
        angles.split(BATCH),
        drawn[:, 2:].split(BATCH),
        strict=True,
    ):
        device = batch.device
        scale, angle, place = (x.to(device, torch.float32) for x in (scale, angle, place))
        shift = _shifts(batch, scale, angle, place, motion)
        moved = affine(batch.float(), angle, scale, shift)
        # Of the brightness at its new size; sampling may add a little.
        before = batch.float().sum((1, 2, 3)) * scale.square()
        shares.append((1 - moved.sum((1, 2, 3)) / before.clamp_min(1)).clamp_min(0) * (before > 0))
        parts.append(moved.round().clamp(0, 255).byte())
    return Moved(replace(images, images=torch.cat(parts)), float(torch.cat(shares).mean()))


def affine(images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and turn each image about its centre, then shift it; black beyond the edges.

    Args:
        images: [B, C, H, W], floating point.
        angle, scale: degrees clockwise and factors [B].
        shift: pixels to the right and down [B, 2].
    """
    H, W = images.shape[-2:]
    cos, sin = (f(angle.deg2rad()) / scale for f in (torch.cos, torch.sin))
    # Where each pixel comes from, in pixels from the centre: the inverse, and then in affine_grid's
    # units, of which 2 are the width and the height.
    inverse = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    origin = -(inverse @ shift.unsqueeze(2))
    size = images.new_tensor([W, H])
    theta = torch.cat([inverse * size / size.unsqueeze(1), origin * 2 / size.unsqueeze(1)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _shifts(images: Tensor, scale: Tensor, angle: Tensor, place: Tensor, motion: Motion) -> Tensor:
    """Whole pixels [B, 2], to the right and down.

    Args:
        place: drawn from [0, 1) [B, 2].
    """
    most = place.new_full((), float(motion.shift))
    low, high = -most.expand_as(place), most.expand_as(place)
    if motion.keep_whole:
        H, W = images.shape[-2:]
        bright = images.amax(1) > 0  # [B, H, W]
        left, right = _edges(bright.any(1))
        top, bottom = _edges(bright.any(2))
        x = torch.stack([left, right, left, right], 1) - W / 2  # of the corners [B, 4]
        y = torch.stack([top, top, bottom, bottom], 1) - H / 2
        cos, sin = (f(angle.deg2rad()) * scale for f in (torch.cos, torch.sin))
        x, y = cos[:, None] * x - sin[:, None] * y, sin[:, None] * x + cos[:, None] * y
        corners, half = torch.stack([x, y], 2), place.new_tensor([W / 2, H / 2])
        least = (-half - corners.amin(1) - 1e-3).ceil()  # [B, 2]
        greatest = (half - corners.amax(1) + 1e-3).floor()
        low, high = torch.maximum(low, least), torch.minimum(high, greatest)
        middle = ((least + greatest) / 2).round().clamp(-most, most)
        low, high = (torch.where(low <= high, end, middle) for end in (low, high))
    return torch.minimum(low + ((high - low + 1) * place).floor(), high)


def _edges(bright: Tensor) -> tuple[Tensor, Tensor]:
    """Where what is bright begins and ends along an axis [B, size]; of nothing, the middle."""
    size = bright.shape[1]
    begin = bright.int().argmax(1)
    end = size - bright.flip(1).int().argmax(1)
    some = bright.any(1)
    middle = torch.full_like(begin, size // 2)
    return torch.where(some, begin, middle).float(), torch.where(some, end, middle).float()


class Pairs(NamedTuple):
    """Images of two classes each: images [N, C, H, W] uint8 and both classes [N, 2]."""

    images: Tensor
    labels: Tensor


def overlap(images: ImageSet, motion: Motion, seed: int) -> Pairs:
    """Every image with another of another class laid over it, each moved, the brighter pixel wins.

    Raises: ValueError if the images are of fewer than three classes, as of two both are always
        there.
    """
    labels = images.labels.cpu()
    counts = torch.bincount(labels)
    if int((counts > 0).sum()) < 3:
        raise ValueError("overlapping images need images of three classes or more")
    # Sorted by class, all but a class's own images are those before and those behind it.
    order, own = labels.argsort(stable=True), counts[labels]
    begin = (counts.cumsum(0) - counts)[labels]
    drawn = torch.rand(len(labels), generator=_generator(seed, 1), dtype=torch.float64)
    place = (drawn * (len(labels) - own)).long()
    other = order[place + own * (place >= begin)]
    first = move(images, motion, seed, 2).images.images
    chosen = replace(images, images=images.images[other.to(images.images.device)])
    second = move(chosen, motion, seed, 3).images.images
    return Pairs(torch.maximum(first, second), torch.stack([labels, labels[other]], 1))


def both_right(lengths: Tensor, labels: Tensor) -> Tensor:
    """Whether the two classes [B, 2] are the two of greatest lengths [B, classes] -> bool [B]."""
    found = lengths.topk(2, 1).indices.sort(1).values
    return (found == labels.sort(1).values).all(1)


def _generator(seed: int, use: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, use]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
