"""A reversible stack of momentum capsule layers as one torch.library operation with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..launch import device_of, full_precision, implementation
from ..library import Operation
from ..routing.op import backward_flops, forward_flops
from . import chunked, reference
from .schedule import schedule


def momentum_routing(
    x: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    *,
    gamma: float = 0.9,
    anchor_every: int = 20,
    block_layers: int = 0,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    biases: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    """Pass capsules through momentum capsule layers, keeping no activations for backward.

    Layer after layer, v <- gamma v + (1 - gamma) routing(x, W);  x <- x + v. Kept for backward are
    anchors, (x, v) after the last layer and after every `anchor_every`-th: from them backward
    undoes layer after layer and differentiates it with the same votes.

    Args:
        x: capsules [B, J, D], float32 or float64.
        v: velocity before the first layer, like x.
        weights: W of every layer, [J, D, J, D], all of one dtype, no wider than that of x.
        gamma: momentum, between 0 and 1, both excluded.
        anchor_every: layers between anchors. A rounding error grows by 1 / gamma a layer, and
            more through the layers, as the state is traced back to the anchor before; see
            `MomentumStack.spacing`.
        block_layers: v is set to zero before every so many layers, and (x, v) stored; 0 for never.
        iterations, method, routing_grad: see `routing`.
        biases: of every layer, [J, D] each, or none.
        backend: None chooses by device: "triton" for GPUs, "chunked" for CPUs; "reference" keeps
            all activations and votes; see `routing`.
    Returns: x after the last layer [B, J, D].
    Raises: ValueError if a shape, dtype, device or option does not fit; the message says which.
    Source: Algorithms 1 and 2 of the Momentum Capsule Networks paper.
    """
    checks.routing_options(iterations, method, routing_grad, "input", "paper")
    checks.tensor("x", x, "B J D")
    checks.tensor("v", v, "B J D")
    if not weights:
        raise ValueError("weights must hold at least one layer's W")
    alike = (v.dtype, v.shape, v.device) == (x.dtype, x.shape, x.device)
    if x.dtype not in (torch.float32, torch.float64) or not alike:
        raise ValueError(
            f"x and v must be alike, float32 or float64; got x {x.dtype} {list(x.shape)} on "
            f"{x.device} and v {v.dtype} {list(v.shape)} on {v.device}"
        )
    shape = (*x.shape[1:], *x.shape[1:])
    for W in weights:
        checks.tensor("every W", W, "J D J D")
        if W.shape != shape or W.device != x.device or W.dtype != weights[0].dtype:
            raise ValueError(
                f"every W must be [J, D, J, D] = {list(shape)} on {x.device}, all of one dtype; "
                f"got {W.dtype} {list(W.shape)} on {W.device}"
            )
    if torch.promote_types(x.dtype, weights[0].dtype) != x.dtype:
        raise ValueError(f"x must be at least as wide as the weights, {weights[0].dtype}")
    if biases and (len(biases) != len(weights) or any(b.shape != shape[2:] for b in biases)):
        raise ValueError(f"biases must be none, or one [J, D] = {list(shape[2:])} for every W")
    if not 0 < gamma < 1 or anchor_every < 1 or block_layers < 0:
        raise ValueError(
            "gamma must lie between 0 and 1, anchor_every be at least 1 and block_layers at least "
            f"0; got {gamma}, {anchor_every} and {block_layers}"
        )
    backend = implementation(x, backend, eager="chunked", family="momentum")
    modes = (iterations, method, routing_grad)
    if backend == "reference":
        with full_precision(x):
            return reference.momentum_routing(x, v, weights, biases, gamma, block_layers, *modes)
    anchors = (gamma, anchor_every, block_layers)
    return momentum_forward(x, v, list(weights), list(biases), *anchors, *modes, backend)[0]


def _forward(
    x: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gamma: float,
    anchor_every: int,
    block_layers: int,
    iterations: int,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x [B, J, D] after the last layer, and the anchors, in the layout of the backend."""
    plan = schedule(len(weights), gamma, anchor_every, block_layers)
    if backend == "triton":
        from . import triton

        with device_of(x):
            return triton.forward(x, v, weights, biases, plan, iterations, method)
    with full_precision(x):
        return chunked.forward(x, v, weights, biases, plan, iterations, method)


