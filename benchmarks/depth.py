"""What does a block cost in time?

Figures 3 and 4b of the paper: time of a training step against the number of residual blocks of two
capsule layers, and of inference. The paper's MoCapsNet took 1.8 times as long per block as its
ResCapsNet. Timed are the blocks alone (forward, backward, Adam), so that convolutions, the same for
all, do not drown what a block costs; the benchmark `step` times whole networks. The candidates are
those of the benchmark `memory`; they take turns within one run, and the table gives medians. Adam's
learning rate is zero, so that every round computes the same.

Before anything is timed, every candidate's results and gradients are compared with an eager, stored
stack in float64; a failure ends the run without a table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mocapsnet import CapsNet
from mocapsnet.layers import squashed
from mocapsnet.model import HIDDEN_SUM_LENGTH

from .shared import measure, report
from .shared.candidates import CANDIDATES, STYLES, Candidate, check

PHASES = ("training", "inference")
RATIOS = {  # label: phase, numerator, denominator, what is wanted
    "fused, reversible over stored": (
        "training",
        "MoCapsNet, fused, reversible",
        "MoCapsNet, fused, stored",
        "at most 1.3",
    ),
    "published, MoCapsNet over ResCapsNet": (
        "training",
        "MoCapsNet, published",
        "ResCapsNet, published",
        "1.8 in the paper",
    ),
    "reversible fused MoCapsNet over published ResCapsNet": (
        "training",
        "MoCapsNet, fused, reversible",
        "ResCapsNet, published",
        "",
    ),
    "fused inference, momentum over residual": (
        "inference",
        "MoCapsNet, fused, reversible",
        "ResCapsNet, fused",
        "0.95 to 1.05",
    ),
}


def capsules(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Capsules as long as those that enter the stack, and the gradient of what leaves it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 32, 8, generator=generator)
    x *= squashed(HIDDEN_SUM_LENGTH) / x.norm(dim=-1).square().mean().sqrt()
    g = torch.randn(batch, 32, 8, generator=generator)
    return x.to(device).requires_grad_(), g.to(device)


def results(model: CapsNet, *, batch: int) -> Iterator[Tensor | None]:
    """What the stack puts out and all its gradients, in the dtype of its parameters."""
    weight = model.last.weight
    x, g = (t.detach().to(weight.dtype) for t in capsules(batch, weight.device))
    x.requires_grad_()
    y = model.stack(x)
    y.backward(g)
    yield from (y, x.grad)
    yield from (p.grad for p in model.stack.parameters())


class Timed:
    """A training step and an inference of one candidate, as calls without arguments."""

    def __init__(self, candidate: Candidate, blocks: int, args: argparse.Namespace):
        self.stack = candidate.build(blocks, channels=8).stack.to(args.device)
        self.optimizer = torch.optim.Adam(self.stack.parameters(), lr=0.0)
        self.x, self.g = capsules(args.batch, args.device)

    def training(self) -> None:
        self.stack(self.x).backward(self.g)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    @torch.no_grad()
    def inference(self) -> None:
        self.stack.eval()
        self.stack(self.x)
        self.stack.train()


def times(args: argparse.Namespace) -> list[report.Row]:
    """One row per candidate, number of blocks and phase."""
    timed = {
        (name, blocks): Timed(candidate, blocks, args)
        for name, candidate in CANDIDATES.items()
        for blocks in args.blocks
    }
    rows = []
    for phase in PHASES:
        runs = {key: getattr(one, phase) for key, one in timed.items()}
        calls = 1 if phase == "training" else args.calls
        seconds = measure.interleaved(runs, args.repetitions, args.device, calls)
        for (name, blocks), values in seconds.items():
            low, median, high = measure.quartiles(values)
            row = {"candidate": name, "phase": phase, "blocks": blocks}
            rows.append(row | {"seconds": median, "lower_quartile": low, "upper_quartile": high})
    return rows


def summarize(rows: list[report.Row]) -> list[report.Row]:
    """Slopes over the medians of each candidate, then the ratios of slopes in `RATIOS`."""
    series = {phase: report.series(rows, "blocks", "seconds", phase=phase) for phase in PHASES}
    slopes = {
        (phase, name): measure.slope(*values)
        for phase in PHASES
        for name, values in series[phase].items()
    }
    summary: list[report.Row] = [
        {"phase": phase, "candidate": name, "seconds_per_block": slope}
        for (phase, name), slope in slopes.items()
    ]
    for label, (phase, upper, lower, wanted) in RATIOS.items():
        pairs = zip(series[phase][upper][1], series[phase][lower][1], strict=True)
        summary.append(
            {
                "phase": phase,
                "ratio": label,
                "of_slopes": slopes[phase, upper] / slopes[phase, lower],
                "of_times": statistics.median(a / b for a, b in pairs),
                "wanted": wanted,
            }
        )
    return summary


def describe(rows: list[report.Row], summary: list[report.Row], args: argparse.Namespace) -> str:
    """Markdown: a table per phase and one of ratios."""
    parts = []
    for phase in PHASES:
        slopes = {
            row["candidate"]: row["seconds_per_block"]
            for row in summary
            if row["phase"] == phase and "candidate" in row
        }
        lines: list[list[Any]] = [
            [name, *(f"{1e3 * t:.2f}" for t in times), f"{1e3 * slopes[name]:.2f}"]
            for name, (_, times) in report.series(rows, "blocks", "seconds", phase=phase).items()
        ]
        header = ["candidate", *(f"ms, {n}" for n in args.blocks), "ms per block"]
        head = f"{phase.capitalize()}, blocks alone, batch {args.batch}: medians of "
        head += f"{args.repetitions} interleaved rounds, against blocks"
        parts.append(f"{head}\n\n{report.table(header, lines)}")
    ratios = [
        [row["ratio"], f"{row['of_slopes']:.2f}", f"{row['of_times']:.2f}", row["wanted"]]
        for row in summary
        if "ratio" in row
    ]
    header = ["ratio", "of slopes", "of times, median over blocks", "wanted, of slopes"]
    return "\n\n".join([*parts, report.table(header, ratios)])


def draw(rows: list[report.Row]) -> Figure:
    """A panel per phase, with the quartiles as bands."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, len(PHASES))
    for axes, phase in zip(panels, PHASES, strict=True):
        median, low, high = (
            {
                name: (x, [1e3 * t for t in y])
                for name, (x, y) in report.series(rows, "blocks", column, phase=phase).items()
            }
            for column in ("seconds", "lower_quartile", "upper_quartile")
        )
        report.lines(axes, median, STYLES)
        for name, (x, y) in low.items():
            color = STYLES[name]["color"]
            axes.fill_between(x, y, high[name][1], color=color, alpha=0.12, linewidth=0)
        axes.set(title=f"{phase}, blocks alone", ylabel="ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "depth")
    parser.add_argument(
        "--blocks", type=report.positive, nargs="+", default=[1, 2, 4, 8], help="blocks"
    )
    parser.add_argument("--batch", type=report.positive, default=128, help="images")
    parser.add_argument("--repetitions", type=report.positive, default=15, help="timed rounds")
    parser.add_argument(
        "--calls", type=report.positive, default=3, help="inferences timed together"
    )
    args = parser.parse_args(argv)
    args.blocks = sorted(set(args.blocks))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    for blocks in args.blocks:
        check(CANDIDATES, blocks, 8, args.device, partial(results, batch=args.batch))
    rows = times(args)
    summary = summarize(rows)
    text = describe(rows, summary, args)
    report.write(args, "depth", rows, summary, text, {"depth": draw(rows)})
