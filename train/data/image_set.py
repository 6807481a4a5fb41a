"""What a data set is once it is read, and every check on what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocapsnet.train.errors import InputError


class Known(NamedTuple):
    """What a run that is to be tested knows of its images; empty where it does not say."""

    classes: tuple[str, ...] = ()
    image_shape: tuple[int, ...] = ()


UNKNOWN = Known()


@dataclass(frozen=True)
class ImageSet:
    """Images [N, C, H, W] uint8 in 0..255 and labels [N] int64, on one device.

    Attributes:
        classes: the names of the classes, the k-th that of label k; empty if they have none.
        names: of the image files, below the data set's folder; empty for data sets with a name.
        files: a digest of the names of all that they were read from, or drawn from; empty likewise.
        drawn: whether they are a share of these files, and others the rest.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    files: str = ""
    drawn: bool = False

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        C, H, W = self.images.shape[1:]
        return C, H, W

    def name(self, label: int) -> str:
        """What to call a class in a picture or a report: its name, or its number."""
        return self.classes[label] if self.classes else str(label)

    def title(self, index: int) -> str:
        """What to call an image in a report: its number, and its file if it is one."""
        return f"image {index}" + (f" ({self.names[index]})" if self.names else "")

    def to(self, device: torch.device) -> ImageSet:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> ImageSet:
        """These images, in this order."""
        indices = indices.to(self.labels.device)
        names = tuple(self.names[i] for i in indices.tolist()) if self.names else ()
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, names=names)

    def first(self, count: int | None) -> ImageSet:
        """The first `count` images, or all of them."""
        images, labels = self.images[:count], self.labels[:count]
        return replace(self, images=images, labels=labels, names=self.names[:count])


def image_set(
    images: Any,
    labels: Any,
    classes: Sequence[str],
    files: tuple[str | Path, str | Path],
    image_shape: tuple[int, int, int] | None = None,
) -> ImageSet:
    """Check what a reader found, and make an image set of it.

    Args:
        images: [N, C, H, W] bytes, array or tensor.
        labels: [N] integers in 0..len(classes) - 1.
        files: where the images and where the labels were read, for messages.
        image_shape: (C, H, W) that the images must have (None: any).
    Raises: InputError naming the file and the first value that cannot be right.
    """
    pixels, numbers = np.asarray(images), np.asarray(labels)
    image_file, label_file = files
    if pixels.dtype != np.uint8:
        raise InputError(
            f"{image_file}: pixels are {pixels.dtype}, but must be bytes (uint8) in 0..255"
        )
    if pixels.ndim != 4 or (image_shape is not None and pixels.shape[1:] != image_shape):
        wanted = "[N, C, H, W]" if image_shape is None else f"{_by(image_shape)} (C x H x W)"
        raise InputError(f"{image_file}: images are {_by(pixels.shape[1:])}, but must be {wanted}")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise InputError(
            f"{label_file}: labels are {numbers.dtype} of shape {list(numbers.shape)}, but must be "
            "one integer per image"
        )
    if len(pixels) != len(numbers):
        raise InputError(
            f"{image_file} holds {len(pixels):,} images, but {label_file} holds {len(numbers):,} "
            "labels; they do not belong together"
        )
    if not len(pixels):
        raise InputError(f"{image_file} holds no images")
    outside = (numbers < 0) | (numbers >= len(classes))
    if outside.any():
        first = int(outside.argmax())
        raise InputError(
            f"{label_file}: label {numbers[first]} of image {first} (counted from 0) is outside "
            f"0..{len(classes) - 1}, the {len(classes)} classes; {int(outside.sum()):,} of "
            f"{len(numbers):,} labels are"
        )
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.from_numpy(numbers.astype(np.int64)),
        tuple(classes),
    )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
