"""Routing as torch.library operations with autograd, and the public function `routing`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..launch import accumulation_dtype, device_of, implementation
from . import chunked, reference


def routing(
    u: Tensor,
    W: Tensor,
    *,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    sda_mean: str = "input",
    backend: str | None = None,
) -> Tensor:
    """Route input capsules to output capsules by agreement.

    Every input capsule i votes u_hat_ij = u_i W_ij for every output capsule j. Each iteration
    weighs the votes with couplings c_ij = softmax_j(b_ij), squashes their sum to v_j, and updates
    the logits b_ij from how well each vote agrees with v_j. Votes are recomputed, never stored.

    The result has the dtype to which those of u and W promote; sums are accumulated in float32,
    or float64 for float64. Autocast does not lower the precision of routing.

    Args:
        u: input capsules [B, N, K], floating point; B may be 0.
        W: transformation matrices [N, K, J, D], same device.
        iterations: routing iterations R >= 1; the first has equal couplings 1 / J.
        method: "rba", routing by agreement, adds the agreement u_hat_ij . v_j to b_ij; "sda",
            scaled-distance agreement, shortens votes to the length of their capsule and sets b_ij
            to their distance from v_j over the mean distance, scaled so that a vote at half the
            mean distance would have a coupling of 0.9.
        routing_grad: "final" treats the couplings and all iterations but the last as constants;
            "full" differentiates through every iteration.
        bias: added to the weighted sum before squash [J, D], or None.
        sda_mean: with method "sda" the mean distance is taken per input capsule, "input", or over
            batch, input and output capsules, "batch", as the published code of Momentum Capsule
            Networks does; then a sample's output depends on the others in its batch. "batch" runs
            on the reference implementation only.
        backend: None chooses by device; "reference" is eager PyTorch with all votes in memory;
            "chunked" is PyTorch with a few input capsules' votes in memory at a time, the choice
            for CPUs; "triton" is fused kernels, the choice for GPUs. The kernels have
            method "rba" with routing_grad "final"; on a GPU the rest runs chunked.
    Returns: output capsules [B, J, D], length of each in [0, 1).
    Raises: ValueError if a shape, dtype, device or option does not fit; the message says which.
    Source: Sabour et al. 2017, procedure 1 (rba); Peer et al. 2018, "gamma-capsules" (sda); see
        kernels/routing/README.md for the stateless form and both gradients.
    """
    checks.capsules_and_weight(u, W)
    checks.routing_options(iterations, method, routing_grad, sda_mean)
    if bias is not None:
        checks.tensor("bias", bias, "J D")
        if bias.shape != W.shape[2:] or bias.device != u.device:
            raise ValueError(
                f"bias must be [J, D] = {list(W.shape[2:])} on {u.device}; "
                f"got {list(bias.shape)} on {bias.device}"
            )
    chosen = implementation(u, backend, eager="chunked")
    if chosen == "triton" and (method, routing_grad) != ("rba", "final"):
        if backend == "triton":
            raise ValueError(
                'backend="triton" has method="rba" with routing_grad="final"; got '
                f'method="{method}" with routing_grad="{routing_grad}": use backend=None'
            )
        chosen = "chunked"
    if method == "sda" and sda_mean == "batch":
        if backend not in (None, "reference"):
            raise ValueError(f'sda_mean="batch" needs backend="reference" or None; got "{backend}"')
        chosen = "reference"
    if chosen == "reference":
        return _reference(u, W, iterations, method, routing_grad, bias, sda_mean)
    needs_grad = torch.is_grad_enabled() and (u.requires_grad or W.requires_grad)
    keep = needs_grad and iterations > 1
    keep = keep and (chosen, method, routing_grad) == ("chunked", "rba", "final")
    return routing_forward(u, W, bias, iterations, method, routing_grad, keep, chosen)[0]


def _reference(
    u: Tensor,
    W: Tensor,
    iterations: int,
    method: str,
    routing_grad: str,
    bias: Tensor | None,
    sda_mean: str,
) -> Tensor:
    dtype = torch.promote_types(u.dtype, W.dtype)
    with torch.autocast(u.device.type, enabled=False):
        return reference.routing(
            u.to(dtype),
            W.to(dtype),
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=None if bias is None else bias.to(dtype),
            sda_mean=sda_mean,
        )


@torch.library.custom_op("mocapsnet::routing_forward", mutates_args=())
def routing_forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, D], the sums of every iteration [R, B, J, D], and the kept couplings."""
    if backend == "triton":
        from . import triton

        with device_of(u):
            v, sums = triton.forward(u, W, bias, iterations)
        return v, sums, sums.new_empty(0)
    with torch.autocast(u.device.type, enabled=False):
        return chunked.forward(u, W, bias, iterations, method, keep)


@routing_forward.register_fake
def _(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, (J, D) = u.shape[0], W.shape[2:]
    acc = accumulation_dtype(u, W)
    return (
        u.new_empty(B, J, D, dtype=torch.promote_types(u.dtype, W.dtype)),
        u.new_empty(iterations, B, J, D, dtype=acc),
        u.new_empty(chunked.kept_shape(u, W, keep), dtype=acc),
    )


@torch.library.custom_op("mocapsnet::routing_backward", mutates_args=())
def routing_backward(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, N, K], dW [N, K, J, D] and dbias [J, D]."""
    if backend == "triton":
        from . import triton

        with device_of(u):
            return triton.backward(grad_v, u, W, sums)
    with torch.autocast(u.device.type, enabled=False):
        return chunked.backward(grad_v, u, W, sums, kept, method, routing_grad)


@routing_backward.register_fake
def _(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = W.new_empty(W.shape[2:], dtype=sums.dtype)
    return u.new_empty(u.shape), W.new_empty(W.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, W, bias, _, ctx.method, ctx.routing_grad, _, ctx.backend = inputs
    _, sums, kept = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(sums, kept)
    ctx.set_materialize_grads(False)  # else backward is given zeros as large as `kept`
    ctx.save_for_backward(u, W, sums, kept)


def _backward(ctx: Any, grad_v: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_v is None:
        return (None,) * 8
    du, dW, dbias = routing_backward(
        grad_v, *ctx.saved_tensors, ctx.method, ctx.routing_grad, ctx.backend
    )
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return du, dW, dbias, None, None, None, None, None


routing_forward.register_autograd(_backward, setup_context=_setup_context)
