"""From an image to what a network is given: the same in training, testing and prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import checks


def to_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [0, 1]."""
    return images.float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """Zero mean and unit variance over each image [C, H, W]; a constant image becomes zero."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    centred = pixels - mean
    std = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    # The least std of an 8-bit image that is not constant is 1/255 sqrt((1 - 1/n)/n) for n values.
    n = pixels.shape[1:].numel()
    return centred / std.clamp_min(0.5 / 255 / n**0.5)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to pixels before a network sees them.

    Args:
        normalisation: "image", zero mean and unit variance of each image, as in the paper; "fixed",
            `mean` and `std` of each channel, one value or one per channel; "none", pixels as they
            are.
        mean, std: for "fixed" only, on the scale of pixels in [0, 1].
    Shapes: pixels in [0, 1] [B, C, H, W] -> the same, normalised.
    Raises: ValueError if the normalisation is unknown, or mean and std do not go with it.
    """

    normalisation: str = "image"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.choice("normalisation", self.normalisation, ("image", "fixed", "none"))
        given = self.mean is not None and self.std is not None
        if self.normalisation != "fixed":
            if self.mean is not None or self.std is not None:
                raise ValueError(
                    'mean and std go with normalisation="fixed" only; got '
                    f"normalisation={self.normalisation!r}"
                )
            return
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        if not given or len(self.mean or ()) != len(self.std or ()) or not self.mean:
            raise ValueError(
                'normalisation="fixed" needs mean and std, each of one value or one per channel; '
                f"got mean={self.mean} and std={self.std}"
            )
        for mean, std in zip(self.mean, self.std or (), strict=True):
            checks.number("mean", mean, 0, 1)
            checks.number("std", std, 1e-6)

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.normalisation == "image":
            return normalise(pixels)
        if self.normalisation == "none":
            return pixels
        mean, std = (
            torch.stack([pixels.new_full((1, 1), value) for value in values or ()])  # no copy waits
            for values in (self.mean, self.std)
        )
        if mean.numel() not in (1, pixels.shape[1]):
            raise ValueError(
                f"mean and std have {mean.numel()} channels, the images {pixels.shape[1]}"
            )
        return (pixels - mean) / std


def fit_channels(pixels: Tensor, channels: int) -> Tensor:
    """Pixels [B, C, H, W] in [0, 1] with another number of channels.

    Colour becomes grey by its luma (0.299 red, 0.587 green, 0.114 blue), grey becomes three equal
    channels, and transparency is left out. Raises: ValueError for any other pair of numbers.
    """
    given = pixels.shape[1]
    if given == channels:
        return pixels
    if given == 4:
        return fit_channels(pixels[:, :3], channels)
    if (given, channels) == (3, 1):
        luma = pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        return (pixels * luma).sum(1, True).clamp(max=1)  # white is 1.0000001 without
    if (given, channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1)
    raise ValueError(f"images of {given} channels cannot be made into {channels} channels")


def fit_size(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels [B, C, H, W] in [0, 1] scaled to cover height x width, and cut around the centre."""
    H, W = pixels.shape[-2:]
    if (H, W) == (height, width):
        return pixels
    scale = max(height / H, width / W)
    size = [max(height, round(H * scale)), max(width, round(W * scale))]
    if size != [H, W]:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
