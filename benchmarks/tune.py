"""Which plans are the fastest for a network on this GPU?

Every call of routing in a training step of the network, forward and backward, is timed with the
plan that the library has for its shapes and with a handful of others: more or fewer programs,
samples and warps, tensor cores or vector units. Each is first compared with the reference; one that
does not compile or is wrong is dropped and named. Candidates take turns, as CUDA graphs, timed by
the GPU's events, its cache overwritten before each call. The fastest replaces the static plan if it
saves 3 % in a second comparison with it alone.

What was found goes to a table in the user's cache folder, for this GPU model and these versions of
PyTorch, Triton and the library, from which calls of these shapes and dtypes take their plans from
then on, in processes that start later. MOCAPSNET_TUNED=0 ignores it; a new tuning replaces what it
says of the same shapes.

The network is that of a run folder, --run, or that which the options of `mocapsnet train` describe,
for example --dataset mnist --blocks 3 --batch-size 128.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mocapsnet.kernels import kept, tuning, verification
from mocapsnet.kernels.launch import at_precision, interpreting

from .shared import report

if TYPE_CHECKING:
    from .shared.calls import Call
    from .shared.tuner import Clock, Tuned

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
DRY = (
    "--dataset digits --channels 2 --kernel-size 4 --capsules 2 --capsule-dim 2 --class-dim 2 "
    "--iterations 2 --batch-size 2"
).split()


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and those of `mocapsnet train`."""
    parser = report.parser(__doc__, "tune")
    parser.allow_abbrev = False  # an option of `train` is no abbreviation of one of these
    parser.usage = "mocapsnet benchmark tune [options] [options of mocapsnet train]"
    parser.add_argument("--run", type=Path, help="run folder that `mocapsnet train` wrote")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the network and its images"
    )
    parser.add_argument(
        "--precision",
        choices=["highest", "high"],
        default=torch.get_float32_matmul_precision(),
        help="as of torch.set_float32_matmul_precision",
    )
    parser.add_argument("--plans", type=report.positive, default=8, help="of a call, at most")
    parser.add_argument("--rounds", type=report.positive, default=20, help="timed rounds")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="after which no further plan is tried"
    )
    parser.add_argument(
        "--table", type=Path, help="file to write instead of that in the user's cache folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try it on the CPU, a tiny network in Triton's interpreter; needs --table",
    )
    return parser.parse_known_args(argv)


def network(args: argparse.Namespace, others: list[str]) -> list[Call]:
    """The calls of the network that was asked for. Raises: SystemExit if there is none such."""
    from mocapsnet import cli
    from mocapsnet.train import data
    from mocapsnet.train.errors import InputError
    from mocapsnet.train.options import TrainOptions
    from mocapsnet.train.prepare import settled
    from mocapsnet.train.run_folder import read_config

    from .shared.calls import calls, images_of, no_images
    from .shared.plans import by_layers

    if args.run and others:
        sys.exit(f"tune: --run has its options; got {' '.join(others)} besides")
    try:
        images: data.ImageSet | None = None
        if args.run:
            options = read_config(args.run)
            content = json.loads((args.run / "config.json").read_bytes())
            if {"image_shape", "classes"} <= content.keys():
                images = no_images(tuple(content["image_shape"]), len(content["classes"]))
        else:
            command = cli.parse(["train", *(others or (DRY if args.dry_run else []))])
            assert isinstance(command, TrainOptions)
            options = command
            if options.resume is not None:
                sys.exit(f"tune: --resume is for mocapsnet train; --run {options.resume} tunes it")
        images = images or images_of(options)
        found = calls(settled(options, images), images, DTYPES[args.dtype])
    except InputError as error:
        sys.exit(f"tune: {error}")
    return list(dict.fromkeys(map(by_layers, found)))


def check_device(args: argparse.Namespace) -> None:
    """Raises: SystemExit where nothing can be tuned."""
    if args.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
        args.device = torch.device("cpu")
        if not args.table:
            sys.exit("tune: --dry-run needs --table FILE: its times mean nothing")
    if args.dry_run and interpreting():
        return
    if args.device.type != "cuda":
        sys.exit("tune: plans are tuned on a GPU; --dry-run --table FILE tries it on the CPU")
    families = ["routing", "momentum"]
    for verdict in verification.verify(args.device, families):
        if not verdict.passed:
            sys.exit(
                f"tune: the kernels of {verdict.family} do not agree with their reference on this "
                "GPU, so calls do not take them; `mocapsnet doctor` tries again"
            )


