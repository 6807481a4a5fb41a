"""Primary capsules as a torch.library operation with autograd, and `primary_capsules`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..launch import device_of, implementation
from ..library import Operation
from . import reference


def primary_capsules(features: Tensor, dim: int, *, backend: str | None = None) -> Tensor:
    """Turn a convolution's output into squashed primary capsules.

    A capsule is made of `dim` neighbouring channels at one position. Capsules are ordered by
    channel group, then row, then column.

    Args:
        features: feature maps [B, C, H, Wd], floating point, C a multiple of `dim`; contiguous or
            channels-last.
        dim: components per capsule.
        backend: None chooses by device; "reference" is eager PyTorch, the choice for CPUs;
            "triton" regroups and squashes in one pass, the choice for GPUs.
    Returns: capsules [B, (C // dim) * H * Wd, dim], length of each in [0, 1), dtype of `features`.
    Raises: ValueError if `features` has another rank or dtype, C is not a multiple of `dim`, or
        the backend is unknown or cannot run here.
    Source: Sabour et al. 2017, section 4.
    """
    checks.tensor("features", features, "B C H Wd")
    if dim < 1 or features.shape[1] % dim:
        raise ValueError(
            f"the {features.shape[1]} channels of features {list(features.shape)} cannot be "
            f"grouped into capsules of dim={dim}: use a positive divisor of the channel count"
        )
    if implementation(features, backend, eager="reference", family="primary") == "reference":
        return reference.primary_capsules(features, dim)
    return primary_forward(features, dim)


def dense(features: Tensor) -> Tensor:
    """The feature maps themselves if contiguous or channels-last, else a contiguous copy."""
    if features.is_contiguous(memory_format=torch.channels_last):
        return features
    return features.contiguous()


def _forward(features: Tensor, dim: int) -> Tensor:
    from . import triton

    with device_of(features):
        return triton.forward(dense(features), dim)


def _forward_fake(features: Tensor, dim: int) -> Tensor:
    B, C, H, Wd = features.shape
    return features.new_empty(B, C // dim * H * Wd, dim)


def _backward(dv: Tensor, features: Tensor, dim: int) -> Tensor:
    from . import triton

    with device_of(features):
        return triton.backward(dense(features), dv, dim)


def _backward_fake(dv: Tensor, features: Tensor, dim: int) -> Tensor:
    return torch.empty_like(dense(features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.dim = inputs
    ctx.save_for_backward(features)


def _gradients(ctx: Any, dv: Tensor) -> tuple[Tensor, None]:
    return primary_backward(dv, *ctx.saved_tensors, ctx.dim), None


primary_forward = Operation("primary_capsules", _forward, _forward_fake, batched=1)
primary_backward = Operation("primary_capsules_backward", _backward, _backward_fake)
primary_forward.differentiate(_gradients, _setup_context)
primary_backward.refuse_derivative()
