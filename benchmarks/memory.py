"""What does a block cost in memory?

Table 4 and Figure 4a of the paper: one training step (forward, loss, backward, Adam) on images of
the shape of MNIST, or of CIFAR-10 and SVHN; peak of live tensor bytes including images, parameters,
gradients and Adam's state, against the number of residual blocks of two capsule layers. The paper
measured 4462 MB for ResCapsNet on MNIST with one block and about 190 MB more per block, for
MoCapsNet 4320 MB and 4 MB.

"published" routes eagerly with a broadcast matrix product, which copies the weights once per
sample; "einsum" without the copy; "checkpoint" computes every block again in backward. Published
MoCapsNet is reversible. The table gives a block's cost also in units of four times the bytes of its
parameters: parameters, gradients and Adam's two moments, which nobody can do without.

Then a reversible stack alone, forward and backward, of up to 1,000 layers: peak beyond weight
gradients and anchors, the stored states that stop rounding errors.

Before anything is measured, every candidate's results and gradients, with the fewest blocks, are
compared with an eager model in float64; a failure ends the run without a table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mocapsnet import CapsuleLayer, MomentumStack

from .shared import measure, report
from .shared.candidates import (
    CANDIDATES,
    IMAGES,
    STYLES,
    Candidate,
    batch_of,
    check,
    network_results,
    training_step,
)

SLOPE_TARGET, TOTAL_TARGET = 1.1, 0.2


def step_bytes(candidate: Candidate, blocks: int, args: argparse.Namespace) -> dict[str, int]:
    """Peak of a training step, and what forward keeps for backward.

    A first step, on two images, makes Adam's state.
    """
    model = candidate.build(blocks, args.channels, images=args.images).to(args.device)
    optimizer = torch.optim.Adam(model.parameters())
    images, pixels, labels = batch = batch_of(args.batch, args.device, model.config.image_shape)
    training_step(model, optimizer, (images[:2], pixels[:2], labels[:2]))()
    state = [t for values in optimizer.state.values() for t in values.values()]
    gc.collect()
    before = size_of([*model.parameters(), *state, *batch])
    beyond = measure.peak_bytes(training_step(model, optimizer, batch), args.device)
    _, kept = measure.memory_of(lambda: model(images, labels), args.device)
    return {"peak_bytes": before + beyond, "kept_bytes": kept}


def activation_bytes(layers: int, batch: int, device: torch.device) -> int:
    """Peak of forward and backward of a reversible stack of capsule layers, 32 of 8 components.

    Beyond the capsules that enter, and less what depth must cost: weight gradients and anchors.
    """
    torch.manual_seed(0)
    stack = MomentumStack([CapsuleLayer(32, 8, 32, 8) for _ in range(layers)]).to(device)
    weights = list(stack.parameters())
    x = torch.randn(batch, 32, 8, device=device, requires_grad=True)
    g = torch.randn_like(x)
    peak = measure.peak_bytes(lambda: torch.autograd.grad(stack(x), [x, *weights], g), device)
    anchors = -(-layers // stack.spacing(x.dtype)) * 2 * x.nbytes
    return peak - size_of(weights) - anchors


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def unit(args: argparse.Namespace) -> int:
    """Bytes of a block's parameters, gradients and Adam moments."""
    block = CANDIDATES["MoCapsNet, fused, reversible"].build(1, args.channels).stack
    return 4 * size_of(block.parameters())


def summarize(rows: list[report.Row], unit: int) -> list[report.Row]:
    """Per candidate: slopes over the blocks, and the total with the fewest blocks."""
    series = report.series(rows, "blocks", "peak_bytes")
    kept = report.series(rows, "blocks", "kept_bytes")
    baseline = series["ResCapsNet, published"][1][0]
    summary = []
    for name, (blocks, values) in series.items():
        slope = measure.slope(blocks, values)
        summary.append(
            {
                "candidate": name,
                "bytes_per_block": slope,
                "slope_over_state": slope / unit,
                "kept_per_block": measure.slope(*kept[name]),
                "blocks": blocks[0],
                "peak_bytes": values[0],
                "times_published": values[0] / baseline,
            }
        )
    return summary


