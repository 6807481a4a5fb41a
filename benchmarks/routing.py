"""How much faster is `routing` than eager code, and how much memory does it take?

Routing by agreement, forward and backward, float32, for the shapes of the paper and for sweeps over
the batch B, the input capsules N and the output capsules J. Candidates: the published code's
broadcast matrix product, einsum, both compiled by torch.compile (its default and max-autotune,
compiled anew for every shape), and the library's backends; on a GPU all but the compiled ones also
replayed as a CUDA graph, without the time that Python takes to launch kernels. All are warm before
any of them is timed, and they take turns. Before anything is timed, the result and
gradients of every candidate are compared with the float64 reference on the very inputs; a failure
ends the run without a table.

FLOP/s and GB/s count what the equations need, the same for every candidate: the multiply-adds of
forward and backward, each input and output once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mocapsnet.kernels import routing
from mocapsnet.kernels.launch import interpreting

from .shared import measure, report
from .shared.routing_candidates import (
    STOPPED,
    Candidate,
    candidates,
    forward_backward,
    problem,
    sized,
)
from .shared.routing_pictures import draw, roofline

SHAPES = {  # B, N, K, J, D
    "layer1-mnist": (128, 1152, 8, 32, 8),
    "layer1-cifar": (128, 2048, 8, 32, 8),
    "block": (128, 32, 8, 32, 8),
    "layer2-10-classes": (128, 32, 8, 10, 16),
    "layer2-100-classes": (128, 32, 8, 100, 16),
}
SWEEPS = {  # around 128 samples, 288 input capsules, 32 output capsules
    "B": [(b, 288, 8, 32, 8) for b in (1, 2, 4, 8, 16, 32, 128, 512)],
    "N": [(128, n, 8, 32, 8) for n in (32, 128, 288, 576, 1152)],
    "J": [(128, 288, 8, j, 8) for j in (8, 16, 32, 64, 128)],
}
PHASES = ("forward", "backward", "both")
PUBLISHED, EINSUM = "published", "einsum"
FUSED = ("triton", "chunked")
"""The library's backends; a call without arguments takes the first that is there."""
CHECKED = 8
TOLERANCE = 1e-4
TARGETS = {PUBLISHED: 15.0, EINSUM: 3.5}
"""How many times as fast as these the library shall be in layer 1, on two processor cores."""


def check(shape: tuple[int, ...], these: dict[str, Candidate], device: torch.device) -> list[str]:
    """Raises SystemExit unless every candidate agrees with the float64 reference.

    A candidate may be off by `TOLERANCE`, relative, norm of the difference over norm of the truth.
    Returns: candidates that ran out of memory.
    """
    u, W, g = problem(shape, device)
    truth = sums(shape, *(t.detach().double() for t in (u, W, g)))
    too_large = []
    for name, run in these.items():
        try:
            found = forward_backward(run.route, u, W, g) if run.graph is None else run.graph()
        except torch.OutOfMemoryError:
            too_large.append(name)
            continue
        for x, t in zip(found, truth, strict=True):
            error = measure.relative_error(x, t)
            if not error <= TOLERANCE:
                sys.exit(f"{name}, {shape}: relative error {error:.1e}; nothing was measured")
    return too_large


