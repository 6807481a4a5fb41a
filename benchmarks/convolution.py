"""What do convolutional capsules cost, beside the same layers written with unfold and einsum?

One layer first, forward and backward: 3x3 windows of capsules, as many of as many components out as
in. "einsum" unfolds the windows and has all votes in memory; "checkpoint" is that under
`torch.utils.checkpoint`; "fused" is `conv_routing`. The three take turns at one batch size, the
largest power of two, up to the batch that is asked for, at which einsum code takes no more than
`--limit`; then the fused layer runs at the whole batch. Wanted: 4 times as fast as einsum code in a
tenth of its memory.

Then a training step (forward, backward, Adam) of stacks of momentum blocks, two layers each: what a
block adds to the peak of live tensors, over four times the bytes of its parameters, which
parameters, gradients and Adam's state take. Wanted for the reversible stack: at most 1.1.

At last a training step of a whole `ConvMoCapsNet` on large images, in processes whose memory is
limited, on a CPU alone: peaks as the system counts them. `--side 0` leaves it out.

Before anything is measured, results and gradients of every layer are compared with the float64
reference on small grids of the same capsules; a failure ends the run without a table. The large
networks' seconds are of one step, the first.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mocapsnet import CapsuleLoss, ConvMoCapsNet, MomentumStack
from mocapsnet.kernels import conv_routing

from .memory import size_of
from .shared import measure, report, unfolded
from .shared.routing_candidates import Route, forward_backward

LAYERS: dict[str, Route] = {
    "einsum": unfolded.einsum,
    "checkpoint": unfolded.checkpointed,
    "fused": partial(conv_routing, padding=1),
}
STACKS = ("einsum, stored", "checkpoint, stored", "fused, reversible")
NETWORKS = STACKS[::-1]
STYLES = dict(
    zip(STACKS, ({"color": c} for c in ("tab:red", "tab:orange", "tab:blue")), strict=True)
)
SPEED_TARGET, MEMORY_TARGET, SLOPE_TARGET = 4, 0.1, 1.1
TOLERANCE = 1e-5


def problem(
    side: int, capsules: int, dim: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, side, side, N, K], W [3, 3, N, K, N, K], and the gradient of v."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, side, side, capsules, dim, generator=generator) * 0.2
    W = torch.randn(3, 3, capsules, dim, capsules, dim, generator=generator) * (3 * dim**0.5) ** -1
    g = torch.randn(u.shape, generator=generator)
    return u.to(device).requires_grad_(), W.to(device).requires_grad_(), g.to(device)


def check(args: argparse.Namespace) -> None:
    """Raises SystemExit unless all candidates are close to the float64 reference."""
    truth_of = partial(conv_routing, padding=1, backend="reference")
    for capsules in args.capsules:
        tensors = problem(5, capsules, args.dim, 2, args.device)
        doubles = [x.detach().double().requires_grad_() for x in tensors]
        truth = forward_backward(truth_of, *doubles)
        eager = forward_backward(unfolded.einsum, *tensors)
        bounds = [
            max(TOLERANCE, 2 * measure.relative_error(*pair))
            for pair in zip(eager, truth, strict=True)
        ]
        for name, route in LAYERS.items():
            got = forward_backward(route, *tensors)
            errors = [measure.relative_error(*pair) for pair in zip(got, truth, strict=True)]
            if any(error > bound for error, bound in zip(errors, bounds, strict=True)):
                sys.exit(
                    f"{name}, {capsules} capsules: errors {errors}, at most {bounds} are allowed"
                )


def layer_rows(side: int, capsules: int, args: argparse.Namespace) -> list[report.Row]:
    """Time and peak of every candidate, and of the fused layer at the whole batch."""
    whole = args.batch or max(1, 2048 // side)
    make = partial(problem, side, capsules, args.dim, device=args.device)

    def peak(name: str, batch: int) -> int:
        tensors = make(batch=batch)
        return measure.peak_bytes(partial(forward_backward, LAYERS[name], *tensors), args.device)

    one = peak("einsum", 1)
    batch = 1
    while 2 * batch <= whole and 2 * batch * one <= args.limit * 1e9:
        batch *= 2
    tensors = make(batch=batch)
    runs = {name: partial(forward_backward, route, *tensors) for name, route in LAYERS.items()}
    seconds = measure.interleaved(runs, args.repetitions, args.device)
    rows: list[report.Row] = []
    for name in LAYERS:
        low, median, high = measure.quartiles(seconds[name])
        row = {"part": "layer", "side": side, "capsules": capsules, "candidate": name}
        row |= {"batch": batch, "seconds": median, "lower_quartile": low, "upper_quartile": high}
        rows.append(row | {"peak_bytes": peak(name, batch)})
    if whole > batch:
        tensors = make(batch=whole)
        run = partial(forward_backward, LAYERS["fused"], *tensors)
        found = measure.interleaved({"fused": run}, 1, args.device)["fused"]
        row = {"part": "layer", "side": side, "capsules": capsules, "candidate": "fused"}
        rows.append(row | {"batch": whole, "seconds": found[0], "peak_bytes": peak("fused", whole)})
    return rows


def stack_of(name: str, blocks: int, capsules: int, dim: int) -> MomentumStack:
    routing, memory = name.split(", ")
    stack = MomentumStack.of_capsules(2 * blocks, capsules, dim, kernel_size=3, memory=memory)
    if routing != "fused":
        unfolded.unfold_layers(torch.nn.Sequential(stack), again=routing == "checkpoint")
    return stack


def stack_bytes(name: str, blocks: int, args: argparse.Namespace) -> int:
    """Peak of a training step of a stack, with parameters and Adam's state, which a first makes."""
    torch.manual_seed(0)
    stack = stack_of(name, blocks, args.capsules[0], args.dim).to(args.device)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.0)
    x, _, g = problem(args.stack_side, args.capsules[0], args.dim, args.stack_batch, args.device)

    def step(x: Tensor, g: Tensor) -> None:
        stack(x).backward(g)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    step(x[:1, :3, :3].detach(), g[:1, :3, :3])
    state = [t for values in optimizer.state.values() for t in values.values()]
    gc.collect()
    beyond = measure.peak_bytes(partial(step, x, g), args.device)
    return size_of([*stack.parameters(), *state, x, g]) + beyond