def describe(
    rows: list[report.Row], summary: list[report.Row], batch: int, images: str = "mnist"
) -> str:
    """Markdown: the table and how the targets are met."""
    series = report.series(rows, "blocks", "peak_bytes")
    blocks = summary[0]["blocks"]
    counts = [f"MB, {n}" for n in series[summary[0]["candidate"]][0]]
    header = ["candidate", *counts, "MB per block", "over its state", "kept per block"]
    header.append(f"{blocks} block: times")
    lines = [
        [
            row["candidate"],
            *(f"{value / 1e6:.1f}" for value in series[row["candidate"]][1]),
            f"{row['bytes_per_block'] / 1e6:.2f}",
            f"{row['slope_over_state']:.2f}",
            f"{row['kept_per_block'] / 1e6:.2f}",
            f"{row['times_published']:.3f}",
        ]
        for row in summary
        if "candidate" in row
    ]
    best = next(row for row in summary if row.get("candidate") == "MoCapsNet, fused, reversible")
    deep = [[row["layers"], row["activation_bytes"]] for row in summary if "layers" in row]
    return "\n\n".join(
        [
            f"Peak of live tensors in one training step, batch {batch}, images of the shape of "
            f"{images}, against blocks. Over its state: the slope over four times a block's "
            "parameters. Kept per block: MB that forward keeps for backward; they are freed before "
            "the first capsule layer goes backward, where most of these peaks lie, and show in a "
            "peak once blocks outweigh that layer. Times: over published ResCapsNet.",
            report.table(header, lines),
            f"Reversible fused MoCapsNet: a block costs {best['slope_over_state']:.2f} times its "
            f"state (target at most {SLOPE_TARGET}); a step with {blocks} block takes "
            f"{best['times_published']:.3f} of published ResCapsNet's (target at most "
            f"{TOTAL_TARGET}).",
            "The reversible stack alone, beyond weight gradients and anchors (target: at most 5 MB "
            "more for 1000 layers than for 10):",
            report.table(["layers", "MB"], [[n, f"{value / 1e6:.2f}"] for n, value in deep]),
        ]
    )


def draw(rows: list[report.Row]) -> Figure:
    """Peaks, and what forward keeps for backward beyond the smallest network."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    totals, growth = figure.subplots(1, 2)
    peaks, kept = (
        {
            name: (x, [value / 1e6 for value in y])
            for name, (x, y) in report.series(rows, "blocks", column).items()
        }
        for column in ("peak_bytes", "kept_bytes")
    )
    report.lines(totals, peaks, STYLES)
    totals.set(title="one training step", ylabel="peak of live tensors, MB")
    added = {name: (x, [v - y[0] for v in y]) for name, (x, y) in kept.items()}
    report.lines(growth, added, STYLES)
    first = rows[0]["blocks"]
    growth.set(
        title="kept for backward", ylabel=f"MB more than with {first} block", yscale="linear"
    )
    handles, labels = totals.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "memory")
    parser.add_argument(
        "--blocks", type=report.positive, nargs="+", default=[1, 2, 4, 8], help="blocks"
    )
    parser.add_argument("--batch", type=report.positive, default=128, help="images")
    parser.add_argument(
        "--channels", type=report.positive, default=256, help="of both convolutions"
    )
    parser.add_argument(
        "--images", choices=list(IMAGES), default="mnist", help="shape of the images"
    )
    parser.add_argument(
        "--layers",
        type=report.positive,
        nargs="+",
        default=[10, 100, 1000],
        help="of the stack alone",
    )
    args = parser.parse_args(argv)
    args.blocks = sorted(set(args.blocks))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    results = partial(network_results, batch=args.batch)
    check(CANDIDATES, min(args.blocks), args.channels, args.device, results, args.images)
    rows: list[report.Row] = []
    for name, candidate in CANDIDATES.items():
        for blocks in args.blocks:
            found = step_bytes(candidate, blocks, args)
            rows.append({"candidate": name, "blocks": blocks} | found)
    summary = summarize(rows, unit(args))
    for layers in sorted(args.layers):
        activations = activation_bytes(layers, args.batch, args.device)
        summary.append({"layers": layers, "activation_bytes": activations})
    text = describe(rows, summary, args.batch, args.images)
    report.write(args, "memory", rows, summary, text, {"memory": draw(rows)})
