"""Random views of the training images: crops, resized crops, flips; and mixtures of two images.

Views are drawn for a whole epoch on the CPU, from the seed and the epoch alone, and mixtures for a
whole batch, so both are the same on every device, for any number of processes and micro-batches,
and after a resume.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from mocapsnet.preprocessing import to_pixels
from mocapsnet.train.data.image_set import ImageSet
from mocapsnet.train.data.transforms import epoch_order, random_crop
from mocapsnet.train.options import DataOptions

# Drawn from beside the seed, where an epoch's order has nothing; and for mixtures.
VIEWS, MIXTURES = 1, 2


class Views(NamedTuple):
    """Which images, and how each is seen; the k-th row of each for the k-th image.

    Attributes:
        indices: [N] int64, which images.
        offsets: [N, 2] int64, where each is cropped, see `random_crop`.
        boxes: [N, 4], centre (x, y) and size (width, height) of the part of each image that is
            seen, as shares of the image, see `resized_crop`; [N, 0] for the whole.
        flips: [N] bool, which are mirrored, left to right.
    """

    indices: Tensor
    offsets: Tensor
    boxes: Tensor
    flips: Tensor

    def to(self, device: torch.device) -> Views:
        return Views(*(t.to(device) for t in self))

    def split(self, size: int) -> list[Views]:
        return [Views(*parts) for parts in zip(*(t.split(size) for t in self), strict=True)]

    def shares(self, count: int) -> list[Views]:
        parts = zip(*(t.tensor_split(count) for t in self), strict=True)
        return [Views(*part) for part in parts]

    def first(self) -> Views:
        return Views(*(t[:1] for t in self))


def epoch_views(count: int, options: DataOptions, seed: int, epoch: int) -> Views:
    """Order and views of all images in one epoch."""
    order, offsets = epoch_order(count, options.pad, seed, epoch)
    source = np.random.SeedSequence([seed, epoch, 0, VIEWS]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(source[0]))
    boxes = torch.zeros(count, 0)
    if options.crop == "resized":
        boxes = crop_boxes(count, options.crop_area, generator)
    flips = torch.zeros(count, dtype=torch.bool)
    if options.flip:
        flips = torch.rand(count, generator=generator) < 0.5
    return Views(order, offsets, boxes, flips)


def crop_boxes(count: int, least: float, generator: torch.Generator) -> Tensor:
    """Boxes [count, 4], see `Views`: of a share of the area between `least` and 1, width to height
    between 3/4 and 4/3 of the image's on a logarithmic scale, or as far as a box of this area fits
    in, anywhere within the image.

    Source: Szegedy et al. 2015; torchvision's RandomResizedCrop, which has one box for a batch.
    """
    area, ratio, x, y = torch.rand(4, count, generator=generator)
    area = least + (1 - least) * area
    widest = area.reciprocal().clamp(max=4 / 3).log()
    ratio = torch.exp(widest * (2 * ratio - 1))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return torch.stack(
        [width / 2 + (1 - width) * x, height / 2 + (1 - height) * y, width, height], 1
    )


def resized_crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """The part of each image in its box, enlarged to the image's size, bilinearly.

    Args:
        pixels: [B, C, H, W], floating point.
        boxes: [B, 4], see `Views`.
    """
    x, y, width, height = boxes.to(pixels.dtype).unbind(1)
    zero = torch.zeros_like(x)
    rows = (width, zero, 2 * x - 1, zero, height, 2 * y - 1)
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False
    )
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def view(train_set: ImageSet, views: Views, pad: int) -> Tensor:
    """Pixels in [0, 1] [B, C, H, W] of these images, seen so."""
    images, flips = train_set.images[views.indices], views.flips
    if views.boxes.shape[1]:
        pixels = resized_crop(to_pixels(images), views.boxes)
    else:
        pixels = to_pixels(random_crop(images, views.offsets, pad))
    return torch.where(flips.view(-1, 1, 1, 1), pixels.flip(3), pixels)


def mixed(
    pixels: Tensor, labels: Tensor, classes: int, mix: str, seed: int, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """A batch in which every image is mixed with the one before it, by torchvision.

    Args:
        pixels: [B, C, H, W]; labels: [B].
        mix: "cutmix", a rectangle of one image lies on the other; "mixup", both are seen at once;
            "both", either, by turns drawn at random.
    Returns: pixels, and of every class the share [B, classes] of it that is seen.
    """
    source = np.random.SeedSequence([seed, epoch, step, MIXTURES]).generate_state(2, np.uint64)
    if mix == "both":
        mix = ("cutmix", "mixup")[int(source[1]) % 2]
    kind = {"cutmix": v2.CutMix(num_classes=classes), "mixup": v2.MixUp(num_classes=classes)}[mix]
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's default generator
        torch.manual_seed(int(source[0]))
        return kind(pixels, labels)