def merged(
    file: Path, place: dict[str, str], new: dict[tuning.Problem, tuning.Chosen], margin: float
) -> None:
    """Puts problems into the table in a file, one process at a time.

    Raises: SystemExit if it cannot be written.
    """
    with kept.alone("tuned", kept.name("plans", place)):
        before = tuning.load(file, place).plans if file.exists() else {}
        if not tuning.write({**before, **new}, place, file, margin):
            sys.exit(f"tune: {file} cannot be written; --table names another")
    tuning.forget()


def clock_of(device: torch.device) -> Clock:
    from .shared.tuner import ByEvents, by_processor

    return ByEvents(device) if device.type == "cuda" else by_processor


def describe(done: Sequence[Tuned], margin: float) -> str:
    """Markdown: what was chosen, and what was dropped."""
    lines: list[list[Any]] = []
    notes = []
    for tuned in done:
        for direction, choice in tuned.choices.items():
            plan = choice.plan and ", ".join(f"{k}={v}" for k, v in choice.plan._asdict().items())
            times = [f"{1e6 * t:.1f}" for t in (choice.static_seconds, choice.seconds)]
            ratio = f"{choice.seconds / choice.static_seconds:.2f}"
            lines.append([str(tuned.call), direction, *times, ratio, choice.name, plan or ""])
        notes += [f"{tuned.call}: {name}: {why}" for name, why in tuned.dropped.items()]
        if tuned.eagerly:
            notes.append(f"{tuned.call}: not timed as CUDA graphs: {tuned.eagerly}")
    header = ["call (B, N, K, J, D)", "direction", "static us", "chosen us", "ratio", "chosen"]
    text = report.table([*header, "plan"], lines)
    text += f"\n\nMedians; a plan replaces the static one if it saves {margin:.0%}."
    return text + "".join(f"\n\n- {note}" for note in notes)


def summary(tuned: Tuned) -> report.Row:
    """A summary that JSON can hold."""
    chosen = {direction: choice.name for direction, choice in tuned.choices.items()}
    return {"call": str(tuned.call), "chosen": chosen, "dropped": tuned.dropped}


def tune_all(args: argparse.Namespace, found: Sequence[Call]) -> None:
    """Tunes calls, keeps what was chosen after each, and tells.

    Raises: SystemExit if one could not be tuned.
    """
    from .shared.plans import candidates
    from .shared.tuner import MARGIN, tune

    if not found:
        sys.exit("tune: this network has no calls of routing with plans")
    place = verification.where(args.device)
    file: Path = args.table or tuning.file_of(place)
    precision = "highest" if args.precision == "highest" else "high"
    clock, end = clock_of(args.device), time.monotonic() + args.seconds
    done: list[Tuned] = []
    trouble = ""
    for n, call in enumerate(found):
        print(f"tuning {call}", flush=True)
        now = time.monotonic()
        mine = now + (end - now) / (len(found) - n)  # what one leaves is for those behind
        try:
            some = dict(islice(candidates(call, args.device).items(), args.plans))
            done.append(tune(call, some, precision, args.device, args.rounds, clock, mine))
        except (RuntimeError, KeyboardInterrupt) as error:  # what was tuned before is kept and told
            trouble = str(error) or "interrupted: the rest was not tuned"
            break
        merged(file, place, done[-1].entries(precision), MARGIN)
    text = describe(done, MARGIN) + f"\n\nThe table: {file}"
    rows = [row for tuned in done for row in tuned.rows]
    if args.output and rows:
        settings = {k: v for k, v in vars(args).items() if k not in ("run", "table")}
        about = [summary(tuned) for tuned in done]
        report.write(argparse.Namespace(**settings), "tune", rows, about, text)
    else:
        print(text)
    failed = [str(tuned.call) for tuned in done if not tuned.choices]
    if trouble or failed:
        sys.exit(f"tune: {trouble or 'not tuned: ' + '; '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> None:
    args, others = parse(argv)
    check_device(args)
    with at_precision(args.precision):
        tune_all(args, network(args, others))