def sums(shape: tuple[int, ...], u: Tensor, W: Tensor, g: Tensor) -> list[Tensor]:
    """Output and both gradients of the float64 reference, a few samples at a time."""
    W = W.requires_grad_()
    pieces: list[list[Tensor]] = []
    gradient = torch.zeros_like(W)
    for some, incoming in zip(u.split(CHECKED), g.split(CHECKED), strict=True):
        leaf = some.clone().requires_grad_()
        v = routing(leaf, W, backend="reference")
        du, dW = torch.autograd.grad(v, (leaf, W), incoming)
        pieces.append([v.detach(), du])
        gradient += dW
    return [torch.cat(part) for part in zip(*pieces, strict=True)] + [gradient]


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Group ("paper" or the swept letter), label and shape."""
    for label in args.shapes:
        yield "paper", label, sized(SHAPES[label], args.shrink)
    for letter in args.sweeps:
        for shape in dict.fromkeys(sized(shape, args.shrink) for shape in SWEEPS[letter]):
            yield letter, f"{letter} = {shape['BNKJD'.index(letter)]}", shape


def timed(
    these: dict[str, Candidate], shape: tuple[int, ...], args: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every candidate and phase in every round."""
    u, W, g = problem(shape, args.device)
    seconds: dict[tuple[str, str], list[float]] = {}
    for counts, name in measure.turns(list(these), args.repetitions):
        run, clock = these[name], measure.Clock(args.device)
        if run.graph is not None:
            run.graph()
            clock.mark()
            phases = {"both": clock.seconds()[0]}
        else:
            v = run.route(u, W)
            clock.mark()
            torch.autograd.grad(v, (u, W), g)
            clock.mark()
            forward, backward = clock.seconds()
            phases = {"forward": forward, "backward": backward, "both": forward + backward}
            del v
        for phase, value in phases.items():
            if counts:
                seconds.setdefault((name, phase), []).append(value)
    return seconds


def measured(args: argparse.Namespace) -> Iterator[list[report.Row]]:
    """For every shape a row per candidate and phase, in the candidates' order."""
    for n, (group, label, shape) in enumerate(cases(args)):
        print(f"{label} {shape}", file=sys.stderr, flush=True)
        wanted = {"all": True, "paper": group == "paper", "first": n == 0, "none": False}
        these, missing = candidates(shape, args.device, wanted[args.compiled])
        for name in check(shape, these, args.device):
            missing[name] = "out of memory"
            del these[name]
        rows: list[report.Row] = []
        seconds = timed(these, shape, args)
        peaks = {name: peak(run, shape, args.device) for name, run in these.items()}
        for name, phase in [(name, phase) for name in these for phase in PHASES]:
            if (name, phase) not in seconds:
                continue
            low, median, high = measure.quartiles(seconds[name, phase])
            operations, bytes_ = work(shape, phase)
            rows.append(
                {
                    "group": group,
                    "label": label,
                    **dict(zip("BNKJD", shape, strict=True)),
                    "candidate": name,
                    "phase": phase,
                    "seconds": median,
                    "lower_quartile": low,
                    "upper_quartile": high,
                    "flop_per_second": operations / median,
                    "bytes_per_second": bytes_ / median,
                    "peak_bytes": peaks[name],
                }
            )
        rows += [
            {"group": group, "label": label, "candidate": name, "error": reason}
            for name, reason in missing.items()
        ]
        del these  # graphs and compiled code keep memory
        torch.compiler.reset()
        yield rows
        if STOPPED in missing.values():
            raise KeyboardInterrupt


def peak(run: Candidate, shape: tuple[int, ...], device: torch.device) -> int | None:
    """Peak of live tensor bytes beyond the inputs, forward and backward, where it can be told."""
    if run.own_pool:
        return None
    u, W, g = problem(shape, device)
    return measure.peak_bytes(lambda: forward_backward(run.route, u, W, g), device)


def work(shape: tuple[int, ...], phase: str, iterations: int = 3) -> tuple[int, int]:
    """Operations (two per multiply-add) and bytes that the equations need, float32."""
    B, N, K, J, D = shape
    passes = {
        "forward": K + (iterations - 1) * (K + 2),  # votes; again with logit and weighted sum
        "backward": 1 + K + 1 + K,  # c ds and du; c ds again and dW
    }
    passes["both"] = sum(passes.values())
    tensors = B * N * K + N * K * J * D + B * J * D
    times = {"forward": 1, "backward": 2, "both": 2}[phase]
    return 2 * B * N * J * D * passes[phase], 4 * times * tensors


def summarize(rows: list[report.Row]) -> list[report.Row]:
    """How many times as fast as the eager codes the library's default is, per shape and phase."""
    found = {(r["label"], r["candidate"], r["phase"]): r for r in rows if "phase" in r}
    summary: list[report.Row] = []
    for label in dict.fromkeys(row["label"] for row in rows):
        for phase in PHASES:
            names = [name for name in FUSED if (label, name, phase) in found]
            if not names:
                continue
            fused = found[label, names[0], phase]
            ratios = {
                f"times_{name}": found[label, name, phase]["seconds"] / fused["seconds"]
                for name in TARGETS
                if (label, name, phase) in found
            }
            summary.append({"label": label, "phase": phase, "routing": names[0]} | ratios)
    return summary


