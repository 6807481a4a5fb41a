"""Routing in PyTorch without ever holding all votes: the CPU path, and the fallback elsewhere.

A chunk of input capsules is one batched matrix product into a reused buffer [n, J, D, B]. The
batch comes last, so that every other step works on long contiguous rows, with the sums over D, J
and input capsules outside of them. For few samples or votes there is `direct.py`. The equations are
those of README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..launch import accumulation_dtype
from . import direct
from .reference import distance_scale
from .workspace import workspace

KEPT_BYTES = 32 << 20
"""Last couplings up to this size are kept for backward; larger ones are recomputed there."""

LONG_ROWS = 512
"""Samples from which on a weighted vote is added to the sum as it is made."""


@cache
def chunk_bytes() -> int:
    """Size of one chunk of votes: it and its scratch copy should stay in the last-level cache."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # as "32768K"; Linux only
    kilobytes = int(file.read_text().strip().rstrip("K")) if file.exists() else 0
    return min(max(kilobytes * 1024 // 16, 1 << 20), 8 << 20)


def chunking(B: int, W: Tensor, itemsize: int) -> tuple[int, int]:
    """Input capsules of a chunk, and how many chunks there are.

    Up to two chunks are made one: then votes serve all iterations.
    """
    N, _, J, D = W.shape
    n = max(1, chunk_bytes() // max(J * D * B * itemsize, 1))
    n = N if N <= 2 * n else n
    return n, -(-N // n)


def kept_shape(u: Tensor, W: Tensor, keep: bool) -> tuple[int, ...]:
    """Shape of the couplings [N, J, B] that forward keeps; (0,) if it keeps none."""
    N, J, B = u.shape[1], W.shape[2], u.shape[0]
    if not keep:
        return (0,)
    return (N, J, B) if N * J * B * accumulation_dtype(u, W).itemsize <= KEPT_BYTES else (0,)


def forward(
    u: Tensor, W: Tensor, bias: Tensor | None, iterations: int, method: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns v [B, J, D], s of every iteration [R, B, J, D], and the kept couplings [N, J, B]."""
    if direct.faster(len(u), W, method):
        return direct.forward(u, W, bias, iterations, kept_shape(u, W, keep) != (0,))
    votes = Votes(batch_last(u, W), W, method)
    kept = votes.u.new_empty(kept_shape(u, W, keep))
    s_all, v_all = iterate(votes, bias, iterations, kept)
    v = v_all[-1].permute(2, 0, 1).to(torch.promote_types(u.dtype, W.dtype))
    return v.contiguous(), torch.stack(s_all).permute(0, 3, 1, 2).contiguous(), kept


def backward(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    s_all: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns du [B, N, K], dW [N, K, J, D] and dbias [J, D] or [0], from dv [B, J, D]."""
    if len(s_all) > 1 and routing_grad == "final" and direct.faster(len(u), W, method):
        return direct.backward(grad_v, u, W, s_all, kept, with_bias)
    votes = Votes(batch_last(u, W), W, method)
    s = list(s_all.permute(0, 2, 3, 1).contiguous().unbind())  # [J, D, B] each, the bits of forward
    v = [] if len(kept) else [squash(s_r) for s_r in s]
    dv = grad_v.permute(1, 2, 0).to(votes.dtype).contiguous()  # so ds has the batch last as well
    gradients, ds_all = differentiate(votes, dv, s, v, kept, routing_grad)
    du = gradients.u.permute(2, 0, 1).to(u.dtype).contiguous()
    dbias = torch.stack(ds_all).sum((0, 3)) if with_bias else dv.new_empty(0)
    return du, gradients.W.view(W.shape).to(W.dtype), dbias


def batch_last(u: Tensor, W: Tensor) -> Tensor:
    """u [B, N, K] as [N, K, B] in the accumulation dtype."""
    return u.permute(1, 2, 0).to(accumulation_dtype(u, W)).contiguous()


def iterate(
    votes: Votes, bias: Tensor | None, iterations: int, kept: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """s and v [J, D, B] of every iteration; `kept` is given the last couplings unless empty.

    It is [N, J, B], or has some dimensions whose sizes multiply to B in its place.
    """
    offset = 0 if bias is None else bias.to(votes.dtype).unsqueeze(-1)  # [J, D, 1]
    s_all = [votes.uniform_sum() + offset]
    v_all = [squash(s_all[0])]
    for r in range(1, iterations):
        state = routing_state(v_all, votes.method)
        s = torch.zeros_like(s_all[0])
        for i, u_hat, _ in votes.chunks():
            c = votes.couplings(u_hat, state)
            if len(kept) and r == iterations - 1:
                kept[i] = c.view(kept[i].shape)
            votes.add_weighted(s, u_hat, c)
        s_all.append(s + offset)
        v_all.append(squash(s_all[r]))
    return s_all, v_all


def differentiate(
    votes: Votes,
    dv: Tensor,
    s_all: list[Tensor],
    v_all: list[Tensor],
    kept: Tensor,
    routing_grad: str,
    dW: Tensor | None = None,
) -> tuple[Gradients, list[Tensor]]:
    """du, dW and ds of every differentiated iteration, from dv and what `iterate` returned.

    `v_all` is not needed if there are kept couplings. A given dW [N, K, J D] grows in place.
    """
    gradients = Gradients(votes, dW)
    dstate = torch.zeros_like(dv)
    ds_all = []
    for r in reversed(range(len(s_all))):
        ds = squash_gradient(s_all[r], dv)
        ds_all.append(ds)
        if r == 0:
            gradients.add_uniform(ds)
        elif routing_grad == "final":
            state = ds if len(kept) else routing_state(v_all[:r], votes.method)
            gradients.add_constant_couplings(ds, state, kept)
            break
        else:
            step = gradients.add_full(ds, routing_state(v_all[:r], votes.method))
            dstate = dstate + step if votes.method == "rba" else step
            dv = dstate
    return gradients, ds_all


class Votes:
    """The votes of one call in the accumulation dtype, made chunk by chunk.

    If one chunk holds them all, they are made once and serve every iteration.
    """

    def __init__(self, u: Tensor, W: Tensor, method: str):
        """u [N, K, B] in the accumulation dtype, W [N, K, J, D]."""
        N, K, J, D = W.shape
        self.dtype = u.dtype
        self.method = method
        self.u = u
        self.W = W.to(u.dtype).reshape(N, K, J * D)
        self.shape = (J, D, u.shape[2])
        n, _ = chunking(u.shape[2], W, u.element_size())
        self.slices = [slice(start, min(start + n, N)) for start in range(0, N, n)]
        size = math.prod(self.shape)
        memory = workspace(u, n * (2 * size + size // D * 2))
        self.buffer, self.scratch = memory[: 2 * n * size].view(2, n, *self.shape).unbind()
        self.b, self.c = memory[2 * n * size :].view(2, n, J, self.shape[2]).unbind()
        self.whole: tuple[slice, Tensor, Tensor | None] | None = None

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yields i, u_hat_i [n, J, D, B], only to be read, and the shortening of sda."""
        if self.whole is not None:
            yield self.whole
            return
        for i in self.slices:
            u_hat = self.buffer[: i.stop - i.start]
            torch.bmm(self.W[i].mT, self.u[i], out=u_hat.flatten(1, 2))
            chunk = i, u_hat, self.shorten(u_hat, i) if self.method == "sda" else None
            if len(self.slices) == 1:
                self.whole = chunk
            yield chunk

    def couplings(self, u_hat: Tensor, state: Tensor) -> Tensor:
        """c [n, J, B] of votes [n, J, D, B] given the state [J, D, B], until the next call."""
        n = len(u_hat)
        if self.method == "rba":
            b = torch.sum(torch.mul(u_hat, state, out=self.scratch[:n]), 2, out=self.b[:n])
        else:
            d, m = distances(u_hat, state)
            b = torch.where(m > 0, distance_scale(d.shape[1]) * d / m, 0)
        return torch.softmax(b, 1, out=self.c[:n])

    def add_weighted(self, s: Tensor, u_hat: Tensor, c: Tensor) -> None:
        """s [J, D, B] grows by the sum of c [n, J, B] times votes [n, J, D, B].

        Rows that are long are added one capsule at a time, which passes over the votes once.
        """
        if s.shape[2] >= LONG_ROWS:
            for u_hat_i, c_i in zip(u_hat, c.unsqueeze(2), strict=True):
                s.addcmul_(u_hat_i, c_i)
        else:
            s += torch.mul(u_hat, c.unsqueeze(2), out=self.scratch[: len(u_hat)]).sum(0)

    def shorten(self, u_hat: Tensor, i: slice) -> Tensor:
        """Shortens votes to the length of their capsule; returns the factors [n, J, B] <= 1."""
        length = norm(self.u[i], 1)  # [n, 1, B]
        vote_length = norm(u_hat, 2).squeeze(2)
        factor = torch.where(vote_length > length, length / vote_length, 1)
        u_hat *= factor.unsqueeze(2)
        return factor

    def uniform_sum(self) -> Tensor:
        """s of iteration 1, where every coupling is 1 / J. [J, D, B]"""
        J = self.shape[0]
        if self.method == "rba":
            return (self.W.flatten(0, 1).T @ self.u.flatten(0, 1)).view(self.shape) / J
        s = self.u.new_zeros(self.shape)
        for _, u_hat, _ in self.chunks():
            s += u_hat.sum(0)
        return s / J


class Gradients:
    """du and dW in the accumulation dtype, gathered over iterations and chunks."""

    def __init__(self, votes: Votes, W: Tensor | None = None):
        self.votes = votes
        self.u = torch.empty_like(votes.u)
        # Contiguous, which votes.W need not be: products are added to views of it.
        self.W = votes.W.new_empty(votes.W.shape) if W is None else W
        self.beta = 0  # of what stands there, in the first pass nothing
        self.beta_W = 0 if W is None else 1

    def add_uniform(self, ds: Tensor) -> None:
        """Iteration 1: every coupling is 1 / J."""
        votes, g = self.votes, ds / ds.shape[0]
        if votes.method == "rba":
            u, W, g = votes.u.flatten(0, 1), votes.W.flatten(0, 1), g.flatten(0, 1)
            self.u.flatten(0, 1).addmm_(W, g, beta=self.beta)
            self.W.flatten(0, 1).addmm_(u, g.T, beta=self.beta_W)
            return
        for i, u_hat, factor in votes.chunks():
            self.add(i, g.expand_as(u_hat), u_hat, factor)

    def add_constant_couplings(self, ds: Tensor, state: Tensor, kept: Tensor) -> None:
        """d(u_hat_ij) = c_ij ds_j."""
        votes = self.votes
        if len(kept):
            for i in votes.slices:
                c = kept[i].unsqueeze(2)
                self.add(i, torch.mul(c, ds, out=votes.scratch[: len(c)]))
            return
        for i, u_hat, factor in votes.chunks():
            scratch = votes.scratch[: len(u_hat)]
            c = votes.couplings(u_hat, state).unsqueeze(2)
            self.add(i, torch.mul(c, ds, out=scratch), u_hat, factor)

    def add_full(self, ds: Tensor, state: Tensor) -> Tensor:
        """d(u_hat_ij) through the sum and the couplings of one iteration; returns d(state)."""
        votes = self.votes
        dstate = torch.zeros_like(state)
        for i, u_hat, factor in votes.chunks():
            scratch = votes.scratch[: len(u_hat)]
            c = votes.couplings(u_hat, state)
            dc = torch.mul(u_hat, ds, out=scratch).sum(2)
            db = c * (dc - (c * dc).sum(1, keepdim=True))
            g = torch.mul(c.unsqueeze(2), ds, out=scratch)
            if votes.method == "rba":
                g.addcmul_(db.unsqueeze(2), state)
                dstate += (u_hat * db.unsqueeze(2)).sum(0)
            else:
                to_vote = distance_gradient(u_hat, state, db)
                g += to_vote
                dstate -= to_vote.sum(0)
            self.add(i, g, u_hat, factor)
        self.beta = self.beta_W = 1
        return dstate

    def add(
        self, i: slice, g: Tensor, u_hat: Tensor | None = None, factor: Tensor | None = None
    ) -> None:
        """Adds what d(u_hat_i) = g [n, J, D, B] contributes; u_hat and factor only for sda."""
        u, W = self.votes.u[i], self.votes.W[i]
        if u_hat is not None and factor is not None:
            length = norm(u, 1)  # [n, 1, B]
            along = (g * u_hat).sum(2) / length
            along = torch.where(factor < 1, along, 0)  # d|u_i| of every shortened vote
            g = (g - u_hat * (along / length.where(length > 0, 1)).unsqueeze(2)) * factor.unsqueeze(
                2
            )
        self.u[i].baddbmm_(W, g.flatten(1, 2), beta=self.beta)
        self.W[i].baddbmm_(u, g.flatten(1, 2).mT, beta=self.beta_W)
        if u_hat is not None and factor is not None:
            direction = u / length.where(length > 0, 1)
            self.u[i] += direction * along.sum(1, keepdim=True)


def routing_state(v_all: list[Tensor], method: str) -> Tensor:
    """What the next couplings depend on: V = v(1) + ... + v(r - 1) for rba, v(r - 1) for sda."""
    return torch.stack(v_all).sum(0) if method == "rba" else v_all[-1]


def distances(u_hat: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """d_ij = |v_j - u_hat_ij| [n, J, B] and their mean over j, m_i [n, 1, B]."""
    d = norm(u_hat - v, 2).squeeze(2)
    return d, d.mean(1, keepdim=True)


def distance_gradient(u_hat: Tensor, v: Tensor, db: Tensor) -> Tensor:
    """d(u_hat_ij) from db_ij, for b_ij = scale d_ij / m_i; d(v_j) is minus its sum over i."""
    d, m = distances(u_hat, v)
    dd = torch.where(
        m > 0, distance_scale(d.shape[1]) * (db - (db * d).mean(1, keepdim=True) / m) / m, 0
    )
    per_length = torch.where(d > 0, dd / d, 0)
    return (u_hat - v) * per_length.unsqueeze(2)


def norm(x: Tensor, dim: int) -> Tensor:
    """Euclidean length along an outer dimension, kept; torch.linalg is many times slower there."""
    return (x * x).sum(dim, keepdim=True).sqrt()


def squash(s: Tensor) -> Tensor:
    """The reference's formula for vectors along dimension 1 of s [J, D, B]."""
    n = norm(s, 1)
    return s * (n / (1 + n * n))


def squash_gradient(s: Tensor, dv: Tensor) -> Tensor:
    """ds = n / (1 + n^2) dv + (1 - n^2) / (1 + n^2)^2 (dv . s / n) s, vectors along dimension 1."""
    n = norm(s, 1)
    q = 1 + n * n
    direction = s / n.where(n > 0, 1)
    slope = (1 - n * n) / q / q
    return dv * (n / q) + s * (slope * (dv * direction).sum(1, keepdim=True))
