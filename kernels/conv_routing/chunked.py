"""Convolutional routing in PyTorch without ever holding all votes or all windows: the CPU path.

The output positions of a block are the samples of `routing/chunked.py`, whose code routes them:
their windows are copied out of a grid that has the batch last, [kh kw N, K, P] for P positions, so
that every step works on rows of P numbers. A block's windows cost 1 / J of what its votes do, and
are dropped with them. Blocks follow one another in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..launch import accumulation_dtype
from ..routing import chunked as routing
from .windows import Windows

KEPT_BYTES = 2 << 30
"""Last couplings up to this size are kept for backward, which then makes no votes; larger ones are
made again there."""


class Block(NamedTuple):
    """A block of output positions y, x of the samples b."""

    y: slice
    x: slice
    b: slice

    def of_output(self, x: Tensor) -> Tensor:
        """The block of x [..., H', W', B], as a view."""
        return x[..., self.y, self.x, self.b]

    def of_input(self, x: Tensor, windows: Windows, dy: int, dx: int) -> Tensor:
        """What x [..., H + 2 py, Wd + 2 px, B] has at one place of the block's windows, a view."""
        rows = slice(self.y.start * windows.sy + dy, (self.y.stop - 1) * windows.sy + dy + 1)
        columns = slice(self.x.start * windows.sx + dx, (self.x.stop - 1) * windows.sx + dx + 1)
        return x[..., rows, columns, self.b][..., :: windows.sy, :: windows.sx, :]


def block_positions(J: int, D: int, itemsize: int) -> int:
    """Output positions of a block: four input capsules' votes for them fill a chunk."""
    return max(32, routing.chunk_bytes() // (4 * J * D * itemsize))


def blocks(windows: Windows, B: int, J: int, D: int, itemsize: int) -> Iterator[Block]:
    """All output positions of all samples: blocks take samples first, then columns, then rows."""
    height, width = windows.output
    most = block_positions(J, D, itemsize)
    samples = min(B, most)
    columns = min(width, most // max(samples, 1))
    rows = min(height, most // max(samples * columns, 1))
    for y, x, b in product(cut(height, rows), cut(width, columns), cut(B, samples)):
        yield Block(y, x, b)


def kept_shape(u: Tensor, W: Tensor, steps: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    """Shape of the couplings [kh kw N, J, H', W', B] that forward keeps; (0,) if it keeps none."""
    shape = W.shape[:3].numel(), W.shape[4], *Windows.of(u, W, steps).output, u.shape[0]
    if not keep:
        return (0,)
    return shape if math.prod(shape) * accumulation_dtype(u, W).itemsize <= KEPT_BYTES else (0,)


def cut(size: int, most: int) -> list[slice]:
    """As few slices of at most `most` as cover `size`, about equally long."""
    parts = -(-size // max(most, 1))
    return [slice(size * n // parts, size * (n + 1) // parts) for n in range(parts)]


class Problem:
    """The tensors of one call in the accumulation dtype, with the batch last."""

    def __init__(self, u: Tensor, W: Tensor, steps: tuple[int, ...], method: str):
        """u [B, H, Wd, N, K], W [kh, kw, N, K, J, D], steps sy, sx, py, px."""
        self.windows = Windows.of(u, W, steps)
        self.method = method
        self.B = len(u)
        self.W = W.to(accumulation_dtype(u, W)).flatten(0, 2)  # [kh kw N, K, J, D]
        margins = (0, 0, *[self.windows.px] * 2, *[self.windows.py] * 2)
        self.u = pad(u.permute(3, 4, 1, 2, 0).to(self.W.dtype), margins).contiguous()
        self.buffer = self.u.new_empty(0)

    def blocks(self) -> Iterator[Block]:
        J, D = self.W.shape[2:]
        return blocks(self.windows, self.B, J, D, self.W.element_size())

    def places(self) -> Iterator[tuple[int, int]]:
        """The places dy, dx of a window, in the order of W."""
        return product(range(self.windows.kh), range(self.windows.kw))

    def votes(self, block: Block) -> routing.Votes:
        """The votes of a block's windows [kh kw N, K, P]; they serve until the next block's."""
        parts = [block.of_input(self.u, self.windows, dy, dx) for dy, dx in self.places()]
        size = len(parts) * parts[0].numel()
        if self.buffer.numel() < size:
            self.buffer = self.u.new_empty(size)
        gathered = torch.stack(parts, out=self.buffer[:size].view(len(parts), *parts[0].shape))
        return routing.Votes(gathered.flatten(3).flatten(0, 1), self.W, self.method)


def forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    steps: tuple[int, ...],
    iterations: int,
    method: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, H', W', J, D], s of every iteration [R, J, D, H', W', B], and the kept couplings."""
    problem = Problem(u, W, steps, method)
    (J, D), (height, width) = W.shape[4:], problem.windows.output
    s_all = problem.u.new_empty(iterations, J, D, height, width, len(u))
    v_last = problem.u.new_empty(J, D, height, width, len(u))
    kept = problem.u.new_empty(kept_shape(u, W, steps, keep))
    for block in problem.blocks():
        votes = problem.votes(block)
        couplings = block.of_output(kept) if kept.dim() == 5 else kept
        s, v_all = routing.iterate(votes, bias, iterations, couplings)
        part = block.of_output(v_last)
        part.copy_(v_all[-1].view(part.shape))
        for r in range(iterations):
            block.of_output(s_all[r]).copy_(s[r].view(part.shape))
    v = v_last.permute(4, 2, 3, 0, 1).to(torch.promote_types(u.dtype, W.dtype))
    return v.contiguous(), s_all, kept


def backward(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    s_all: Tensor,
    kept: Tensor,
    steps: tuple[int, ...],
    method: str,
    routing_grad: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, H, Wd, N, K], dW [kh, kw, N, K, J, D] and dbias [J, D] or [0].

    du is gathered in a grid with its padding, to which each block adds place by place.
    """
    problem = Problem(u, W, steps, method)
    windows, shape = problem.windows, W.shape[4:]
    dv = grad_v.permute(3, 4, 1, 2, 0).to(problem.u.dtype).contiguous()  # [J, D, H', W', B]
    du, dW = torch.zeros_like(problem.u), problem.W.new_zeros(problem.W.shape).flatten(2)
    dbias = dW.new_zeros(shape if with_bias else 0)
    for block in problem.blocks():
        votes = problem.votes(block)
        s = [block.of_output(s_r).reshape(votes.shape) for s_r in s_all]
        part = block.of_output(dv).reshape(votes.shape)
        v, couplings = [], kept
        if kept.dim() == 5:
            couplings = block.of_output(kept).reshape(-1, votes.shape[0], votes.shape[2])
        else:
            v = [routing.squash(s_r) for s_r in s]
        gradients, ds = routing.differentiate(votes, part, s, v, couplings, routing_grad, dW)
        if with_bias:
            dbias += torch.stack(ds).sum((0, 3))
        for (dy, dx), step in zip(
            problem.places(), gradients.u.unflatten(0, (-1, u.shape[3])), strict=True
        ):
            place = block.of_input(du, windows, dy, dx)
            place += step.view(place.shape)
    inner = du[:, :, windows.py : windows.py + windows.H, windows.px : windows.px + windows.Wd]
    du = inner.permute(4, 2, 3, 0, 1).to(u.dtype).contiguous()
    return du, dW.view(W.shape).to(W.dtype), dbias
