"""Routing by agreement the way published capsule networks write it: the baselines to beat."""

import torch
from torch import Tensor

from mocapsnet.kernels.squash.reference import squash


def broadcast_matmul(u: Tensor, W: Tensor, iterations: int = 3) -> Tensor:
    """Votes by a broadcast matrix product, which copies W once per sample. [B, J, D]"""
    W = W.transpose(1, 2).unsqueeze(0).expand(len(u), -1, -1, -1, -1)  # [B, N, J, K, D]
    return route((u[:, :, None, None] @ W).squeeze(3), iterations)


def einsum(u: Tensor, W: Tensor, iterations: int = 3) -> Tensor:
    """Votes by einsum, without the copies. [B, J, D]"""
    return route(torch.einsum("bnk,nkjd->bnjd", u, W), iterations)


def route(u_hat: Tensor, iterations: int) -> Tensor:
    """Procedure 1 of Sabour et al. 2017; the gradient is that of `routing_grad="final"`."""
    votes = u_hat.detach()
    b = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        v = squash((b.softmax(-1).unsqueeze(-1) * votes).sum(1))
        b = b + (votes * v.unsqueeze(1)).sum(-1)
    return squash((b.softmax(-1).unsqueeze(-1) * u_hat).sum(1))
