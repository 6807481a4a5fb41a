"""How long does a training step take, and where does the time go?

Whole networks on MNIST shapes, one optimiser step of Adam on images that are there already, against
the number of residual blocks, in interleaved rounds. Then, for the fused MoCapsNet with one block:

- the share of each part of the network in a step, forward and backward, by PyTorch's profiler;
- the two convolutions alone, the library's and PyTorch's, the latter against the rate of a large
  matrix product, measured in the same run;
- the data pipeline alone (random crops, normalisation), to see that it is not the limit.

Convolutions in bfloat16 are timed where the device computes in it natively. Before anything is
timed, every candidate's results and gradients are compared with an eager model in float64, for
the batch that will be timed, with SiLU in the place of ReLU; see `candidates.check`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mocapsnet import Preprocessing
from mocapsnet.convolution import channels_last
from mocapsnet.train import data
from mocapsnet.train.options import DataOptions

from .shared import measure, report
from .shared.candidates import CANDIDATES, STYLES, batch_of, check, network_results, training_step
from .shared.published import plain_convolutions
from .shared.shares import shares

FUSED, BASELINE = "MoCapsNet, fused, reversible", "MoCapsNet, published"
BFLOAT16 = "MoCapsNet, fused, bfloat16 convolutions"
NAMES = (
    "CapsNet, published",
    "ResCapsNet, published",
    BASELINE,
    "CapsNet, fused",
    "ResCapsNet, fused",
    FUSED,
)
TARGETS = {FUSED: 2.7, BFLOAT16: 4.5}
"""Times as fast as the baseline, one block, two processor cores, batch 128."""


def step_of(name: str, blocks: int, args: argparse.Namespace) -> measure.Run:
    """A training step whose learning rate is zero, so that every round computes the same."""
    model = CANDIDATES[FUSED if name == BFLOAT16 else name].build(blocks, args.channels)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    batch = batch_of(args.batch, args.device)
    return training_step(model, optimizer, batch, bfloat16=name == BFLOAT16)


def times(args: argparse.Namespace) -> list[report.Row]:
    """One row per candidate and number of blocks."""
    names = [*NAMES, BFLOAT16] if measure.has_bfloat16(args.device) else NAMES
    runs = {(name, n): step_of(name, n, args) for name in names for n in args.blocks}
    rows = []
    for (name, blocks), values in measure.interleaved(runs, args.repetitions, args.device).items():
        low, median, high = measure.quartiles(values)
        rows.append(
            {
                "candidate": name,
                "blocks": blocks,
                "seconds": median,
                "lower_quartile": low,
                "upper_quartile": high,
                "images_per_second": args.batch / median,
            }
        )
    return rows


def convolutions(args: argparse.Namespace) -> report.Row:
    """Seconds and operations per second of both convolutions, forward and backward, alone.

    float32 is IEEE float32, as in the matrix product that they are compared with; GPUs would take
    TF32 unasked.
    """
    library = CANDIDATES[FUSED].build(0, args.channels).to(args.device)
    pytorch = plain_convolutions(library.convolutions)
    images = batch_of(args.batch, args.device)[0]
    features = pytorch(images)
    gradient = torch.randn_like(features)
    first, second = (c for c in pytorch if isinstance(c, nn.Conv2d))
    middle = first(images)
    # The images need no gradient; everything else is a product forward and two backward.
    per_weight = {first: 2 * math.prod(middle.shape[2:]), second: 3 * features[0, 0].numel()}
    operations = sum(2 * args.batch * n * c.weight.numel() for c, n in per_weight.items())

    def run(convolve: Callable[[Tensor], Tensor], bfloat16: bool) -> None:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=bfloat16):
            out = convolve(channels_last(images) if bfloat16 else images)
        out.backward(gradient.to(out.dtype))

    dtypes = ["float32", *(["bfloat16"] if measure.has_bfloat16(args.device) else [])]
    runs = {
        (dtype, name): partial(run, convolve, dtype == "bfloat16")
        for dtype in dtypes
        for name, convolve in (("library", library.features), ("pytorch", pytorch))
    }
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        seconds = measure.interleaved(runs, args.repetitions, args.device)
    rates = measure.rates(args.device)
    limits = {"float32": rates.matrix, "bfloat16": rates.matrix_bf16}
    found: report.Row = {"operations": operations}
    for dtype in dtypes:
        medians = {n: measure.quartiles(seconds[dtype, n])[1] for n in ("library", "pytorch")}
        found |= {
            f"{dtype}_seconds": medians["library"],
            f"{dtype}_pytorch_seconds": medians["pytorch"],
            f"{dtype}_pytorch_rate": operations / medians["pytorch"],
            f"{dtype}_matrix_rate": limits[dtype],
        }
    return found


def pipeline(args: argparse.Namespace) -> float:
    """Images per second that the training loop's transforms deliver."""
    count = 20 * args.batch
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8)
    images, labels = images.to(args.device), torch.zeros(count, dtype=torch.int64)
    train_set = data.ImageSet(images, labels.to(args.device))

    def epoch() -> None:
        views = data.epoch_views(count, DataOptions(pad=2), 0, 0).to(args.device)
        for batch in views.split(args.batch):
            Preprocessing()(data.view(train_set, batch, 2))

    seconds = measure.interleaved({"epoch": epoch}, args.repetitions, args.device)["epoch"]
    return count / measure.quartiles(seconds)[1]


