"""The specification of a stack of momentum capsule layers, in eager PyTorch for any float dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routing import reference


def momentum_routing(
    x: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gamma: float,
    block_layers: int,
    iterations: int,
    method: str,
    routing_grad: str,
) -> Tensor:
    """v <- gamma v + (1 - gamma) routing(x, W);  x <- x + v, for x and v [B, J, D]."""
    for layer, W in enumerate(weights):
        if block_layers and layer and layer % block_layers == 0:
            v = torch.zeros_like(v)
        f = reference.routing(
            x,
            W.to(x.dtype),
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=biases[layer].to(x.dtype) if biases else None,
        )
        v = gamma * v + (1 - gamma) * f
        x = x + v
    return x
