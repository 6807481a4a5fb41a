"""The specification of routing, in eager PyTorch for any float dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..squash.reference import length, squash
from ..votes.reference import votes


def routing(
    u: Tensor,
    W: Tensor,
    *,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    sda_mean: str = "input",
    sda_scale: str = "paper",
) -> Tensor:
    """Route u [B, N, K] through W [N, K, J, D] to capsules [B, J, D]; see `op.routing`."""
    *_, (_, v) = rounds(u, W, iterations, method, routing_grad, bias, sda_mean, sda_scale)
    return v


def rounds(
    u: Tensor,
    W: Tensor,
    iterations: int,
    method: str,
    routing_grad: str,
    bias: Tensor | None,
    sda_mean: str,
    sda_scale: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Couplings c [B, N, J] and output capsules v [B, J, D] of every iteration."""
    u_hat = votes(u, W)  # [B, N, J, D]
    if method == "sda":
        u_hat = shorten(u_hat, u)
    b = u_hat.new_zeros(u_hat.shape[:3])  # logits [B, N, J]
    for r in range(iterations):
        last = r == iterations - 1
        c = b.softmax(-1)
        constant = routing_grad == "final"
        c = c.detach() if constant else c
        vote = u_hat.detach() if constant and not last else u_hat
        s = (c.unsqueeze(-1) * vote).sum(1)  # [B, J, D]
        v = squash(s if bias is None else s + bias)
        yield c, v
        if not last:
            agreement = (vote * v.unsqueeze(1)).sum(-1)
            if method == "rba":
                b = b + agreement
            else:
                b = distance_logits(vote, v, sda_mean, sda_scale)


def shorten(u_hat: Tensor, u: Tensor) -> Tensor:
    """No vote of scaled-distance agreement is longer than the capsule that casts it."""
    vote_length, longest = length(u_hat), length(u).unsqueeze(-1)  # [B, N, J, 1], [B, N, 1, 1]
    too_long = vote_length > longest
    return u_hat * torch.where(too_long, longest / vote_length.where(too_long, 1), 1)


def distance_logits(u_hat: Tensor, v: Tensor, sda_mean: str, sda_scale: str) -> Tensor:
    """b_ij = t_i |v_j - u_hat_ij|, scaled so that a vote at half the mean distance gets c = 0.9.

    The published code divides log 0.1 alone, for want of a parenthesis: its scale is positive, and
    favours distant votes, where the mean distance is above -2 log 0.1 / log(0.9 (J - 1)). All
    distances zero is a tie: equal logits.
    """
    d = length(v.unsqueeze(1) - u_hat).squeeze(-1)  # [B, N, J]
    m = d.mean(-1, keepdim=True) if sda_mean == "input" else d.mean()
    tie = m == 0
    J, m = d.shape[-1], m.where(~tie, 1)
    if sda_scale == "paper":
        return torch.where(tie, 0, distance_scale(J) * d / m)
    return torch.where(tie, 0, (math.log(0.9 * max(J - 1, 1)) + 2 * math.log(0.1) / m) * d)


def distance_scale(J: int) -> float:
    """t_i m_i = [log(0.9 (J - 1)) - log 0.1] / (0.5 - 1); with J = 1 any finite value serves."""
    return -2 * (math.log(0.9 * max(J - 1, 1)) - math.log(0.1))
