"""What a training needs at least, before anything is allocated."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch

from mocapsnet import CapsNetConfig, ConvMoCapsNetConfig, ResNetConfig
from mocapsnet.train.errors import InputError
from mocapsnet.train.options import OptimOptions

# Float32 numbers that are kept for a parameter: itself, its gradient, the optimiser's.
KEPT = {"adam": 2 + 2, "ranger21": 2 + 5}


def check_fit(
    config: CapsNetConfig | ConvMoCapsNetConfig | ResNetConfig,
    options: OptimOptions,
    images: int,
    device: torch.device,
) -> None:
    """Refuse sizes that cannot fit; what fits by this count may still not, as it is the least.

    Args:
        images: that are in a process's memory at once in a step.
    Raises: InputError with what was asked for, and what there is.
    """
    state = 4 * KEPT[options.optimizer] * config.parameters
    features = 4 * images * feature_numbers(config)
    free = free_bytes(device)
    if state + features <= free:
        return
    remedy = (
        "a smaller network, such as one of fewer --channels or --capsules, needs less"
        if state > features
        else "a smaller --batch-size needs less, and so does --gradient-accumulation with batches "
        "of the same size"
    )
    raise InputError(
        f"this training needs at least {_gib(state + features)} of memory and {_gib(free)} are "
        f"free on {device.type}: {_gib(state)} for weights, gradients and optimiser, "
        f"{_gib(features)} for what the convolutions make of {images} images; {remedy}"
    )


def feature_numbers(config: CapsNetConfig | ConvMoCapsNetConfig | ResNetConfig) -> int:
    """What the convolutions make of an image at least, all of which the backward pass needs."""
    if not isinstance(config, CapsNetConfig):
        return config.stem_numbers
    height, width = (size - config.kernel_size + 1 for size in config.image_shape[1:])
    return config.channels * (height * width + math.prod(config.feature_size))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had, swap included; on Linux as far as a container may go."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return free


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
