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
            single images of any of these kinds, whose sizes may differ.
        image_shape: channels, height and width that the network wants. Other sizes are scaled and
            cut, see `fit_size`; colour, grey and transparency are converted, see `fit_channels`.
        device: where the pixels go.
    Raises: ValueError that names the first image which cannot be read.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not images:
            raise ValueError("images must hold at least one image; got an empty sequence")
        parts = [
            _pixels(image, image_shape, device, f"image {n}") for n, image in enumerate(images)
        ]
        for n, part in enumerate(parts):
            if len(part) != 1:
                raise ValueError(
                    f"image {n} of the sequence is a batch of {len(part)}: give a batch alone, or "
                    "a sequence of single images"
                )
        return torch.cat(parts)
    return _pixels(images, image_shape, device, "images")


def _pixels(
    image: Any, image_shape: tuple[int, int, int], device: torch.device, name: str
) -> Tensor:
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        image = _open(name)
    pixels = _scaled(_tensor(image, image_shape[0], name).to(device), name)
    try:
        return fit_size(fit_channels(pixels, image_shape[0]), *image_shape[1:])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _open(path: str) -> Any:
    """An image file as a PIL image, turned as its camera says."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            'reading image files needs Pillow: pip install "mocapsnet[train]", or pip install '
            "pillow; tensors and arrays need nothing"
        ) from error
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _tensor(image: Any, channels: int, name: str) -> Tensor:
    """[B, C, H, W] in any dtype, of a single image or a batch."""
    if hasattr(image, "getbands"):  # a PIL image, recognised without importing PIL
        return _of_pil(image, name)
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(image))
    elif isinstance(image, Tensor):
        tensor = image.detach()
    else:
        raise ValueError(
            f"{name} must be a path, a PIL image, a tensor or an array; got {type(image).__name__}"
        )
    allowed = (channels, 1, 3, 4)
    if tensor.dim() in (2, 3):
        tensor = tensor[(None,) * (4 - tensor.dim())]
    if tensor.dim() == 4 and tensor.shape[1] not in allowed and tensor.shape[3] in allowed:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.dim() != 4 or tensor.shape[1] not in allowed or 0 in tensor.shape[2:]:
        raise ValueError(
            f"{name} must be [H, W], [C, H, W], [H, W, C], [B, C, H, W] or [B, H, W, C], with C "
            f"{' or '.join(map(str, sorted(set(allowed))))}; got shape {list(image.shape)}: a "
            "batch of grey images gets its channel by images[:, None]"
        )
    return tensor


def _of_pil(image: Any, name: str) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits a pixel, whatever the type that holds them
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has pixels outside 0..65535: give an image of 8 or 16 bits")
        return torch.from_numpy(values / 65535)[None, None]
    if image.mode == "F":
        return torch.from_numpy(np.array(image))[None, None]
    transparent = "A" in image.getbands() or "transparency" in image.info
    grey = image.mode in ("1", "L") and not transparent
    image = image.convert("RGBA" if transparent else "L" if grey else "RGB")
    values = np.array(image)
    return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1)[
        None
    ]


def _scaled(images: Tensor, name: str) -> Tensor:
    """float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return to_pixels(images)
    if images.dtype == torch.bool:
        return images.float()
    if not images.is_floating_point():
        raise ValueError(
            f"{name} must be uint8, bool or floating point; got {images.dtype}: values of 0 to 255 "
            "become uint8 by images.to(torch.uint8)"
        )
    images = images.float()
    if images.numel() and not ((images >= 0) & (images <= 1)).all():
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"{name} of floating point must lie in [0, 1]; got values from {low:g} to {high:g}: "
            "divide them by the greatest possible one, and leave normalising to the model"
        )
    return images
