"""Routing by agreement for few samples on a CPU: all votes at once, and the batch before J and D.

The chunked form works along rows of B numbers, which are short here. Plain calls take `routing`,
which autograd differentiates: with so little to compute, a derivative in Python would take a tenth
of the time. The operation that compilers and transforms see takes `forward` and `backward`, in
memory that it shares. Equations as in README.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..launch import accumulation_dtype, full_precision
from ..squash.reference import length
from .workspace import workspace

SAMPLES = 8
VOTES = 1 << 20


def faster(B: int, W: Tensor, method: str) -> bool:
    """Whether this form is used rather than the chunked: rba, few samples or few votes.

    With `VOTES` votes it is about as fast, with more only for up to `SAMPLES` samples; beyond four
    times as many it would hold too much memory. Layers that can be stacked, N = J and K = D, stay
    chunked, so that a stack gives the same bits layer by layer and as one operation.
    """
    N, K, J, D = W.shape
    votes = B * N * J * D
    few = votes <= VOTES or (B <= SAMPLES and votes <= 4 * VOTES)
    return few and method == "rba" and (N, K) != (J, D)


def routing(
    u: Tensor, W: Tensor, bias: Tensor | None, iterations: int, routing_grad: str
) -> Tensor:
    """v [B, J, D]; the first iteration, with equal couplings, is a mean."""
    x, w = batch_second(u, W)
    J, D = W.shape[2:]
    offset = None if bias is None else bias.to(x.dtype)
    votes = _Product.apply(x, w).unflatten(2, (J, D))  # [N, B, J, D]

    def squashed(s: Tensor) -> Tensor:
        return squash(s if offset is None else s + offset, twice=True)

    if iterations == 1:
        v = squashed(votes.sum(0) / J)
    else:
        constant = votes.detach() if routing_grad == "final" else votes
        with torch.set_grad_enabled(torch.is_grad_enabled() and routing_grad == "full"):
            state = squashed(constant.sum(0) / J)
            for _ in range(2, iterations):
                c = (constant * state).sum(3).softmax(2)
                state = state + squashed((constant * c.unsqueeze(3)).sum(0))
            c = (constant * state).sum(3).softmax(2)
        v = squashed((votes * c.unsqueeze(3)).sum(0))
    return v.to(torch.promote_types(u.dtype, W.dtype))


class _Product(torch.autograd.Function):
    """`torch.bmm`, whose gradients autocast would lower where backward runs within it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        with full_precision(g):
            dx = torch.bmm(g, w.mT) if ctx.needs_input_grad[0] else None
            dw = torch.bmm(x.mT, g) if ctx.needs_input_grad[1] else None
        return dx, dw


def batch_second(u: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """u [N, B, K] and W [N, K, J D] in the accumulation dtype."""
    dtype = accumulation_dtype(u, W)
    return u.to(dtype).transpose(0, 1), W.to(dtype).flatten(2)


def forward(
    u: Tensor, W: Tensor, bias: Tensor | None, iterations: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, D], s of every iteration [R, B, J, D], and the last couplings [N, J, B] or [0]."""
    x, w = batch_second(u, W)
    votes, scratch = buffers(x, W)
    torch.bmm(x, w, out=votes.flatten(2))
    offset = 0 if bias is None else bias.to(x.dtype)
    s_all = [votes.sum(0) / W.shape[2] + offset]
    state, kept = squash(s_all[0]), x.new_empty(0)
    v = state
    for r in range(1, iterations):
        c = couplings(votes, state, scratch)
        s_all.append(torch.mul(votes, c.unsqueeze(3), out=scratch).sum(0) + offset)
        v = squash(s_all[r])
        state = state + v
        if keep and r == iterations - 1:
            kept = c.mT.contiguous()
    return v.to(torch.promote_types(u.dtype, W.dtype)), torch.stack(s_all), kept


def buffers(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for all votes [N, B, J, D], twice."""
    N, B, _ = x.shape
    shape = (2, N, B, *W.shape[2:])
    votes, scratch = workspace(x, math.prod(shape)).view(shape)
    return votes, scratch


def couplings(votes: Tensor, state: Tensor, scratch: Tensor) -> Tensor:
    """c [N, B, J] of votes [N, B, J, D] given V [B, J, D]."""
    return torch.mul(votes, state, out=scratch).sum(3).softmax(2)


def backward(
    grad_v: Tensor, u: Tensor, W: Tensor, s_all: Tensor, kept: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dW and dbias of routing_grad="final"; `s_all` of more than one iteration."""
    x, w = batch_second(u, W)
    votes, scratch = buffers(x, W)
    ds = squash_gradient(s_all[-1], grad_v.to(x.dtype))
    if len(kept):
        c = kept.mT.contiguous()
    else:
        torch.bmm(x, w, out=votes.flatten(2))
        state = squash(s_all[0])
        for s in s_all[1:-1]:
            state = state + squash(s)
        c = couplings(votes, state, scratch)
    g = torch.mul(c.unsqueeze(3), ds, out=scratch).flatten(2)  # [N, B, J D]
    du = torch.bmm(g, w.mT).transpose(0, 1).to(u.dtype).contiguous()
    dW = torch.bmm(x.mT, g).view(W.shape).to(W.dtype)
    return du, dW, ds.sum(0) if with_bias else ds.new_empty(0)


def squash(s: Tensor, twice: bool = False) -> Tensor:
    """Equation 2, vectors along the last dimension; if wanted `twice` differentiable also at 0."""
    n = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    if twice and s.device.type == "cpu" and not n.all():  # a GPU would have to wait
        n = length(s)
    return s * (n / (1 + n * n))


def squash_gradient(s: Tensor, dv: Tensor) -> Tensor:
    """Equation 7, vectors along the last dimension."""
    n = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    q = 1 + n * n
    direction = s / n.where(n > 0, 1)
    return dv * (n / q) + s * ((1 - n * n) / q / q * (dv * direction).sum(-1, keepdim=True))
