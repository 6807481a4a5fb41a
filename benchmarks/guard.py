"""Is the speed still there?

Ratios against eager code in one run of a minute, with wide margins, so that they hold on any
machine and beside other work: fails, with exit code 1, if the library lost what it exists for.
Absolute times are never looked at.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocapsnet.convolution import Conv2d, channels_last

from . import depth
from .routing import PUBLISHED, check
from .shared import measure, report
from .shared.candidates import CANDIDATES
from .shared.published import plain
from .shared.routing_candidates import Candidate, candidates, forward_backward, problem

LAYER_1 = (32, 1152, 8, 32, 8)
BLOCKS = 4
CHANNELS = 256


class Ratio(NamedTuple):
    """A median ratio and the worst that passes."""

    name: str
    value: float
    at_most: float

    @property
    def passes(self) -> bool:
        return self.value <= self.at_most


def routing_ratios(args: argparse.Namespace) -> list[Ratio]:
    """Layer 1, forward and backward: time and memory over eager code's."""
    these, _ = candidates(LAYER_1, args.device, compiled=False)
    ours = "triton" if args.device.type == "cuda" else "chunked"
    these = {name: these[name] for name in (PUBLISHED, "einsum", ours)}
    check(LAYER_1, these, args.device)
    inputs = problem(LAYER_1, args.device)

    def runs(these: dict[str, Candidate]) -> dict[str, measure.Run]:
        return {name: partial(forward_backward, run.route, *inputs) for name, run in these.items()}

    seconds = measure.interleaved(runs(these), args.repetitions, args.device)
    peaks = {n: measure.peak_bytes(run, args.device) for n, run in runs(these).items()}
    return [
        Ratio("time of layer 1 over published code's", over(seconds, ours, PUBLISHED), 0.2),
        Ratio("time of layer 1 over einsum's", over(seconds, ours, "einsum"), 0.6),
        Ratio("memory of layer 1 over einsum's", peaks[ours] / peaks["einsum"], 0.5),
    ]


def stack_ratios(args: argparse.Namespace) -> list[Ratio]:
    """Four blocks, forward and backward: what reversing costs, and what it saves."""
    args.batch = 64
    names = ["MoCapsNet, fused, reversible", "MoCapsNet, fused, stored", "MoCapsNet, published"]
    reversible, stored, published = names
    timed = {name: depth.Timed(CANDIDATES[name], BLOCKS, args) for name in names}
    runs: dict[str, measure.Run] = {name: one.training for name, one in timed.items()}
    seconds = measure.interleaved(runs, args.repetitions, args.device)
    return [
        Ratio("time of reversible blocks over stored", over(seconds, reversible, stored), 1.8),
        Ratio("time of blocks over published code's", over(seconds, reversible, published), 0.4),
    ]


def convolution_ratios(args: argparse.Namespace) -> list[Ratio]:
    """The paper's second convolution on a CPU, forward and backward, over PyTorch's."""
    if args.device.type != "cpu":
        return []
    torch.manual_seed(0)
    ours = Conv2d(CHANNELS, CHANNELS, 9, stride=2)
    images = channels_last(torch.randn(128, CHANNELS, 20, 20)).requires_grad_()

    def run(layer: nn.Conv2d, images: Tensor) -> list[Tensor]:
        y = layer(images)
        gradients = torch.autograd.grad(y, (images, layer.weight), torch.ones_like(y))
        return [y.detach(), *gradients]

    pytorch = partial(run, plain(ours), images.detach().contiguous().requires_grad_())
    runs: dict[str, measure.Run] = {"ours": partial(run, ours, images), "pytorch": pytorch}
    for got, want in zip(run(ours, images), pytorch(), strict=True):
        if measure.relative_error(got, want) > 1e-5:
            sys.exit("the convolution by Fourier coefficients is not PyTorch's")
    seconds = measure.interleaved(runs, args.repetitions, args.device)
    return [Ratio("time of a convolution over PyTorch's", over(seconds, "ours", "pytorch"), 0.9)]


def over(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of the ratio within a round."""
    pairs = zip(seconds[name], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__, "guard", output=False)
    parser.add_argument("--repetitions", type=report.positive, default=7, help="timed rounds")
    args = parser.parse_args(argv)
    found = [*routing_ratios(args), *stack_ratios(args), *convolution_ratios(args)]
    lines = [[r.name, f"{r.value:.3f}", r.at_most, "yes" if r.passes else "**no**"] for r in found]
    text = report.table(["ratio", "found", "at most", "passes"], lines)
    print(f"{text}\n\n{report.title(report.machine(args.device))}")
    if not all(ratio.passes for ratio in found):
        sys.exit("the library is slower or larger than it should be: see above")
