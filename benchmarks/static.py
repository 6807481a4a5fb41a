"""What does the compiler make of every kernel for GPUs that need not be there?

Launchers run as they do on a GPU, on meta tensors, so the arguments are specialised as at a true
launch; each launch is recorded and compiled. The files have a row per launch: registers, spills,
shared memory, programs that a multiprocessor holds, instructions by kind, and what each limit of
the GPU asks for. The first tables add up the launches of each operation, forward and backward.

For GPUs whose rates are known times are predicted from the compiled code, the addresses it computes
and published rates, and compared with the floor of the equations: see `shared/prediction.py`. The
last table says what binds each launch, and how many megabytes go through L2 in it: as predicted,
and in brackets if programs share L1, which rests on how a GPU hands them out. They are predictions,
not measurements; Python's time to make the launches is not in them.
Triton must not be interpreting (TRITON_INTERPRET unset). It keeps compiled code in its cache: the
first run takes minutes for each GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from matplotlib.figure import Figure

from mocapsnet.kernels.conv_routing import triton as conv_routing
from mocapsnet.kernels.launch import Launch, accumulation_dtype, interpreting, recording
from mocapsnet.kernels.momentum import triton as momentum
from mocapsnet.kernels.momentum.schedule import schedule
from mocapsnet.kernels.primary import triton as primary
from mocapsnet.kernels.routing import plans
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.squash import triton as squash
from mocapsnet.kernels.votes import triton as votes

from .shared import report
from .shared.compiled import ARCHITECTURES, compile_for
from .shared.prediction import GPUS, L2, floor, row_of

SHAPES = {  # B, N, K, J, D
    "layer 1": (128, 1152, 8, 32, 8),
    "block layer": (128, 32, 8, 32, 8),
    "layer 2, 10 classes": (128, 32, 8, 10, 16),
    "layer 2, 100 classes": (128, 32, 8, 100, 16),
}


def cases(
    dtype: torch.dtype, device: torch.device | str = "meta", shrink: int = 1
) -> Mapping[str, Callable[[], object]]:
    """What to compile: functions that launch, by the name of their shape and mode.

    Args:
        device: of their tensors.
        shrink: divides batch, input and output capsules.
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def less(size: int) -> int:
        return max(1, size // shrink)

    def routed(sizes: tuple[int, ...], method: str, routing_grad: str) -> None:
        B, N, J = (less(sizes[n]) for n in (0, 1, 3))
        K, D = sizes[2], sizes[4]
        u, W = tensor(B, N, K), tensor(N, K, J, D)
        keep = (method, routing_grad) == ("rba", "final")
        v, s, kept = routing.forward(u, W, tensor(J, D), 3, method, keep)
        routing.backward(v, u, W, s, kept, method, routing_grad, with_bias=True)

    def windowed(capsules: int, method: str, routing_grad: str) -> None:
        N = less(capsules)
        u, W = tensor(less(16), 8, 8, N, 16), tensor(3, 3, N, 16, N, 16)
        steps, keep = (1, 1, 1, 1), (method, routing_grad) == ("rba", "final")
        v, s, kept = conv_routing.forward(u, W, tensor(N, 16), steps, 3, method, keep)
        conv_routing.backward(v, u, W, s, kept, steps, method, routing_grad, with_bias=True)

    def stacked(method: str, routing_grad: str) -> None:
        x = tensor(B, J, 8, dtype=accumulation_dtype(tensor(1)))
        weights, biases = [tensor(J, 8, J, 8)] * 8, [tensor(J, 8)] * 8
        plan = schedule(8, 0.9, 39, 0)
        _, anchors = momentum.forward(x, x, weights, biases, plan, 3, method)
        momentum.backward(x, anchors, weights, biases, plan, 3, method, routing_grad)

    B, J = less(128), less(32)
    features = tensor(B, 256, 6, 6)
    channels_last = features.to(memory_format=torch.channels_last)
    u, W, u_hat = tensor(B, J, 8), tensor(J, 8, J, 8), tensor(B, J, J, 8)
    capsules = tensor(B, 1152, 8)
    return (
        {
            "squash": lambda: (squash.forward(capsules), squash.backward(capsules, capsules)),
            "primary": lambda: (
                primary.forward(features, 8),
                primary.backward(features, capsules, 8),
            ),
            "primary, channels-last": lambda: (
                primary.forward(channels_last, 8),
                primary.backward(channels_last, capsules, 8),
            ),
            "votes": lambda: (votes.forward(u, W), votes.backward(u_hat, u, W)),
        }
        | {
            f"{shape}, {method} {routing_grad}": partial(routed, sizes, method, routing_grad)
            for method in ("rba", "sda")
            for routing_grad in ("final", "full")
            for shape, sizes in SHAPES.items()
        }
        | {
            f"windows, {capsules} capsules, {method} {routing_grad}": partial(
                windowed, capsules, method, routing_grad
            )
            for method in ("rba", "sda")
            for routing_grad in ("final", "full")
            for capsules in (16, 32)
        }
        | {
            f"stack of 8 layers, {method} {routing_grad}": partial(stacked, method, routing_grad)
            for method in ("rba", "sda")
            for routing_grad in ("final", "full")
        }
    )


def launches(label: str, run: Callable[[], object], architecture: str) -> list[report.Row]:
    """What one case compiles to, a row per launch in their order."""
    recorded = planned_for(architecture, run)
    l2 = l2_of(architecture)
    return [
        {"architecture": architecture, "case": label, **row_of(launch, architecture, l2)}
        for launch in recorded
    ]


def planned_for(
    architecture: str, run: Callable[[], object], multiprocessors: int | None = None
) -> list[Launch]:
    """The launches of `run` on meta tensors, cut for a GPU of this kind, or with so many
    multiprocessors."""
    known = GPUS.get(architecture)
    if multiprocessors is None:
        multiprocessors = known.multiprocessors if known else plans.multiprocessors.get()
    token = plans.multiprocessors.set(multiprocessors)
    try:
        with recording() as recorded:
            run()
    finally:
        plans.multiprocessors.reset(token)
    return recorded


def l2_of(architecture: str, repeated: bool = False) -> L2:
    known = GPUS.get(architecture)
    return L2(known.l2_cache if known else 0, repeated)


def summarize(rows: list[report.Row], dtype: torch.dtype) -> list[report.Row]:
    """One row per architecture and case: launches added up, predicted time and floor if known."""
    summary = []
    for architecture, case in dict.fromkeys((row["architecture"], row["case"]) for row in rows):
        some = [r for r in rows if (r["architecture"], r["case"]) == (architecture, case)]
        row: report.Row = {"architecture": architecture, "case": case, "launches": len(some)}
        for column in ("registers", "spills", "shared"):
            row[column] = max(r[column] for r in some)
        shape, _, mode = case.rpartition(", ")
        if architecture in GPUS:
            row["predicted"] = sum(r["predicted"] for r in some)
            if mode == "rba final" and shape in SHAPES:
                row["floor"] = floor(SHAPES[shape], 3, dtype.itemsize, GPUS[architecture])
        summary.append(row)
    return summary


def describe(summary: list[report.Row], dtype: str) -> str:
    """Markdown: a table per architecture."""
    parts = []
    for architecture in dict.fromkeys(row["architecture"] for row in summary):
        lines = [
            [
                row["case"],
                *(row[column] for column in ("launches", "registers", "spills", "shared")),
                f"{1e6 * row['predicted']:.1f}" if "predicted" in row else "",
                f"{1e6 * row['floor']:.1f}" if "floor" in row else "",
                f"{row['predicted'] / row['floor']:.2f}" if "floor" in row else "",
            ]
            for row in summary
            if row["architecture"] == architecture
        ]
        header = ["case, forward and backward", "launches", "most registers", "most spills"]
        header += ["most shared bytes", "predicted us", "floor us", "ratio"]
        gpu = GPUS.get(architecture)
        name = f"{architecture}, {dtype}"
        name += f": predicted for {gpu.name}, **not measured**" if gpu else ""
        parts.append(f"{name}\n\n{report.table(header, lines)}")
    return "\n\n".join(parts)


def describe_bounds(rows: list[report.Row]) -> str:
    """Markdown: a row per case and kernel, with the time and the limit of its launches, and the
    megabytes through L2 of the one that has most."""
    names = [name for name in GPUS if any(row["architecture"] == name for row in rows)]
    lines = []
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        line, counts = [case, kernel], []
        for name in names:
            some = [
                row
                for row in rows
                if (row["architecture"], row["case"], row["kernel"]) == (name, case, kernel)
            ]
            bounds = "/".join(dict.fromkeys(row["bound"] for row in some))
            counts.append(len(some))
            line.append(f"{1e6 * sum(row['predicted'] for row in some):.1f} {bounds}")
            moved = [max(1e-6 * row[x] for row in some) for x in ("l2_bytes", "l2_bytes_sharing")]
            line.append("{:.0f} ({:.0f})".format(*moved))
        if any(counts):
            lines.append([*line[:2], "/".join(map(str, dict.fromkeys(counts))), *line[2:]])
    if not lines:
        return ""
    header = ["case, forward and backward", "kernel", "launches"]
    for name in names:
        header += [f"{GPUS[name].name}: us, limit", "MB through L2"]
    return f"What binds each launch, **predicted, not measured**\n\n{report.table(header, lines)}"


def draw(summary: list[report.Row]) -> Figure:
    """Predicted times over their floors."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    known = [row for row in summary if "floor" in row]
    names = list(dict.fromkeys(row["architecture"] for row in known))
    panels = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axes, architecture in zip(panels, names, strict=False):
        some = [row for row in known if row["architecture"] == architecture][::-1]
        labels = [row["case"].rpartition(", ")[0] for row in some]
        for column, color, shift in (("floor", "C7", 0.2), ("predicted", "C0", -0.2)):
            times = [1e6 * row[column] for row in some]
            places = [n + shift for n in range(len(some))]
            bars = axes.barh(places, times, 0.36, color=color, label=column)
            axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_yticks(range(len(some)), labels)
        axes.set(title=f"{GPUS[architecture].name}\npredicted, not measured", xlabel="us")
        axes.margins(x=0.12)
        axes.legend(loc="center right")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "static", device=False)
    parser.add_argument(
        "--architecture",
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        metavar="A",
        help="compute capabilities, as 80 90, or gfx942 (AMD)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        default="float32",
        help="of capsules and weights",
    )
    parser.add_argument(
        "--only", default="", help="regular expression; compile what it is found in"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if interpreting():
        sys.exit("TRITON_INTERPRET is 1, so nothing would be compiled: unset it")
    dtype = getattr(torch, args.dtype)
    rows: list[report.Row] = []
    for architecture in args.architecture:
        compile_for(architecture)
        for label, run in cases(dtype).items():
            if re.search(args.only, label):
                print(f"{architecture}: {label}", file=sys.stderr, flush=True)
                rows += launches(label, run, architecture)
    if not rows:
        sys.exit(f"--only {args.only!r} is found in none of: {'; '.join(cases(dtype))}")
    summary = summarize(rows, dtype)
    text = "\n\n".join(filter(None, [describe(summary, args.dtype), describe_bounds(rows)]))
    report.write(args, "static", rows, summary, text, {"static": draw(summary)})
