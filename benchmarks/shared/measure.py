"""Time in turns, peaks of memory, and the rates that the machine reaches: what benchmarks share."""

from __future__ import annotations

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]


class Clock:
    """Seconds between marks: of the processor, or on a CUDA device of its own stream.

    Reading the seconds waits for the device; setting a mark does not.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every stretch between two marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            self.marks[-1].synchronize()
            return [1e-3 * start.elapsed_time(end) for start, end in pairs]
        return [end - start for start, end in pairs]


def turns(names: Sequence[Any], rounds: int) -> list[tuple[bool, Any]]:
    """Whether it counts, and whose turn it is, for one round that warms up and `rounds` more.

    Candidates take turns, so that a drift of the machine's speed meets all alike, in an order that
    changes from round to round, so that none always inherits the same neighbour's caches.
    """
    order, shuffle = list(names), random.Random(0).shuffle
    taken = []
    for n in range(rounds + 1):
        taken += [(n > 0, name) for name in order]
        shuffle(order)
    return taken


def interleaved(
    candidates: Mapping[Any, Run], rounds: int, device: torch.device, calls: int = 1
) -> dict[Any, list[float]]:
    """Seconds per call of every candidate in every round of `turns`."""
    seconds: dict[Any, list[float]] = {name: [] for name in candidates}
    for counts, name in turns(list(candidates), rounds):
        run = candidates[name]
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        if counts:
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, method="inclusive")
    return low, median, high


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; NaN for a single point."""
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


class Rates(NamedTuple):
    """What the machine reaches, as a bound for what runs on it."""

    copy: float
    """Bytes per second of a large copy, read and written."""
    matrix: float
    """float32 operations per second of a large matrix product, at PyTorch's set precision."""
    matrix_bf16: float | None
    """The same in bfloat16; None on a processor without such instructions."""


def rates(device: torch.device, *, size: int = 3072, elements: int = 2**26) -> Rates:
    """Measures `Rates`, the best of five each.

    Args:
        size: rows and columns of the matrices; four times as many on a GPU.
        elements: float32 values to copy; four times as many on a GPU.
    """
    if device.type == "cuda":
        size, elements = 4 * size, 4 * elements
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    matrix = torch.rand(size, size, device=device)
    runs: dict[str, Run] = {"copy": partial(target.copy_, source)}
    runs["float32"] = partial(torch.mm, matrix, matrix)
    if has_bfloat16(device):
        half = matrix.bfloat16()
        runs["bfloat16"] = partial(torch.mm, half, half)
    best = {name: min(times) for name, times in interleaved(runs, 5, device).items()}
    operations = 2 * size**3
    return Rates(
        2 * source.nbytes / best["copy"],
        operations / best["float32"],
        operations / best["bfloat16"] if "bfloat16" in best else None,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):  # oneDNN would emulate it on others
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def peak_bytes(run: Run, device: torch.device) -> int:
    """Peak of live tensor bytes beyond those alive before the call, counted by the allocator."""
    return memory_of(run, device)[0]


def memory_of(run: Run, device: torch.device) -> tuple[int, int]:
    """Peak of live tensor bytes, and those that the call's result still holds.

    Both are beyond those alive before the call, and counted by the allocator. On a CPU the call has
    a thread of its own: operations keep workspaces per thread, and one from an earlier call would
    not be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        result = run()
        torch.cuda.synchronize(device)
        # What was asked for: the allocator's blocks are larger, by how much depends on its past.
        after = torch.cuda.memory_stats(device)
        del result
        current, peak = (after[f"requested_bytes.all.{name}"] for name in ("current", "peak"))
        return peak - before, current - before
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_memory_of_cpu, run).result()


def _memory_of_cpu(run: Run) -> tuple[int, int]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    del result  # after the profile's end
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, live


def relative_error(x: Tensor | None, truth: Tensor) -> float:
    """Norm of the difference over norm of the truth; infinite if x is missing or not finite."""
    if x is None:
        return math.inf
    error = float((x.detach().double() - truth).norm() / truth.double().norm())
    return error if math.isfinite(error) else math.inf
