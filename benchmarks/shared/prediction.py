"""The time that compiled code lets expect on a GPU that need not be there, and the least there is.

A prediction is the instructions that the compiled code issues over what the datasheet's clock and
multiprocessors can issue, or bytes over bandwidth if that is more. It knows nothing of latency, of
cache misses, or of a launch's cost. The floor counts only the multiply-adds that the equations
need, and each input and output once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mocapsnet.kernels.launch import Launch
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.routing.weight_gradient import (
    kept_weight_gradient_kernel,
    weight_gradient_kernel,
)

from .compiled import Compiled, compiled, kinds


class Gpu(NamedTuple):
    """Datasheet rates."""

    name: str
    multiprocessors: int
    clock: float
    """Boost clock in Hz."""
    lanes: int
    """float32 multiply-adds of a multiprocessor per clock."""
    bandwidth: float
    """Bytes per second of device memory."""


GPUS = {
    "80": Gpu("A100 SXM 40 GB", 108, 1.41e9, 64, 1.555e12),
    "90": Gpu("H100 SXM 80 GB", 132, 1.98e9, 128, 3.35e12),
}


def row_of(launch: Launch, architecture: str) -> dict[str, Any]:
    """One launch: its kernel, what the compiler made of it, and the predicted seconds."""
    made = compiled(launch, architecture)
    return (
        made._asdict()
        | dict(
            kernel=launch.kernel.__name__,
            grid=launch.grid,
            warps=launch.options["num_warps"],
            wide_loads=made.wide_loads,
            instructions=len(made.instructions),
            loop=len(made.loop),
            predicted=predicted(launch, architecture, made),
        )
        | {f"loop_{kind}": n for kind, n in kinds(made.loop or made.instructions).items()}
    )


def predicted(launch: Launch, architecture: str, made: Compiled) -> float | None:
    """Seconds of one launch: issue of all instructions, arithmetic, or device memory."""
    gpu = GPUS.get(architecture)
    if gpu is None:
        return None
    per_multiprocessor = math.ceil(math.prod(launch.grid) / gpu.multiprocessors)
    warps = launch.options["num_warps"] * per_multiprocessor
    issued = len(made.instructions) + (trips(launch) - 1) * len(made.loop)
    arithmetic = kinds(made.instructions)
    for kind, count in kinds(made.loop).items():
        arithmetic[kind] += (trips(launch) - 1) * count
    cycles = warps * max(issued / 4, (arithmetic["fma"] + arithmetic["float"]) * 32 / gpu.lanes)
    tensors = {id(x): x for x in launch.args if isinstance(x, torch.Tensor)}.values()
    memory = sum(x.numel() * x.itemsize for x in tensors) / gpu.bandwidth
    return max(cycles / gpu.clock, memory)


def trips(launch: Launch) -> int:
    """How often a kernel runs its innermost loop."""
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    if launch.kernel is routing.first_sum_kernel:
        return math.ceil(named["per_slice"] * named["K"] / named["BLOCK_NK"])
    if "per_slice" in named:
        return named["per_slice"]
    if "slices" in named:
        return math.ceil(named["slices"] / named["BLOCK_S"])
    if launch.kernel is routing.kept_backward_kernel:
        return named["J"]
    if launch.kernel in (weight_gradient_kernel, kept_weight_gradient_kernel):
        return math.ceil(named["B"] / named["BLOCK_B"])
    if "GAMMA" in named:
        return named["end"] - named["begin"]
    return named["R"] - 1 if named.get("FULL") else 1


def floor(sizes: tuple[int, ...], iterations: int, itemsize: int, gpu: Gpu) -> float:
    """Seconds that forward and backward of rba, "final", take at least."""
    B, N, K, J, D = sizes
    forward = K + (iterations - 1) * (K + 2)  # votes; with logit and weighted sum
    backward = 1 + K + 1 + K  # c ds and du; c ds again and dW
    arithmetic = B * N * J * D * (forward + backward) / gpu.multiprocessors / gpu.lanes / gpu.clock
    values = 2 * (B * N * K + N * K * J * D + B * J * D)
    return max(arithmetic, values * itemsize / gpu.bandwidth)