def describe(
    rows: list[report.Row], summary: list[report.Row], rates: measure.Rates, repetitions: int
) -> str:
    """Markdown: every shape and candidate, forward and backward together, and the targets."""
    ours = {row["label"]: row["routing"] for row in summary}
    both = [row for row in rows if row.get("phase") == "both"]
    least = {r["label"]: r["seconds"] for r in both if r["candidate"] == ours[r["label"]]}
    lines = []
    for row in both:
        label, name = row["label"], row["candidate"]
        phases = {r["phase"]: r for r in rows if (r["label"], r["candidate"]) == (label, name)}
        shown = [phases.get(phase, {}).get("seconds") for phase in PHASES]
        lines.append(
            [
                f"{label} {tuple(row[x] for x in 'BNKJD')}",
                name,
                *("" if t is None else f"{1e3 * t:.2f}" for t in shown),
                f"{1e3 * row['lower_quartile']:.2f} to {1e3 * row['upper_quartile']:.2f}",
                f"{row['seconds'] / least[label]:.2f}",
                f"{row['flop_per_second'] / 1e9:.1f}",
                f"{row['bytes_per_second'] / 1e9:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
            ]
        )
    header = ["shape (B, N, K, J, D)", "candidate", "forward ms", "backward ms", "both ms"]
    header += ["quartiles", f"times {next(iter(ours.values()))}", "GFLOP/s", "GB/s", "peak MB"]
    parts = [
        f"Routing, rba, three iterations: medians of {repetitions} interleaved rounds. In this "
        f"run a large copy moved {rates.copy / 1e9:.1f} GB/s and a large float32 matrix product "
        f"made {rates.matrix / 1e9:,.0f} GFLOP/s.",
        report.table(header, lines),
    ]
    first = next(
        (r for r in summary if (r["label"], r["phase"]) == (list(SHAPES)[0], "both")), None
    )
    if first:
        parts += [
            f"{first['label']}: {first[f'times_{name}']:.1f} times as fast as {name} "
            f"(wanted on two cores: {wanted})."
            for name, wanted in TARGETS.items()
            if f"times_{name}" in first
        ]
    failed = [f"{r['label']}, {r['candidate']}: {r['error']}" for r in rows if "error" in r]
    return "\n\n".join(parts + (["Not timed: " + "; ".join(failed)] if failed else []))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "routing")
    parser.add_argument("--repetitions", type=report.positive, default=7, help="timed rounds")
    parser.add_argument(
        "--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="of the paper"
    )
    parser.add_argument(
        "--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS), help="sizes to vary"
    )
    parser.add_argument(
        "--compiled",
        choices=("none", "first", "paper", "all"),
        default="paper",
        help="for which shapes torch.compile is tried, which takes most of the run: none, the "
        "first, those of the paper, all",
    )
    parser.add_argument(
        "--shrink",
        type=report.positive,
        default=1,
        help="divide B, N and J by this, to try the command",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rates = measure.rates(args.device, size=3072 // (64 if interpreting() else 1))
    rows: list[report.Row] = []
    interrupted = False
    try:
        for some in measured(args):
            rows += some
    except KeyboardInterrupt:
        interrupted = True
    if any("phase" in row for row in rows):
        summary = summarize(rows)
        text = describe(rows, summary, rates, args.repetitions)
        if interrupted:
            text += "\n\n**Interrupted: the shapes that were left are missing.**"
        pictures = {}
        if any(row["group"] != "paper" for row in rows):
            pictures["routing"] = draw(rows)
        if any(row["group"] == "paper" for row in rows):
            pictures["routing_roofline"] = roofline(rows, rates)
        report.write(args, "routing", rows, [*summary, rates._asdict()], text, pictures)
    if interrupted:
        raise KeyboardInterrupt
