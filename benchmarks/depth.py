"""What does a block cost in time?

    python -m benchmarks.depth              # prints a table, draws a picture
    python -m benchmarks.depth --part model

Figures 3 and 4b of the paper: time of a training step against the number of residual blocks of two
capsule layers, and of inference. The paper's MoCapsNet took 1.8 times as long per block as its
ResCapsNet. `--part stack` times the blocks alone (forward, backward, Adam), so that convolutions,
the same for all, do not drown what a block costs; `--part model` the whole step on MNIST shapes.
The candidates are those of `benchmarks.memory`; they take turns within one run, and the table gives
medians. Adam's learning rate is zero, so that every round computes the same.

Before anything is timed, every candidate's results and gradients are compared with an eager,
stored model in float64; a failure ends the run without a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mocapsnet import CapsNet
from mocapsnet.layers import squashed
from mocapsnet.model import HIDDEN_SUM_LENGTH

from . import report
from .memory import CANDIDATES, STYLES, Candidate, batch_of, training_step

TOLERANCE = 1e-4
CHECKED = 8
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


def results(model: CapsNet, part: str, batch: int, device: torch.device) -> Iterator[Tensor | None]:
    """What the part puts out and all its gradients, in the dtype of its parameters."""
    dtype = model.last.weight.dtype
    if part == "stack":
        x, g = (t.detach().to(dtype) for t in capsules(batch, device))
        x.requires_grad_()
        y = model.stack(x)
        y.backward(g)
        yield from (y, x.grad)
        parameters = model.stack.parameters()
    else:
        images, pixels, labels = batch_of(batch, device)
        output = model(images.to(dtype), labels)
        error = (output.reconstruction - pixels).square().sum()
        (output.lengths.square().sum() + error).backward()
        yield from (output.capsules, output.reconstruction)
        parameters = model.parameters()
    yield from (p.grad for p in parameters)


def check(blocks: int, args: argparse.Namespace) -> None:
    """Raises SystemExit unless every candidate is as close to float64 as eager code is.

    That is `TOLERANCE` and twice the eager error in float32, which is larger in deep stacks
    without shortcuts.
    """
    known: dict[str, tuple[list[Any], list[float]]] = {}

    def found(candidate: Candidate, backend: str | None, dtype: torch.dtype) -> list[Any]:
        model = candidate.build(blocks, args.channels, backend).to(args.device, dtype)
        return list(results(model, args.part, min(CHECKED, args.batch), args.device))

    with torch.backends.cudnn.flags(allow_tf32=False):
        for name, candidate in CANDIDATES.items():
            if candidate.model not in known:
                plain = Candidate(candidate.model, None, "stored")
                truth = found(plain, "reference", torch.float64)
                eager = found(plain, "reference", torch.float32)
                known[candidate.model] = truth, errors(eager, truth)
            truth, allowed = known[candidate.model]
            got = errors(found(candidate, None, torch.float32), truth)
            for error, least in zip(got, allowed, strict=True):
                if not error <= TOLERANCE + 2 * least:
                    sys.exit(
                        f"{name}, {blocks} blocks: relative error {error:.1e}, eager code "
                        f"{least:.1e}; nothing was timed"
                    )


def errors(found: list[Any], truth: list[Any]) -> list[float]:
    """Relative, norm of the difference over norm of the truth; infinite if there is no gradient."""
    return [
        math.inf if x is None else float((x.detach() - t.detach()).norm() / t.detach().norm())
        for x, t in zip(found, truth, strict=True)
    ]


class Timed:
    """A training step and an inference of one candidate, as calls without arguments."""

    def __init__(self, candidate: Candidate, blocks: int, args: argparse.Namespace):
        model = candidate.build(blocks, args.channels).to(args.device)
        stack = args.part == "stack"
        self.module: nn.Module = model.stack if stack else model
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.0)
        if stack:
            self.x, self.g = capsules(args.batch, args.device)
        else:
            batch = batch_of(args.batch, args.device)
            self.x = batch[0]
            self.training = training_step(model, self.optimizer, batch)

    def training(self) -> None:
        self.module(self.x).backward(self.g)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    @torch.no_grad()
    def inference(self) -> None:
        self.module.eval()
        self.module(self.x)
        self.module.train()


def measure(args: argparse.Namespace) -> list[report.Row]:
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
        seconds = report.interleaved(runs, args.repetitions, args.device, calls)
        for (name, blocks), values in seconds.items():
            low, median, high = report.quartiles(values)
            row = {"candidate": name, "phase": phase, "part": args.part, "blocks": blocks}
            rows.append(row | {"seconds": median, "lower_quartile": low, "upper_quartile": high})
    return rows


Series = dict[str, tuple[list[int], list[float]]]


def by_candidate(rows: list[report.Row], phase: str, column: str = "seconds") -> Series:
    """Blocks and times of each candidate."""
    return {
        name: tuple(
            [row[key] for row in rows if (row["candidate"], row["phase"]) == (name, phase)]
            for key in ("blocks", column)
        )  # type: ignore[misc]
        for name in CANDIDATES
    }


def summarize(rows: list[report.Row]) -> list[report.Row]:
    """Slopes over the medians of each candidate, then the ratios of slopes in `RATIOS`."""
    slopes = {
        (phase, name): report.slope(*values)
        for phase in PHASES
        for name, values in by_candidate(rows, phase).items()
    }
    summary: list[report.Row] = [
        {"phase": phase, "candidate": name, "seconds_per_block": slope}
        for (phase, name), slope in slopes.items()
    ]
    for label, (phase, upper, lower, wanted) in RATIOS.items():
        series = by_candidate(rows, phase)
        totals = [a / b for a, b in zip(series[upper][1], series[lower][1], strict=True)]
        summary.append(
            {
                "phase": phase,
                "ratio": label,
                "of_slopes": slopes[phase, upper] / slopes[phase, lower],
                "of_times": statistics.median(totals),
                "wanted": wanted,
            }
        )
    return summary


def describe(rows: list[report.Row], summary: list[report.Row], args: argparse.Namespace) -> str:
    """Markdown: a table per phase and one of ratios."""
    parts = []
    for phase in PHASES:
        series = by_candidate(rows, phase)
        slopes = {
            row["candidate"]: row["seconds_per_block"]
            for row in summary
            if row["phase"] == phase and "candidate" in row
        }
        lines: list[list[Any]] = [
            [name, *(f"{1e3 * t:.2f}" for t in times), f"{1e3 * slopes[name]:.2f}"]
            for name, (_, times) in series.items()
        ]
        header = ["candidate", *(f"ms, {n}" for n in args.blocks), "ms per block"]
        head = f"{phase.capitalize()}, {args.part}, batch {args.batch}: medians of "
        head += f"{args.repetitions} interleaved rounds, against blocks"
        parts.append(f"{head}\n\n{report.table(header, lines)}")
    ratios = [
        [row["ratio"], f"{row['of_slopes']:.2f}", f"{row['of_times']:.2f}", row["wanted"]]
        for row in summary
        if "ratio" in row
    ]
    header = ["ratio", "of slopes", "of times, median over blocks", "wanted, of slopes"]
    return "\n\n".join([*parts, report.table(header, ratios)])


def draw(rows: list[report.Row], part: str) -> Figure:
    """A panel per phase, with the quartiles as bands."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, len(PHASES))
    for axes, phase in zip(panels, PHASES, strict=True):
        series = by_candidate(rows, phase)
        report.lines(
            axes, {name: (x, [1e3 * t for t in y]) for name, (x, y) in series.items()}, STYLES
        )
        low = by_candidate(rows, phase, "lower_quartile")
        high = by_candidate(rows, phase, "upper_quartile")
        for name, (x, y) in low.items():
            band = [[1e3 * t for t in times] for times in (y, high[name][1])]
            axes.fill_between(x, *band, color=STYLES[name]["color"], alpha=0.12, linewidth=0)
        axes.set(title=f"{phase}, {part}", ylabel="ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "depth")
    parser.add_argument("--part", choices=("stack", "model"), default="stack", help="what is timed")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8], help="blocks")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--channels", type=int, default=256, help="of both convolutions")
    parser.add_argument("--repetitions", type=int, default=15, help="timed rounds")
    parser.add_argument("--calls", type=int, default=3, help="inferences timed together")
    args = parser.parse_args(argv)
    args.blocks = sorted(set(args.blocks))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    for blocks in args.blocks:
        check(blocks, args)
    rows = measure(args)
    summary = summarize(rows)
    name = f"depth_{args.part}"
    folder = report.write(args, name, rows, summary, describe(rows, summary, args))
    draw(rows, args.part).savefig(folder / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
