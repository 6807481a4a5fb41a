"""A stack of momentum capsule layers in PyTorch, through the chunked form of routing.

The state stays [J, D, B] between layers, the layout in which the chunked form works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.chunked import Votes, differentiate, iterate
from .schedule import Schedule


def forward(
    x: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
) -> tuple[Tensor, Tensor]:
    """x [B, J, D] after the last layer, and the anchors [A, 2, J, D, B]."""
    x = x.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    v = v.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    anchors = x.new_empty(len(schedule.anchors), 2, *x.shape)
    nothing, gamma = x.new_empty(0), schedule.gamma
    for layer, W in enumerate(weights):
        if schedule.restarts(layer):
            v.zero_()
        bias = biases[layer] if biases else None
        f = iterate(Votes(x, W, method), bias, iterations, nothing)[1][-1]
        v.mul_(gamma).add_(f * (1 - gamma))
        x.add_(v)
        if layer in schedule.anchors:
            anchors[schedule.anchors.index(layer)] = torch.stack([x, v])
    return x.permute(2, 0, 1).contiguous(), anchors


def backward(
    dx: Tensor,
    anchors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    schedule: Schedule,
    iterations: int,
    method: str,
    routing_grad: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dv [B, J, D] before the first layer, dW [L, J, D, J, D] and dbias [L, J, D] or [0]."""
    dx = dx.permute(1, 2, 0).to(anchors.dtype).clone(memory_format=torch.contiguous_format)
    dv = torch.zeros_like(dx)
    x, v, gamma = dx, dx, schedule.gamma
    J, D, B = dx.shape
    keep = (method, routing_grad) == ("rba", "final") and iterations > 1
    kept = dx.new_empty(J, J, B) if keep else dx.new_empty(0)
    dW = weights[0].new_empty(len(weights), *weights[0].shape)
    dbias = dx.new_empty(len(biases), J, D) if biases else dx.new_empty(0)
    for layer in reversed(range(len(weights))):
        W = weights[layer]
        if layer in schedule.anchors:
            x, v = anchors[schedule.anchors.index(layer)].clone().unbind()
        x -= v
        dv += dx
        votes = Votes(x, W, method)  # serve reconstruction and gradients
        bias = biases[layer] if biases else None
        s_all, v_all = iterate(votes, bias, iterations, kept)
        gradients, ds = differentiate(votes, dv * (1 - gamma), s_all, v_all, kept, routing_grad)
        dW[layer] = gradients.W.view(W.shape)
        if bias is not None:
            dbias[layer] = torch.stack(ds).sum((0, 3))
        dx += gradients.u
        if schedule.restarts(layer):  # v before this layer is an anchor's
            dv.zero_()
        else:
            v.sub_(v_all[-1] * (1 - gamma)).div_(gamma)
            dv *= gamma
    return dx.permute(2, 0, 1).contiguous(), dv.permute(2, 0, 1).contiguous(), dW, dbias
