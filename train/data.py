"""Image data sets as uint8 tensors on the device, and their batched transforms.

Readers return whole data sets; nothing here touches an image one at a time in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocapsnet.train.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """Images [N, C, H, W] uint8 in 0..255 and labels [N] int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def first(self, count: int | None) -> ImageSet:
        """The first `count` images, or all of them."""
        return ImageSet(self.images[:count], self.labels[:count])


# Files of each data set below --data-dir, as torchvision reads them.
_MNIST_FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
FILES: dict[str, list[str]] = {
    "digits": [],
    "mnist": [f"MNIST/raw/{name}" for name in _MNIST_FILES],
    "fashion-mnist": [f"FashionMNIST/raw/{name}" for name in _MNIST_FILES],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "cifar10": [
        *(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
    ],
    "cifar100": [f"cifar-100-python/{name}" for name in ("train", "test", "meta")],
}

_PLACING = {
    "mnist": "Files that end in .gz must be unpacked (gunzip).",
    "fashion-mnist": "Files that end in .gz must be unpacked (gunzip); on Debian and Ubuntu the "
    "package dataset-fashion-mnist holds them.",
    "svhn": "These are the data set's cropped digits (format 2).",
    "cifar10": "They are the contents of cifar-10-python.tar.gz.",
    "cifar100": "They are the contents of cifar-100-python.tar.gz.",
}


def load(name: str, data_dir: str, download: bool) -> tuple[ImageSet, ImageSet]:
    """Read a data set's training and test images onto the CPU.

    Args:
        name: one of FILES.
        data_dir: folder below which the files lie (not used for digits).
        download: fetch missing files; without it nothing is ever fetched.
    Raises: InputError that lists the missing files, or says which cannot be read.
    """
    if name == "digits":
        return _digits()
    from torchvision import datasets as tv

    root = Path(data_dir)
    missing = [file for file in FILES[name] if not (root / file).is_file()]
    if missing and not download:
        listing = "\n".join(f"  {root / file}" for file in missing)
        raise InputError(
            f"{name}: missing below --data-dir {data_dir}:\n{listing}\n"
            f"Add --download to fetch them, or place them there. {_PLACING[name]}"
        )
    reader: Any = {
        "mnist": tv.MNIST,
        "fashion-mnist": tv.FashionMNIST,
        "svhn": tv.SVHN,
        "cifar10": tv.CIFAR10,
        "cifar100": tv.CIFAR100,
    }[name]
    try:
        if name == "svhn":
            splits = [reader(root, split=s, download=bool(missing)) for s in ("train", "test")]
            return _image_set(splits[0].data, splits[0].labels), _image_set(
                splits[1].data, splits[1].labels
            )
        splits = [reader(root, train=t, download=bool(missing)) for t in (True, False)]
    except (RuntimeError, OSError, ValueError) as error:
        files = "\n".join(f"  {root / file}" for file in FILES[name])
        raise InputError(
            f"{name}: cannot read the data ({error}). Expected, complete and unaltered:\n{files}"
        ) from error
    train, test = (_image_set(split.data, split.targets) for split in splits)
    return train, test


def _image_set(images: Any, labels: Any) -> ImageSet:
    """From what torchvision reads: [N, H, W] MNIST, [N, H, W, 3] CIFAR, [N, 3, H, W] SVHN."""
    pixels = torch.as_tensor(np.ascontiguousarray(images), dtype=torch.uint8)
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(1)
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return ImageSet(pixels.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64))


def _digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 scans of 8x8; a quarter of each class is held out, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    a, b, c, d = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    return _image_set(a, c), _image_set(b, d)


def epoch_order(count: int, pad: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The order of the images in one epoch, and where each of them is cropped.

    Drawn for the whole epoch on the CPU from (seed, epoch) alone, so it is the same on every
    device, for any number of processes, and after a resume.

    Returns: permutation [count] int64; row and column offsets [count, 2] int64 in 0..2 pad, the
        k-th for the k-th image of the permutation.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    order = torch.randperm(count, generator=generator)
    return order, torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)


def random_crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Pad with black, then cut each image back to its size at its own offset.

    An offset of (pad, pad) is the centre crop, which gives back the image itself: testing
    therefore uses the images as they are.

    Args:
        images: [B, C, H, W], any dtype.
        offsets: [B, 2] int64, row and column in 0..2 pad.
    Returns: [B, C, H, W].
    """
    B, C, H, W = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = offsets[:, 0, None] + torch.arange(H, device=images.device)  # [B, H]
    columns = offsets[:, 1, None] + torch.arange(W, device=images.device)  # [B, W]
    sample = torch.arange(B, device=images.device)[:, None, None, None]
    channel = torch.arange(C, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def training_batch(
    train_set: ImageSet, indices: Tensor, offsets: Tensor, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step works on.

    Args:
        indices: [B] int64, which images.
        offsets: [B, 2] int64, where each is cropped, see `random_crop`.
    Returns: normalised images [B, C, H, W], their pixels in [0, 1], labels [B].
    """
    pixels = to_pixels(random_crop(train_set.images[indices], offsets, pad))
    return normalise(pixels), pixels, train_set.labels[indices]


def to_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [0, 1]."""
    return images.float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """Zero mean and unit variance over each image [C, H, W]; a constant image becomes zero."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    centred = pixels - mean
    std = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    # The least std of an 8-bit image that is not constant is 1/255 sqrt((1 - 1/n)/n) for n values.
    n = pixels[0].numel() if len(pixels) else 1
    return centred / std.clamp_min(0.5 / 255 / n**0.5)