def speedups(rows: list[report.Row], blocks: int) -> dict[str, float]:
    """How many times as fast as the baseline, for the targets' candidates that were timed."""
    seconds = {row["candidate"]: row["seconds"] for row in rows if row["blocks"] == blocks}
    return {name: seconds[BASELINE] / seconds[name] for name in TARGETS if name in seconds}


def describe(rows: list[report.Row], found: report.Row, args: argparse.Namespace) -> str:
    """Markdown: times, targets, shares, convolutions, pipeline."""
    blocks = args.blocks[0]
    lines = [
        [name, *(f"{1e3 * t:.1f}" for t in seconds), f"{args.batch / seconds[0]:,.0f}"]
        for name, (_, seconds) in report.series(rows, "blocks", "seconds").items()
    ]
    header = ["candidate", *(f"ms, {n}" for n in args.blocks), f"images/s, {blocks}"]
    parts = [
        f"Training step, batch {args.batch}, {args.channels} channels: medians of "
        f"{args.repetitions} interleaved rounds, against blocks\n\n{report.table(header, lines)}"
    ]
    parts += [
        f"{name}, {blocks} block: {ratio:.2f} times as fast as {BASELINE} "
        f"(wanted on two cores: {TARGETS[name]})."
        for name, ratio in found["speedups"].items()
    ]
    if BFLOAT16 not in found["speedups"]:
        parts.append(
            "Convolutions in bfloat16 were not timed: this device has no bfloat16 instructions."
        )
    share = [
        [part, f"{value:.1%}", f"{1e3 * value * found['step_seconds']:.1f}"]
        for part, value in found["shares"].items()
    ]
    parts.append(
        f"Shares of a step of {FUSED}, {blocks} block, by the profiler, and in ms of the step "
        f"without it\n\n{report.table(['part', 'share', 'ms'], share)}"
    )
    convolution = found["convolutions"]
    for name in ("float32", "bfloat16"):
        if f"{name}_seconds" in convolution:
            own, pytorch = convolution[f"{name}_seconds"], convolution[f"{name}_pytorch_seconds"]
            rate, limit = convolution[f"{name}_pytorch_rate"], convolution[f"{name}_matrix_rate"]
            parts.append(
                f"Both convolutions alone in {name}, forward and backward: {1e3 * own:.1f} ms, "
                f"{pytorch / own:.2f} times as fast as PyTorch's {1e3 * pytorch:.1f} ms. Those are "
                f"{rate / 1e9:,.0f} GFLOP/s; a large matrix product in the same run: "
                f"{limit / 1e9:,.0f} GFLOP/s; ratio {rate / limit:.2f}."
            )
    parts.append(
        f"The data pipeline alone delivers {found['pipeline']:,.0f} images/s, "
        f"{found['pipeline'] * found['step_seconds'] / args.batch:,.0f} times what the step takes."
    )
    return "\n\n".join(parts)


def draw(rows: list[report.Row], found: report.Row) -> Figure:
    """Time against blocks; shares of a step."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    time, share = figure.subplots(1, 2, width_ratios=(1, 1))
    medians = report.series(rows, "blocks", "seconds")
    styles: dict[str, Any] = STYLES | {BFLOAT16: {"color": "C2"}}
    report.lines(
        time, {name: (x, [1e3 * t for t in y]) for name, (x, y) in medians.items()}, styles
    )
    time.set(title="training step", ylabel="ms")
    time.legend(fontsize="small")
    parts = dict(reversed(found["shares"].items()))
    bars = share.barh(list(parts), [100 * value for value in parts.values()], color="C0")
    share.bar_label(bars, fmt="%.1f", padding=3)
    share.set(title=f"where a step of {FUSED} goes", xlabel="% of the time")
    share.margins(x=0.12)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "step")
    parser.add_argument(
        "--blocks", type=report.positive, nargs="+", default=[1, 2, 4, 8], help="blocks"
    )
    parser.add_argument("--batch", type=report.positive, default=128, help="images")
    parser.add_argument(
        "--channels", type=report.positive, default=256, help="of both convolutions"
    )
    parser.add_argument("--repetitions", type=report.positive, default=5, help="timed rounds")
    args = parser.parse_args(argv)
    args.blocks = sorted(set(args.blocks))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    gate = {name: CANDIDATES[name] for name in NAMES}
    for blocks in args.blocks:
        check(gate, blocks, args.channels, args.device, partial(network_results, batch=args.batch))
        if measure.has_bfloat16(args.device):
            in_bfloat16 = partial(network_results, batch=args.batch, bfloat16=True)
            check({BFLOAT16: CANDIDATES[FUSED]}, blocks, args.channels, args.device, in_bfloat16)
    rows = times(args)
    model = CANDIDATES[FUSED].build(args.blocks[0], args.channels).to(args.device)
    found: report.Row = {
        "speedups": speedups(rows, args.blocks[0]),
        "step_seconds": next(row["seconds"] for row in rows if row["candidate"] == FUSED),
        "shares": shares(model, batch_of(args.batch, args.device), args.repetitions),
        "convolutions": convolutions(args),
        "pipeline": pipeline(args),
    }
    report.write(
        args, "step", rows, [found], describe(rows, found, args), {"step": draw(rows, found)}
    )
