"""Squash as a torch.library operation with autograd, and the public function `squash`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..launch import device_of, implementation
from ..library import Operation
from . import reference


def squash(s: Tensor, *, backend: str | None = None) -> Tensor:
    """Shorten every vector of the last dimension to a length in [0, 1), keeping its direction.

    squash(s) = |s| / (1 + |s|^2) * s. A zero vector stays zero and passes a zero gradient.

    Args:
        s: vectors [..., D], floating point.
        backend: None chooses by device; "reference" is eager PyTorch, the choice for CPUs;
            "triton" is a kernel, the choice for GPUs.
    Returns: squashed vectors [..., D], dtype of `s`.
    Raises: ValueError if `s` is not a floating-point tensor with at least one dimension, or the
        backend is unknown or cannot run here.
    Source: Sabour et al. 2017, equation 1.
    """
    if not isinstance(s, Tensor) or not s.is_floating_point() or s.dim() == 0:
        got = f"{s.dtype} {list(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
        raise ValueError(f"s must be a floating-point tensor [..., D]; got {got}")
    if implementation(s, backend, eager="reference", family="squash") == "reference":
        return reference.squash(s)
    return squash_forward(s.unsqueeze(0)).squeeze(0) if s.dim() == 1 else squash_forward(s)


def _forward(s: Tensor) -> Tensor:
    from . import triton

    with device_of(s):
        return triton.forward(s)


def _backward(dv: Tensor, s: Tensor) -> Tensor:
    from . import triton

    with device_of(s):
        return triton.backward(s, dv)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dv: Tensor) -> Tensor:
    return squash_backward(dv, *ctx.saved_tensors)


squash_forward = Operation("squash", _forward, fake=lambda s: s.new_empty(s.shape), batched=1)
squash_backward = Operation("squash_backward", _backward, fake=lambda dv, s: s.new_empty(s.shape))
squash_forward.differentiate(_gradients, _setup_context)
squash_backward.refuse_derivative()
