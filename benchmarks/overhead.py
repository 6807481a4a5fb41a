"""What does a call of `routing` cost beside its computation?

Forward and backward of the smallest problem there is, so that next to nothing is computed, on one
processor thread; needs no GPU. For Triton, launches are noted down instead of made: what is left is
the path to them, and Triton adds its own cost of each launch. Against `routing` stand the same
launchers, or functions, behind an autograd.Function alone.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .shared import measure, report

Call = Callable[[Tensor, Tensor], Tensor]


def bare(implementation: Any) -> Call:
    """Forward and backward of an implementation without torch.library."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor, W: Tensor) -> Tensor:
            v, *saved = implementation.forward(u, W, None, 3, "rba", True)
            ctx.save_for_backward(u, W, *saved)
            return v

        @staticmethod
        def backward(ctx: Any, dv: Tensor) -> tuple[Tensor, Tensor]:
            return implementation.backward(dv, *ctx.saved_tensors, "rba", "final", False)[:2]

    return Bare.apply


def candidates() -> dict[str, Call]:
    # Lets CPU tensors take the path of the kernels; Triton reads it when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from mocapsnet.kernels import routing
    from mocapsnet.kernels.routing import chunked, triton

    return {
        "triton, routing()": partial(routing, backend="triton"),
        "triton, launchers alone": bare(triton),
        "chunked, routing()": partial(routing, backend="chunked"),
        "chunked, functions alone": bare(chunked),
    }


def times(args: argparse.Namespace) -> list[report.Row]:
    """A row per candidate."""
    calls = candidates()
    from mocapsnet.kernels.launch import recording

    u, W = torch.randn(1, 1, 1, requires_grad=True), torch.randn(1, 1, 1, 1, requires_grad=True)

    def run(call: Call) -> None:
        with recording():
            for _ in range(args.calls):
                call(u, W).backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()  # else noting launches down is what takes the time
    try:
        runs = {name: partial(run, call) for name, call in calls.items()}
        seconds = measure.interleaved(runs, args.repetitions, args.device)
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    rows = []
    for name, values in seconds.items():
        low, median, high = (value / args.calls for value in measure.quartiles(values))
        row = {"candidate": name, "seconds": median, "lower_quartile": low}
        rows.append(row | {"upper_quartile": high})
    return rows


def draw(rows: list[report.Row]) -> Figure:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    names = [row["candidate"] for row in rows][::-1]
    bars = axes.barh(names, [1e6 * row["seconds"] for row in rows][::-1], color="C0")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="us of a call, forward and backward")
    axes.margins(x=0.12)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "overhead", device=False)
    parser.add_argument("--repetitions", type=report.positive, default=50, help="timed rounds")
    parser.add_argument("--calls", type=report.positive, default=20, help="calls timed together")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rows = times(args)
    lines = [
        [r["candidate"]]
        + [f"{1e6 * r[key]:.0f}" for key in ("seconds", "lower_quartile", "upper_quartile")]
        for r in rows
    ]
    text = (
        f"A call, forward and backward, computing next to nothing, one thread: medians of "
        f"{args.repetitions} interleaved rounds of {args.calls} calls\n\n"
        + report.table(["candidate", "us", "lower quartile", "upper quartile"], lines)
    )
    report.write(args, "overhead", rows, [], text, {"overhead": draw(rows)})