def _forward_fake(
    x: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gamma: float,
    anchor_every: int,
    block_layers: int,
    iterations: int,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    A = len(schedule(len(weights), gamma, anchor_every, block_layers).anchors)
    B, J, D = x.shape
    anchor = (B, J, D) if backend == "triton" else (J, D, B)
    return x.new_empty(B, J, D), x.new_empty(A, 2, *anchor)


def _backward(
    dx: Tensor,
    anchors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gamma: float,
    anchor_every: int,
    block_layers: int,
    iterations: int,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dv [B, J, D] before the first layer, dW [L, J, D, J, D] and dbias [L, J, D] or [0]."""
    plan = schedule(len(weights), gamma, anchor_every, block_layers)
    modes = (iterations, method, routing_grad)
    if backend == "triton":
        from . import triton

        with device_of(dx):
            return triton.backward(dx, anchors, weights, biases, plan, *modes)
    with full_precision(dx):
        return chunked.backward(dx, anchors, weights, biases, plan, *modes)


def _backward_fake(
    dx: Tensor,
    anchors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gamma: float,
    anchor_every: int,
    block_layers: int,
    iterations: int,
    method: str,
    routing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L, W = len(weights), weights[0]
    dbias = anchors.new_empty(L, *W.shape[2:]) if biases else anchors.new_empty(0)
    x = anchors.new_empty(dx.shape)
    return x, torch.empty_like(x), W.new_empty(L, *W.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weights, biases, *ctx.options = inputs
    ctx.layers = len(weights)
    ctx.bias_dtypes = [b.dtype for b in biases]
    # The anchors stay differentiable, though nobody does it: by them a second derivative with
    # respect to x or v, which backward does not read, meets the refusal instead of finding nothing.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *weights, *biases)


def _gradients(ctx: Any, dx: Tensor | None, _: None) -> tuple[Any, ...]:
    rest = (None,) * len(ctx.options)
    if dx is None:
        none = [None] * ctx.layers
        return (None, None, none, [None] * len(ctx.bias_dtypes), *rest)
    anchors, *saved = ctx.saved_tensors
    weights, biases = saved[: ctx.layers], saved[ctx.layers :]
    dx, dv, dW, dbias = momentum_backward(dx, anchors, weights, biases, *ctx.options)
    dbiases = [b.to(dtype) for b, dtype in zip(dbias, ctx.bias_dtypes, strict=True)]
    return dx, dv, list(dW.unbind()), dbiases, *rest


def _layout(args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[int, int]:
    """Where x and the anchors have the batch."""
    return 0, 2 if args[-1] == "triton" else 4


def _forward_flops(x: Tensor, v: Tensor, weights: list[Tensor], biases: Any, *options: Any) -> int:
    return len(weights) * forward_flops(x, weights[0], options[3])


def _backward_flops(
    dx: Tensor, anchors: Tensor, weights: list[Tensor], biases: Any, *options: Any
) -> int:
    """Layers are run again."""
    layer = forward_flops(dx, weights[0], options[3])
    return len(weights) * (layer + backward_flops(dx, weights[0], options[3], options[5]))


momentum_forward = Operation(
    "momentum_forward",
    _forward,
    _forward_fake,
    batched=2,
    layout=_layout,
    flops=_forward_flops,
)
momentum_backward = Operation("momentum_backward", _backward, _backward_fake, flops=_backward_flops)
momentum_forward.differentiate(_gradients, _setup_context)
momentum_backward.refuse_derivative()
