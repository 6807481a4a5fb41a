"""What do a training step as one CUDA graph, and tuned plans, bring?

Trains the default network for MNIST on random images as `mocapsnet train` does, in stretches of
some steps: with --graph on and off, each with the static plans and with those of the GPU's table of
tuned plans (`mocapsnet benchmark tune`), if there is one. The four take turns. What cannot be, such
as a graph on a CPU, is told beside the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mocapsnet.kernels import tuning
from mocapsnet.kernels.tuning import Table
from mocapsnet.train import data
from mocapsnet.train.errors import InputError
from mocapsnet.train.graph import why_eager
from mocapsnet.train.optimizers import build_optimizer, parameter_groups
from mocapsnet.train.option_values import resolve
from mocapsnet.train.options import (
    DataOptions,
    MachineOptions,
    ModelOptions,
    OptimOptions,
    TrainOptions,
)
from mocapsnet.train.prepare import build, make_accelerator, make_criterion, make_repeatable
from mocapsnet.train.trainer import Trainer

from .shared import measure, report

FIRST = "eager, static plans"


class Candidate(NamedTuple):
    """A training, and the plans that it takes."""

    trainer: Trainer
    table: Table
    graph: bool

    def stretch(self, epoch: int) -> float:
        """Seconds of a step, over all images once."""
        trainer = self.trainer
        with tuning.using(trainer.accelerator.device, self.table):
            measure.synchronize(trainer.accelerator.device)
            seconds = trainer.epoch(epoch, "")["train_seconds"]
        return float(seconds) / len(trainer.steps)


def options_of(args: argparse.Namespace, graph: Any) -> TrainOptions:
    return resolve(
        TrainOptions(
            data=DataOptions(dataset="mnist"),
            model=ModelOptions(blocks=args.blocks, channels=args.channels),
            optim=OptimOptions(batch_size=args.batch, epochs=args.repetitions + 1),
            machine=MachineOptions(
                device=args.device.type, mixed_precision=args.mixed_precision, graph=graph
            ),
        )
    )


def images(count: int, device: torch.device) -> data.ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *data.SHAPES["mnist"]), generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    classes = tuple(map(str, range(10)))
    return data.ImageSet(pixels.to(torch.uint8), labels, classes).to(device)


def training(args: argparse.Namespace, graph: str) -> Trainer:
    """A training of the default network, with the same weights and images for all.

    Raises: InputError if there can be no graph and it is asked for.
    """
    options = options_of(args, graph)
    accelerator = make_accelerator(options.machine)
    make_repeatable(options.optim.seed)
    some = images(args.batch * args.steps, accelerator.device)
    eager = why_eager(options, accelerator, len(some))
    bare = build(options, some)
    steps = args.steps * options.optim.epochs
    optimizer, schedules = build_optimizer(
        options.optim, parameter_groups(options.optim, bare), steps, accelerator.device
    )
    model, optimizer = accelerator.prepare(bare, optimizer)
    return Trainer(
        accelerator,
        model,
        make_criterion(options),
        optimizer,
        some,
        bare.preprocessing,
        options,
        schedules.step,
        graphed=eager is None,
    )


def candidates(args: argparse.Namespace) -> tuple[dict[str, Candidate], list[str]]:
    """What takes part, by name, and why others do not."""
    tuned = tuning.read(args.device) if args.device.type == "cuda" else tuning.NOWHERE
    tables = {"static plans": tuning.STATIC, "tuned plans": tuned}
    notes = []
    if tuned.why:
        notes.append(f"no tuned plans: {tuned.why}")
        del tables["tuned plans"]
    found: dict[str, Candidate] = {}
    for graph in ("off", "on"):
        for name, table in tables.items():
            try:
                made = Candidate(training(args, graph), table, graph == "on")
            except InputError as error:
                notes.append(str(error))
                break
            found[f"{'one graph' if graph == 'on' else 'eager'}, {name}"] = made
    return found, notes


def times(
    these: dict[str, Candidate], args: argparse.Namespace, notes: list[str]
) -> list[report.Row]:
    """A row per candidate. One that fails leaves a note; so does a graph that was not captured."""
    seconds: dict[str, list[float]] = {name: [] for name in these}
    epochs = dict.fromkeys(these, 0)
    for counts, name in measure.turns(list(these), args.repetitions):
        if name not in seconds:
            continue
        try:
            taken = these[name].stretch(epochs[name])
        except Exception as error:  # whatever it is, the others go on
            notes.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            del seconds[name]
            continue
        except KeyboardInterrupt:  # the time is over: what is there is told
            notes.append("interrupted: fewer rounds than asked for")
            break
        epochs[name] += 1
        if counts:
            seconds[name].append(taken)
    rows = []
    for name, values in seconds.items():
        if not values:
            continue
        low, median, high = measure.quartiles(values)
        if these[name].graph and not these[name].trainer.graphed:
            notes.append(f"{name}: the step could not be captured, so this is eager too")
        row: report.Row = {"candidate": name, "seconds": median}
        row |= {"lower_quartile": low, "upper_quartile": high}
        row |= {"images_per_second": args.batch / median}
        if seconds.get(FIRST):
            pairs = zip(seconds[FIRST], values, strict=False)
            row["times_as_fast"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def describe(rows: Sequence[report.Row], notes: Sequence[str], args: argparse.Namespace) -> str:
    lines = [
        [
            row["candidate"],
            *(f"{1e3 * row[k]:.2f}" for k in ("seconds", "lower_quartile", "upper_quartile")),
            f"{row['images_per_second']:,.0f}",
            f"{row['times_as_fast']:.2f}" if "times_as_fast" in row else "",
        ]
        for row in rows
    ]
    header = ["training", "ms a step", "lower quartile", "upper quartile", "images/s"]
    text = report.table([*header, "times as fast"], lines)
    text += (
        f"\n\nMoCapsNet, {args.blocks} block(s), batch {args.batch}, mixed precision "
        f"{args.mixed_precision}: medians of {args.repetitions} stretches of {args.steps} steps."
    )
    return text + "".join(f"\n\n- {note}" for note in notes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "graph")
    for name, default, text in (
        ("--blocks", 1, "blocks"),
        ("--batch", 128, "images"),
        ("--channels", 256, "of both convolutions"),
        ("--steps", 20, "steps of a stretch"),
        ("--repetitions", 7, "timed stretches"),
    ):
        parser.add_argument(name, type=report.positive, default=default, help=text)
    parser.add_argument(
        "--mixed-precision", choices=["no", "bf16"], default="no", help="bf16: of convolutions"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    these, notes = candidates(args)
    rows = times(these, args, notes)
    if not rows:
        sys.exit("graph: nothing was timed: " + "; ".join(notes))
    report.write(args, "graph", rows, [], describe(rows, notes, args))