def network_step(args: argparse.Namespace, name: str) -> report.Row:
    """One training step of a whole network in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    sizes = args.side, args.network_batch, args.network_blocks, args.memory
    process = context.Process(
        target=network_child, args=(theirs, name, torch.get_num_threads(), *sizes)
    )
    process.start()
    theirs.close()
    try:
        found: report.Row = ours.recv()
    except EOFError:
        found = {"fits": False}
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):  # the system kills where memory is short
        sys.exit(f"the training step of {name} failed: see above")
    return {"part": "network", "candidate": name} | found


def network(name: str, side: int, blocks: int) -> ConvMoCapsNet:
    """With `blocks` blocks, half of them on a grid of a quarter of the image's side."""
    routing, memory = name.split(", ")
    model = ConvMoCapsNet(
        (3, side, side),
        10,
        stem=(32, 64),
        stem_stride=2,
        capsules=32,
        stage_strides=(1, 4),
        blocks=max(1, blocks // 2),
        memory=memory,
    )
    if routing != "fused":
        unfolded.unfold_layers(model.stages, again=routing == "checkpoint")
    return model


def network_child(
    pipe: Connection, name: str, threads: int, side: int, batch: int, blocks: int, memory: float
) -> None:
    """Sends seconds and the peak that the system counted, or that the memory did not suffice."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30), limits[1]))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        model = network(name, side, blocks)
        optimizer = torch.optim.Adam(model.parameters())
        images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
        start = time.perf_counter()
        CapsuleLoss()(model(images, labels), images, labels).total.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        resource.setrlimit(resource.RLIMIT_DATA, limits)  # or there may be none left to say so
        pipe.send({"fits": False})
        return
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send({"fits": True, "seconds": seconds, "peak_bytes": peak})


def summarize(rows: list[report.Row], state: int) -> list[report.Row]:
    """Ratios of every layer, and slopes of the stacks over a block's state in bytes."""
    summary: list[report.Row] = []
    layers = [row for row in rows if row["part"] == "layer"]
    for side, capsules in dict.fromkeys((row["side"], row["capsules"]) for row in layers):
        found = [row for row in layers if (row["side"], row["capsules"]) == (side, capsules)]
        einsum, again, fused = found[:3]
        summary.append(
            {
                "side": side,
                "capsules": capsules,
                "batch": fused["batch"],
                "times_einsum": einsum["seconds"] / fused["seconds"],
                "times_checkpoint": again["seconds"] / fused["seconds"],
                "memory_over_einsum": fused["peak_bytes"] / einsum["peak_bytes"],
                "memory_over_checkpoint": fused["peak_bytes"] / again["peak_bytes"],
                "whole_batch": found[-1]["batch"],
                "whole_seconds": found[-1]["seconds"],
                "whole_bytes": found[-1]["peak_bytes"],
            }
        )
    for name, (blocks, peaks) in report.series(rows, "blocks", "peak_bytes", part="stack").items():
        slope = measure.slope(blocks, peaks)
        summary.append({"candidate": name, "bytes_per_block": slope, "over_state": slope / state})
    return summary


def describe(rows: list[report.Row], summary: list[report.Row], args: argparse.Namespace) -> str:
    """Markdown: a table per part, and what was wanted."""
    layers = [
        [
            f"{row['side']}x{row['side']}, {row['capsules']} of {args.dim}",
            row["batch"],
            f"{row['times_einsum']:.1f}",
            f"{row['times_checkpoint']:.1f}",
            f"{row['memory_over_einsum']:.3f}",
            f"{row['memory_over_checkpoint']:.3f}",
            f"{row['whole_batch']}: {row['whole_seconds']:.1f} s, "
            f"{row['whole_bytes'] / 1e6:.0f} MB",
        ]
        for row in summary
        if "times_einsum" in row
    ]
    header = ["grid, capsules", "batch", "times as fast as einsum", "as checkpoint"]
    header += ["memory over einsum", "over checkpoint", "fused, whole batch"]
    stacks = [
        [row["candidate"], f"{row['bytes_per_block'] / 1e6:.1f}", f"{row['over_state']:.2f}"]
        for row in summary
        if "over_state" in row
    ]
    parts = [
        "One layer, 3x3 windows, forward and backward: medians of "
        f"{args.repetitions} interleaved rounds (wanted: at least {SPEED_TARGET} times as fast as "
        f"einsum in at most {MEMORY_TARGET} of its memory)",
        report.table(header, layers),
        f"Training step of stacks of {args.capsules[0]} capsules of {args.dim} on a grid of "
        f"{args.stack_side}x{args.stack_side}, batch {args.stack_batch}: what a block adds to the "
        f"peak, over its parameters, gradients and Adam's state (wanted: at most {SLOPE_TARGET} "
        "for the reversible one)",
        report.table(["stack", "MB per block", "over its state"], stacks),
    ]
    networks = [
        [
            row["candidate"],
            "yes" if row["fits"] else "no",
            *(
                (f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 2**30:.1f}")
                if row["fits"]
                else ("", "")
            ),
        ]
        for row in rows
        if row["part"] == "network"
    ]
    if networks:
        side = args.side
        parts += [
            f"A training step of a network of {args.network_blocks} blocks on images of "
            f"{side}x{side}, batch {args.network_batch}, in processes of at most {args.memory:g} "
            f"GiB; half of the blocks are on a grid of {side // 4}x{side // 4}, 32 capsules of 8",
            report.table(["network", "fits", "s", "peak, GiB"], networks),
        ]
    return "\n\n".join(parts)


def draw(rows: list[report.Row]) -> Figure:
    """Peaks of the stacks against blocks."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    series = report.series(rows, "blocks", "peak_bytes", part="stack")
    report.lines(axes, {n: (x, [v / 1e6 for v in y]) for n, (x, y) in series.items()}, STYLES)
    axes.set(title="training step of a stack", ylabel="peak of live tensors, MB")
    axes.legend(frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "convolution")

    def add(name: str, default: Any, help: str, **more: Any) -> None:
        parser.add_argument(name, type=report.positive, default=default, help=help, **more)

    add("--sides", [32, 64], "of the layers' grids", nargs="+")
    add("--capsules", [16, 32], "capsules at a place; stacks have the first", nargs="+")
    add("--dim", 16, "components of a capsule")
    add("--batch", None, "grids of the layers (default: 2048 over their side)")
    parser.add_argument("--limit", type=float, default=6.0, help="GB that einsum code may take")
    add("--repetitions", 5, "timed rounds")
    add("--blocks", [1, 2, 4, 8], "of the stacks", nargs="+")
    add("--stack-side", 16, "of the stacks' grids")
    add("--stack-batch", 4, "grids of the stacks")
    parser.add_argument("--side", type=int, default=224, help="of the network's images; 0: none")
    add("--network-batch", 8, "images of the network")
    add("--network-blocks", 20, "of the network")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a network may take")
    args = parser.parse_args(argv)
    args.blocks = sorted(set(args.blocks))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    rows: list[report.Row] = []
    if args.side and args.device.type == "cpu":  # first, while this process is small
        rows += [network_step(args, name) for name in NETWORKS]
    for side in args.sides:
        for capsules in args.capsules:
            rows += layer_rows(side, capsules, args)
    for name in STACKS:
        for blocks in args.blocks:
            peak = stack_bytes(name, blocks, args)
            rows.append({"part": "stack", "candidate": name, "blocks": blocks, "peak_bytes": peak})
    state = 4 * size_of(stack_of(STACKS[-1], 1, args.capsules[0], args.dim).parameters())
    summary = summarize(rows, state)
    text = describe(rows, summary, args)
    report.write(args, "convolution", rows, summary, text, {"convolution": draw(rows)})
