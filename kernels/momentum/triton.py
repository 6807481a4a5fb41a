"""Launches the Triton kernels of a stack of momentum capsule layers.

If one program can hold a sample's votes, each run of layers between two anchors is one launch
forward; backward takes a launch and the weight gradient's for as many layers as the terms between
them may take memory. Else every layer is launched on its own.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..launch import accumulation_type, launch, padded
from ..routing import plans
from ..routing import triton as routing
from ..routing.reference import distance_scale
from ..routing.weight_gradient import weight_gradient
from .on_chip import momentum_backward_kernel, momentum_forward_kernel
from .schedule import Schedule

TERMS_BYTES = 8 << 20
"""What backward may hold between its two launches."""


def on_chip(
    x: Tensor, W: Tensor, direction: str, iterations: int, method: str, routing_grad: str = ""
) -> plans.Plan | None:
    """The plan for the on-chip form, or None if a sample's votes are too many.

    For x [B, J, D] and the W of a layer, and a direction, see `tuning.Problem`.
    """
    modes = iterations, method, routing_grad
    plan = plans.chosen(x, W, direction, *modes, operation="momentum")
    return plan if plan.on_chip and len(x) else None


def table(weights: list[Tensor]) -> Tensor:
    """The addresses of the layers' weights on their device, int64 [L]."""
    if weights[0].is_meta:
        return torch.empty(len(weights), dtype=torch.int64, device="meta")
    return addresses(tuple(W.data_ptr() for W in weights), weights[0].device)


def alignment(weights: list[Tensor]) -> int:
    """The greatest power of two, up to 16, that divides the addresses of all weights.

    Triton finds it out itself for a tensor that is passed to a kernel, not for one in a table.
    PyTorch's allocations are multiples of 16; views into a flat buffer need not be.
    """
    return math.gcd(16, *(W.data_ptr() for W in weights))


