"""How much faster is `routing` than eager code, and how much memory does it take?

    python -m benchmarks.routing            # prints a table

Forward and backward of routing by agreement for the shapes of the paper, batch 128, float32. The
candidates take turns within one run, so that a drift of the machine's speed meets all alike, and
the table gives medians. Before anything is timed, every candidate's result and gradients are
compared with the float64 reference on the very inputs; a failure ends the run without a table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mocapsnet.kernels import routing

from . import published, report

Candidate = Callable[[Tensor, Tensor], Tensor]

CANDIDATES: dict[str, Candidate] = {
    "broadcast matmul": published.broadcast_matmul,
    "einsum": published.einsum,
    "routing": routing,
}
SHAPES = {  # B, N, K, J, D
    "layer 1, MNIST": (128, 1152, 8, 32, 8),
    "block layer": (128, 32, 8, 32, 8),
    "layer 2, 10 classes": (128, 32, 8, 10, 16),
    "layer 2, 100 classes": (128, 32, 8, 100, 16),
}


def problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    B, N, K, J, D = shape
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(B, N, K, generator=generator) * 0.2
    W = torch.randn(N, K, J, D, generator=generator) * (J / (N * D) ** 0.5)
    g = torch.randn(B, J, D, generator=generator)
    return u.requires_grad_(), W.requires_grad_(), g


def forward_backward(run: Candidate, u: Tensor, W: Tensor, g: Tensor) -> list[Tensor]:
    u.grad = W.grad = None
    v = run(u, W)
    v.backward(g)
    assert u.grad is not None and W.grad is not None
    return [v.detach(), u.grad, W.grad]


def check(shape: tuple[int, ...]) -> None:
    """Raises SystemExit unless every candidate agrees with the float64 reference to 1e-4."""
    u, W, g = problem(shape)
    few = slice(0, 8)  # samples are independent; eight keep the reference's memory small
    u64, W64 = (x.detach().double().requires_grad_() for x in (u[few], W))
    truth = forward_backward(
        lambda u, W: routing(u, W, backend="reference"), u64, W64, g[few].double()
    )
    for name, run in CANDIDATES.items():
        leaf = u[few].detach().requires_grad_()
        for x, t in zip(forward_backward(run, leaf, W, g[few]), truth, strict=True):
            error = float((x - t).norm() / t.norm())
            if not error < 1e-4:
                sys.exit(f"{name}, {shape}: relative error {error:.1e}; nothing was timed")


def time_candidates(shape: tuple[int, ...], repetitions: int) -> dict[str, float]:
    """Median seconds of forward and backward."""
    inputs = problem(shape)
    runs = {name: partial(forward_backward, run, *inputs) for name, run in CANDIDATES.items()}
    seconds = report.interleaved(runs, repetitions, torch.device("cpu"))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(run: Candidate, shape: tuple[int, ...]) -> int:
    """Peak of live tensor bytes beyond the inputs."""
    return report.peak_bytes(partial(forward_backward, run, *problem(shape)), torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--repetitions", type=int, default=7, help="timed rounds (default: 7)")
    repetitions = parser.parse_args().repetitions
    for shape in SHAPES.values():
        check(shape)
    print(
        f"{report.processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, float32; "
        f"medians of {repetitions} interleaved rounds of forward and backward"
    )
    print("| shape (B, N, K, J, D) | candidate | ms | times routing | peak MB |")
    print("|---|---|---|---|---|")
    for label, shape in SHAPES.items():
        medians = time_candidates(shape, repetitions)
        for name, run in CANDIDATES.items():
            ratio = medians[name] / medians["routing"]
            print(
                f"| {label} {shape} | {name} | {1e3 * medians[name]:.1f} | {ratio:.1f} "
                f"| {peak_bytes(run, shape) / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
