"""Reading images of every usual kind: tensors, arrays, PIL images and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .preprocessing import fit_channels, fit_size, to_pixels


def read(images: Any, image_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Pixels in [0, 1] [B, *image_shape], float32, of one image or many.

    Args:
        images: a path, a PIL image, a tensor or an array: [H, W], [C, H, W], [H, W, C],
            [B, C, H, W] or [B, H, W, C], uint8, bool, or floating point in [0, 1]. Or a sequence of
            single images of any of these kinds, whose sizes may differ; for a network of grey
            images one in colour [C, H, W] is given so, as alone it may be a batch of them.
        image_shape: channels, height and width that the network wants. Other sizes are scaled and
            cut, see `fit_size`; colour, grey and transparency are converted, see `fit_channels`.
        device: where the pixels go.
    Raises: ValueError that names the first image which cannot be read.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not images:
            raise ValueError("images must hold at least one image; got an empty sequence")
        parts = [
            _pixels(image, image_shape, device, f"image {n}", True)
            for n, image in enumerate(images)
        ]
        for n, part in enumerate(parts):
            if len(part) != 1:
                raise ValueError(
                    f"image {n} of the sequence is a batch of {len(part)}: give a batch alone, or "
                    "a sequence of single images"
                )
        return torch.cat(parts)
    return _pixels(images, image_shape, device, "images", False)


def _pixels(
    image: Any, image_shape: tuple[int, int, int], device: torch.device, name: str, single: bool
) -> Tensor:
    channels, height, width = image_shape
    try:
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            image = _open(name)
        if hasattr(image, "getbands"):  # a PIL image, recognised without importing PIL
            image, single = fit(image, (height, width), channels), True
        pixels = _scaled(_tensor(image, channels, single).to(device))
        return fit_size(fit_channels(pixels, channels), height, width)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def fit(image: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """Bytes [C, H, W] of a PIL image, as training and prediction see it.

    Upright, 16 bits cut to 8, grey or colour as asked and without transparency, scaled to cover
    size (height, width), and cut around the centre.

    Raises: ValueError if its pixels are floating point, or integers of more than 16 bits.
    """
    from PIL import Image, ImageOps

    is_file = image.format is not None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert() would cut off what is above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are outside 0..65535: save it with 8 or 16 bits a pixel")
        if not is_file and 0 < values.max() <= 255:
            raise ValueError(
                "its integers are all within 0..255, which is next to black with 16 bits a pixel: "
                "give an array of uint8, or an image of 8 bits"
            )
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point: save it with 8 or 16 bits a pixel")
    if (image.mode, channels) != ("RGBA", 4):
        image = image.convert("L" if channels == 1 else "RGB")
    if image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    array = np.array(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _open(path: str) -> Any:
    """An image file as a PIL image, decoded."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'reading image files needs Pillow: pip install "mocapsnet[train]", or pip install '
            "pillow; tensors and arrays need nothing"
        ) from error
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except Exception as error:  # decoders fail on damaged files in any way
        raise ValueError(f"cannot be read as an image: {error}") from error


def _tensor(image: Any, channels: int, single: bool) -> Tensor:
    """[B, C, H, W] in any dtype, of a `single` image, or of that or a batch."""
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(image))
    elif isinstance(image, Tensor):
        tensor = image.detach()
    else:
        raise ValueError(
            f"not a path, a PIL image, a tensor or an array, but {type(image).__name__}"
        )
    allowed = (channels, 1, 3, 4)
    if not single and tensor.dim() == 3 and channels == 1 and tensor.shape[0] in (3, 4):
        raise ValueError(
            f"{list(image.shape)} may be one image in colour or {len(image)} grey ones: give the "
            "one as [image], and grey ones as images[:, None]"
        )
    if tensor.dim() in (2, 3):
        tensor = tensor[(None,) * (4 - tensor.dim())]
    if tensor.dim() == 4 and tensor.shape[1] not in allowed and tensor.shape[3] in allowed:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.dim() != 4 or tensor.shape[1] not in allowed or 0 in tensor.shape[2:]:
        raise ValueError(
            "the shape must be [H, W], [C, H, W], [H, W, C], [B, C, H, W] or [B, H, W, C], with C "
            f"{' or '.join(map(str, sorted(set(allowed))))}; got {list(image.shape)}: a batch of "
            "grey images gets its channel by images[:, None]"
        )
    return tensor


def _scaled(images: Tensor) -> Tensor:
    """float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return to_pixels(images)
    if images.dtype == torch.bool:
        return images.float()
    if not images.is_floating_point():
        raise ValueError(
            f"pixels must be uint8, bool or floating point; got {images.dtype}: values of 0 to 255 "
            "become uint8 by images.to(torch.uint8)"
        )
    images = images.float()
    if images.numel() and not ((images >= 0) & (images <= 1)).all():
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"floating-point pixels must lie in [0, 1]; got {low:g} to {high:g}: divide them by "
            "the greatest possible one, and leave normalising to the model"
        )
    return images
