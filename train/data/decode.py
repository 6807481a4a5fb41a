"""Image files to bytes of one shape, in parallel, as prediction reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mocapsnet.images import fit

# Images of different sizes become squares of this many pixels, unless a size is asked for.
DEFAULT_SIZE = 32

# Images a thread works on at a time.
CHUNK = 64

# Pillow's modes of images without colour.
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}

Found = TypeVar("Found")


def decode(
    paths: list[str], image_size: int | None, quiet: bool, shape: Sequence[int] = ()
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Decode image files to one shape.

    Args:
        image_size: height and width (None: that of the files, or DEFAULT_SIZE if they differ).
        quiet: show no progress.
        shape: channels, height and width, instead.
    Returns: images [M, C, H, W] uint8, with one channel if all are grey, else three; which of
        `paths` they are [M], ascending; path and fault of each that cannot be decoded.
    """
    heads = list(_each(_head, paths, "looking at images", quiet))
    good = [head for head in heads if not isinstance(head, str)]
    if not good:
        return (
            torch.zeros(0, 1, 1, 1, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.int64),
            [(path, str(fault)) for path, fault in zip(paths, heads, strict=True)],
        )
    sizes = {size for size, _ in good}
    if shape:
        height, width = shape[1:]
    elif image_size is not None:
        width, height = image_size, image_size
    elif len(sizes) == 1:
        width, height = sizes.pop()
    else:
        width, height = DEFAULT_SIZE, DEFAULT_SIZE
        if not quiet:
            print(
                f"the images are of {len(sizes):,} sizes, and become {width}x{height}; "
                "--image-size sets another",
                flush=True,
            )
    channels = shape[0] if shape else 1 if all(grey for _, grey in good) else 3

    def pixels(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return fit(image, (height, width), channels)

    images = np.empty((len(paths), channels, height, width), np.uint8)
    kept: list[int] = []
    faults: list[tuple[str, str]] = []
    for i, found in enumerate(_each(pixels, paths, "decoding images", quiet)):
        if isinstance(found, str):
            faults.append((paths[i], found))
        else:
            images[len(kept)] = found
            kept.append(i)
    return torch.from_numpy(images[: len(kept)]), torch.tensor(kept, dtype=torch.int64), faults


def _each(
    work: Callable[[str], Found], paths: list[str], text: str, quiet: bool
) -> Iterator[Found | str]:
    """The result of `work` for each path, or its fault, in their order. Threads do the work: most
    of it is Pillow's, which lets others run meanwhile."""

    def attempt(path: str) -> Found | str:
        try:
            return work(path)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - decoders fail on damaged files in any way
            return f"{type(error).__name__}: {error}".replace(f" {path!r}", "")

    def attempt_all(chunk: list[str]) -> list[Found | str]:
        return [attempt(path) for path in chunk]

    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    # disable=None: no bar where the output is not a terminal.
    bar = tqdm(total=len(paths), desc=text, unit=" images", disable=True if quiet else None)
    with bar, ThreadPoolExecutor() as pool:
        for results in pool.map(attempt_all, chunks):
            yield from results
            bar.update(len(results))


def _head(path: str) -> tuple[tuple[int, int], bool]:
    """Size (width, height) and whether the image is grey, without decoding it."""
    with Image.open(path) as image:
        width, height = image.size
        # Only for JPEG is this known before the pixels are.
        if image.format == "JPEG" and image.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        return (width, height), image.mode in GREY
