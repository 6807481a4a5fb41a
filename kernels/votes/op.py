"""Votes as a torch.library operation with autograd, and the public function `votes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..launch import device_of, full_precision, implementation
from ..library import Operation
from . import reference


def votes(u: Tensor, W: Tensor, *, backend: str | None = None) -> Tensor:
    """Predict every output capsule from every input capsule: u_hat_ij = u_i W_ij.

    `routing` never needs the votes as a whole; this function is for those who do.

    Args:
        u: input capsules [B, N, K], floating point.
        W: transformation matrices [N, K, J, D], same device. Two dtypes are promoted to one.
        backend: None chooses by device; "reference" is eager PyTorch, the choice for CPUs;
            "triton" is a kernel, the choice for GPUs.
    Returns: votes [B, N, J, D].
    Raises: ValueError if shapes, dtypes or devices do not fit, or the backend is unknown or cannot
        run here.
    Source: Sabour et al. 2017, equation 2.
    """
    checks.capsules_and_weight(u, W)
    dtype = torch.promote_types(u.dtype, W.dtype)
    if implementation(u, backend, eager="reference", family="votes") == "reference":
        with full_precision(u):
            return reference.votes(u.to(dtype), W.to(dtype))
    return votes_forward(u, W)


def _forward(u: Tensor, W: Tensor) -> Tensor:
    from . import triton

    with device_of(u):
        return triton.forward(u, W)


def _forward_fake(u: Tensor, W: Tensor) -> Tensor:
    B, (N, _, J, D) = u.shape[0], W.shape
    return u.new_empty(B, N, J, D, dtype=torch.promote_types(u.dtype, W.dtype))


def _backward(grad: Tensor, u: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    from . import triton

    with device_of(grad):
        return triton.backward(grad, u, W)


def _backward_fake(grad: Tensor, u: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), W.new_empty(W.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return votes_backward(grad, *ctx.saved_tensors)


def _flops(u: Tensor, W: Tensor) -> int:
    return 2 * len(u) * W.numel()


votes_forward = Operation("votes", _forward, _forward_fake, batched=1, flops=_flops)
votes_backward = Operation(
    "votes_backward", _backward, _backward_fake, flops=lambda grad, u, W: 2 * _flops(u, W)
)
votes_forward.differentiate(_gradients, _setup_context)
votes_backward.refuse_derivative()
