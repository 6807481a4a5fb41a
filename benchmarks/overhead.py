"""What does a call of `routing` cost beside its computation?

    python -m benchmarks.overhead            # prints a table; needs no GPU

Forward and backward of the smallest problem there is, so that next to nothing is computed. The
candidates take turns within one run, and the table gives medians. For Triton, launches are noted
down instead of made: what is left is the path to them, and Triton adds its own cost of each launch.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # lets CPU tensors take the path of the kernels

import torch

from mocapsnet.kernels import routing
from mocapsnet.kernels.launch import recording
from mocapsnet.kernels.routing import chunked, triton

ROUNDS, CALLS = 50, 20


class Bare(torch.autograd.Function):
    """The launchers behind an autograd.Function alone, without torch.library."""

    @staticmethod
    def forward(ctx, u, W):  # type: ignore[no-untyped-def]
        v, *saved = triton.forward(u, W, None, 3, "rba", True)
        ctx.save_for_backward(u, W, *saved)
        return v

    @staticmethod
    def backward(ctx, dv):  # type: ignore[no-untyped-def]
        return triton.backward(dv, *ctx.saved_tensors, "rba", "final", False)[:2]


class BareChunked(torch.autograd.Function):
    """The same for the chunked implementation."""

    @staticmethod
    def forward(ctx, u, W):  # type: ignore[no-untyped-def]
        v, *saved = chunked.forward(u, W, None, 3, "rba", True)
        ctx.save_for_backward(u, W, *saved)
        return v

    @staticmethod
    def backward(ctx, dv):  # type: ignore[no-untyped-def]
        return chunked.backward(dv, *ctx.saved_tensors, "rba", "final", False)[:2]


CANDIDATES: dict[str, Callable[..., torch.Tensor]] = {
    "triton, routing()": lambda u, W: routing(u, W, backend="triton"),
    "triton, launchers alone": Bare.apply,
    "chunked, routing()": lambda u, W: routing(u, W, backend="chunked"),
    "chunked, functions alone": BareChunked.apply,
}


def main() -> None:
    torch.set_num_threads(1)
    gc.disable()  # else noting launches down is what takes the time
    u, W = torch.randn(1, 1, 1, requires_grad=True), torch.randn(1, 1, 1, 1, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(ROUNDS):
        for name, call in CANDIDATES.items():
            with recording():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(u, W).backward()
                times[name].append((time.perf_counter() - start) / CALLS)
    print(f"{'forward and backward, one call each':40} median of {ROUNDS}")
    for name, seconds in times.items():
        print(f"{name:40} {statistics.median(seconds) * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