@lru_cache(maxsize=1024)
def addresses(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, though it is small: a CUDA graph may not copy it from the host, and goes on reading it
    where it was when the graph was captured. 1024 other stacks must come before it is dropped."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def forward(
    x: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, J, D] after the last layer, and the anchors [A, 2, B, J, D].

    On chip by `plan` if one is given.
    """
    x, v, weights = x.contiguous(), v.contiguous(), [W.contiguous() for W in weights]
    anchors = x.new_empty(len(schedule.anchors), 2, *x.shape)
    plan = plan or on_chip(x, weights[0], "forward", iterations, method)
    if plan is None:
        return forward_by_layers(x, v, weights, biases, schedule, iterations, method, anchors)
    W_table, aligned = table(weights), alignment(weights)
    bias = torch.stack(biases) if biases else x
    u, s = torch.empty_like(x), x.new_empty(iterations, *x.shape)
    for anchor, (begin, end) in zip(anchors, schedule.segments(), strict=True):
        launch(
            momentum_forward_kernel,
            (len(x),),
            *(x, v, W_table, weights[0], bias, u, s, anchor[0], anchor[1], len(x), begin, end),
            GAMMA=schedule.gamma,
            R=iterations,
            HAS_BIAS=len(biases) > 0,
            ALIGNMENT=aligned,
            RESTART=schedule.restarts(begin),
            num_warps=plan.num_warps,
            **sizes(x, method),
        )
        x, v = anchor
    return x.clone(), anchors


def backward(
    dx: Tensor,
    anchors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
    routing_grad: str,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dv [B, J, D] before the first layer, dW [L, J, D, J, D] and dbias [L, J, D] or [0]."""
    dx, weights = dx.to(anchors.dtype).contiguous(), [W.contiguous() for W in weights]
    modes = iterations, method, routing_grad
    plan = plan or on_chip(dx, weights[0], "backward", *modes)
    if plan is None:
        return backward_by_layers(dx, anchors, weights, biases, schedule, *modes)
    B, J, D = dx.shape
    sda, full = method == "sda", routing_grad == "full"
    terms = 2 * iterations - 1 if full else 1
    rows = max(terms, 2)
    a_size, x_size = (terms + sda) * B * J * J, B * J * D
    most = max(1, TERMS_BYTES // ((a_size + (rows + 1) * x_size) * dx.itemsize))
    most = min(most, len(weights))
    a, ds = dx.new_empty(most, a_size), dx.new_empty(most, rows, B, J, D)
    u, s, du = dx.new_empty(most, B, J, D), dx.new_empty(iterations, B, J, D), torch.empty_like(dx)
    W_table, aligned = table(weights), alignment(weights)
    bias = torch.stack(biases) if biases else dx
    dW = weights[0].new_empty(len(weights), *weights[0].shape)
    dbias = dx.new_empty(len(biases), J, D) if biases else dx.new_empty(0)
    dv = torch.zeros_like(dx)
    for anchor, (first, last) in reversed(list(zip(anchors, schedule.segments(), strict=True))):
        state = torch.stack([anchor[0], anchor[1], dx, dv])
        for end in range(last, first, -most):
            begin = max(first, end - most)
            before = torch.empty_like(state)
            launch(
                momentum_backward_kernel,
                (B,),
                *(state, before, W_table, weights[0], bias, u, du, s, a, ds, B, begin, end),
                GAMMA=schedule.gamma,
                R=iterations,
                TERMS=terms,
                FULL=full,
                HAS_BIAS=len(biases) > 0,
                ALIGNMENT=aligned,
                num_warps=plan.num_warps,
                **sizes(dx, method),
            )
            weight_gradient(
                u, weights[0], a, ds, dW[begin:end], (0, J), terms, sda,
                table=W_table, alignment=aligned, layers=(begin, end),
            )  # fmt: skip
            if biases:
                part = ds[: end - begin, : iterations if full else 1]
                torch.sum(part, (1, 2), out=dbias[begin:end])
            state = before
        dx, dv = state[2], state[3]
        if schedule.restarts(first):
            dv = torch.zeros_like(dv)
    return dx.clone(), dv.clone(), dW, dbias


def sizes(x: Tensor, method: str) -> dict[str, object]:
    """The compile-time parameters that both kernels share."""
    J, D = x.shape[1:]
    return dict(
        J=J,
        D=D,
        SCALE=distance_scale(J),
        SDA=method == "sda",
        BLOCK_J=padded(J),
        BLOCK_D=padded(D),
        ACC=accumulation_type(x),
    )


def forward_by_layers(
    x: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
    anchors: Tensor,
) -> tuple[Tensor, Tensor]:
    for layer, W in enumerate(weights):
        if schedule.restarts(layer):
            v = torch.zeros_like(v)
        bias = biases[layer] if biases else None
        f = routing.forward(x, W, bias, iterations, method, False)[0]
        v = schedule.gamma * v + (1 - schedule.gamma) * f
        x = x + v
        if layer in schedule.anchors:
            torch.stack([x, v], out=anchors[schedule.anchors.index(layer)])
    return x.clone(), anchors


def backward_by_layers(
    dx: Tensor,
    anchors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
    routing_grad: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = (method, routing_grad) == ("rba", "final") and iterations > 1
    gamma, dv, x, v = schedule.gamma, torch.zeros_like(dx), dx, dx
    dW = weights[0].new_empty(len(weights), *weights[0].shape)
    dbias = dx.new_empty(len(biases), *dx.shape[1:]) if biases else dx.new_empty(0)
    for layer in reversed(range(len(weights))):
        if layer in schedule.anchors:
            x, v = anchors[schedule.anchors.index(layer)]
        x, dv = x - v, dv + dx
        W, bias = weights[layer], biases[layer] if biases else None
        f, s, kept = routing.forward(x, W, bias, iterations, method, keep)
        du, dW[layer], of_bias = routing.backward(
            (1 - gamma) * dv, x, W, s, kept, method, routing_grad, bias is not None
        )
        if bias is not None:
            dbias[layer] = of_bias
        dx = dx + du
        if schedule.restarts(layer):  # v before this layer is an anchor's
            dv = torch.zeros_like(dv)
        else:
            v, dv = (v - (1 - gamma) * f) / gamma, gamma * dv
    return dx.clone(), dv.clone(), dW, dbias
