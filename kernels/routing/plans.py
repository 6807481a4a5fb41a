"""Which form and tiles of the Triton kernels a problem of routing gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..launch import accumulation_dtype, padded

ON_CHIP_VOTES = 16384
"""Votes of one sample, sides padded to powers of two, that one program holds in registers."""

STREAM_WARPS = 16
"""Warps for each multiprocessor of the programs that a streamed pass is cut into."""

DOT_SIZES = (4,)
"""Bytes of the numbers that are multiplied on tensor cores: float64 takes the vector units."""

DOT_K = range(5, 33)
"""Input dimensions that make votes on tensor cores pay: these take K in eights."""

DOT_COLUMNS = range(32, 513)
"""Numbers [J, D] of a row, sides padded, of which a tile of 16 samples fits registers."""

DOT_PROGRAMS = 3
"""Programs for each multiprocessor of a streamed pass with votes on tensor cores: as many as fit,
so that all run at once."""

OWNED_COLUMNS = 512
"""Numbers [J, D] of a row, J padded to eights, of which backward on tensor cores fits registers."""

OWNED_K = 16
"""The largest input dimension of which it does."""

OWNED_PROGRAMS = 2
"""Programs for each multiprocessor that it is cut into, if the batch allows."""

multiprocessors: ContextVar[int] = ContextVar("multiprocessors", default=132)
"""Those of the GPU for which tensors that are on none are planned; an H100 SXM has 132."""


@contextmanager
def for_tensors_on(device: torch.device) -> Iterator[None]:
    """Tensors that are on no GPU are planned as those on this device, if it is a GPU."""
    there = device.type == "cuda" and torch.cuda.is_available()
    token = multiprocessors.set(_counted(device) if there else multiprocessors.get())
    try:
        yield
    finally:
        multiprocessors.reset(token)


def multiprocessors_of(device: torch.device) -> int:
    return _counted(device) if device.type == "cuda" else multiprocessors.get()


@cache
def _counted(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Plan(NamedTuple):
    """How a problem is cut into programs; a pure function of its shapes, dtype and GPU."""

    on_chip: bool
    block_b: int
    """Samples of a program."""
    per_slice: int
    """Input capsules of a program."""
    num_warps: int
    dots: bool
    """Whether votes are made on tensor cores."""


def fits_on_chip(N: int, J: int, D: int) -> bool:
    """Whether one program can hold a sample's votes."""
    return padded(N) * padded(J) * padded(D) <= ON_CHIP_VOTES


def fits_tensor_cores(K: int, J: int, D: int, itemsize: int) -> bool:
    """Whether the streamed form makes its votes on tensor cores."""
    columns = max(padded(J), 8) * padded(D)
    fits = padded(J) * padded(D) in DOT_COLUMNS and columns <= DOT_COLUMNS[-1]
    return itemsize in DOT_SIZES and K in DOT_K and fits


def fits_owned(p: Plan, K: int, J: int, D: int) -> bool:
    """Whether backward without kept couplings runs on tensor cores."""
    return p.dots and K <= OWNED_K and max(padded(J), 8) * padded(D) <= OWNED_COLUMNS


def plan(B: int, N: int, K: int, J: int, D: int, itemsize: int, device: torch.device) -> Plan:
    """The plan for a problem whose accumulation dtype has `itemsize` bytes.

    A streamed tile with votes on tensor cores has 64 columns [J, D] for each warp. Another belongs
    to one warp if that can hold it, 4 KB: then it needs no shared memory and no barriers, and
    Triton lays its rows of D out so that loads are wide and sums short.
    """
    if fits_on_chip(N, J, D):
        row = padded(J) * padded(D) * itemsize
        return Plan(True, 1, N, min(max(padded(N) * row // 2048, 1), 16), False)
    return streamed_plan(B, N, K, J, D, itemsize, device)


def streamed_plan(
    B: int, N: int, K: int, J: int, D: int, itemsize: int, device: torch.device
) -> Plan:
    """The plan of the streamed form."""
    if fits_tensor_cores(K, J, D, itemsize):
        return dot_plan(B, N, J, D, device)
    return vector_plan(B, N, J, D, itemsize, device)


def dot_plan(B: int, N: int, J: int, D: int, device: torch.device) -> Plan:
    """The streamed plan with votes on tensor cores."""
    columns = max(padded(J), 8) * padded(D)
    per_slice = sliced(B, N, 16, DOT_PROGRAMS * multiprocessors_of(device))
    return Plan(False, 16, per_slice, min(max(columns // 64, 1), 8), True)


def vector_plan(B: int, N: int, J: int, D: int, itemsize: int, device: torch.device) -> Plan:
    """The streamed plan without tensor cores."""
    row = padded(J) * padded(D) * itemsize
    if row <= 4096:
        block_b, num_warps = max(1, min(16, 4096 // row, padded(B))), 1
    else:  # two samples, so that W is read half as often, if 16 warps can hold them
        block_b = min(2, padded(B)) if row <= 16384 else 1
        num_warps = min(block_b * row // 2048, 16)
    programs = STREAM_WARPS // num_warps * multiprocessors_of(device)
    return Plan(False, block_b, sliced(B, N, block_b, programs), num_warps, False)


def backward_tile(p: Plan, sda: bool, full: bool) -> tuple[int, int]:
    """Samples and warps of a program that makes du and the terms of d(vote) on vector units.

    Half of those of sums, if it has several samples, for rows longer than a warp's tile, and for
    all of sda's gradient at once, which needs more registers than a whole tile leaves.
    """
    if p.block_b > 1 and (p.num_warps > 1 or (sda and full)):
        return p.block_b // 2, max(1, p.num_warps // 2)
    return p.block_b, p.num_warps


def sliced(B: int, N: int, block_b: int, programs: int) -> int:
    """Input capsules of a program, so that there are at most so many programs, if possible."""
    slices = max(1, min(N, programs // max(1, -(-B // block_b))))
    return math.ceil(N / slices)


def planned(u: Tensor, W: Tensor) -> Plan:
    """The static plan for u and W."""
    (B, N, K), (J, D) = u.shape, W.shape[2:]
    return plan(B, N, K, J, D, accumulation_dtype(u, W).itemsize, u.device)


def chosen(
    u: Tensor,
    W: Tensor,
    direction: str,
    iterations: int,
    method: str,
    routing_grad: str = "",
    operation: str = "routing",
) -> Plan:
    """The plan for one direction: that of the GPU's table if it has the problem, else the static
    one. See `tuning.Problem` for the arguments."""
    plans = tuning.table(u.device).plans
    if plans:
        modes = iterations, method, routing_grad, operation
        found = plans.get(tuning.problem_of(u, W, direction, *modes))
        if found is not None and found.plan is not None:
            return found.plan
    return planned(u, W)


def sum_registers(p: Plan, K: int, sda: bool, full: bool) -> dict[str, int]:
    """Launch option of streamed sums: how many registers a thread may take.

    Unasked, ptxas fits in one more program where it can, and spills one to four registers for it;
    or takes a few that keep a third program out, on tensor cores, or a second one of eight warps.
    """
    if p.dots:
        third = p.num_warps == 4 and K <= 8 and not (sda or full)
        return {"maxnreg": 168} if third else {}
    return {"maxnreg": 128} if p.num_warps >= 8 else backward_registers(p.num_warps, sda, full)


def backward_registers(num_warps: int, sda: bool, full: bool) -> dict[str, int]:
    """The same for streamed backward on vector units."""
    if not (sda or num_warps > 1):
        return {}
    return {"maxnreg": 255 if sda or full else 168}
