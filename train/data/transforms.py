"""Random crops and the order of an epoch, on whole batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Beside a run's seed, where an epoch's crops have the epoch; no run has so many.
TEST_CROPS = 2**32 - 1


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


def test_offsets(count: int, pad: int, seed: int) -> Tensor:
    """Where test images are cropped that are not tested as they are: row and column offsets
    [count, 2] in 0..2 pad, drawn on the CPU from the seed alone, the same in every epoch."""
    state = np.random.SeedSequence([seed, TEST_CROPS]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)


def random_crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Pad with black, then cut each image back to its size at its own offset.

    An offset of (pad, pad) is the centre crop, which gives back the image itself: tests of
    centre crops therefore use the images as they are.

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
