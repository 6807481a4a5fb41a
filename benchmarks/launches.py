"""Is a launch as fast as its compiled code lets expect?

Every launch of the kernels for the layers of the default network on 28 x 28 images, batch 128, is
timed alone, ten in a row as one CUDA graph, and stands beside the time that `mocapsnet benchmark
static` predicts for a GPU of its kind, with the limit that binds it there. A ratio far from 1 is a
fault of the prediction, or of the kernel. Plans are the static ones.

Predictions are made in a process of their own, which compiles for a GPU that need not be there,
while launches are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from mocapsnet.kernels import tuning
from mocapsnet.kernels.launch import Launch, interpreting, recording

from .shared import measure, report

CASES = (
    "squash",
    "primary",
    "layer 1, rba final",
    "stack of 8 layers, rba final",
    "block layer, rba final",
    "layer 2, 10 classes, rba final",
    "layer 2, 100 classes, rba final",
)
TOGETHER = 10
"""Launches of one graph: a single one is over before its events are."""

PREDICT = "from mocapsnet.benchmarks import launches; launches.predict({!r}, {!r}, {!r}, {!r})"
WAIT = 180
"""Seconds for all predictions."""


def timed(label: str, args: argparse.Namespace) -> Iterator[report.Row]:
    """A row per launch of a case, in their order."""
    from .shared.tuner import ByEvents, by_processor, captured
    from .static import cases

    clock = ByEvents(args.device) if args.device.type == "cuda" else by_processor
    with recording() as launches:
        cases(torch.float32, args.device, args.shrink)[label]()
    for launch in launches:  # in their order, so that each reads what those before it wrote
        run(launch)
    together = TOGETHER if args.device.type == "cuda" else 1
    for launch in launches:
        runs, why = captured({"": partial(repeat, launch, together)}, args.device)
        seconds = [t / together for t in clock([runs[""]] * (args.repetitions + 1))[1:]]
        low, median, high = measure.quartiles(seconds)
        row: report.Row = {"case": label, "kernel": launch.kernel.__name__}
        row |= {"grid": list(launch.grid), "warps": launch.options["num_warps"]}
        row |= {"seconds": median, "lower_quartile": low, "upper_quartile": high}
        yield row | ({"eagerly": why} if why else {})


def run(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.options)


def repeat(launch: Launch, times: int) -> None:
    for _ in range(times):
        run(launch)


def predict(
    architecture: str, labels: Sequence[str], shrink: int, multiprocessors: int | None
) -> None:
    """Prints what is predicted for every launch of these cases, ten in a row, as JSON.

    They are cut into programs for a GPU of so many multiprocessors; None: for the one whose rates
    are known.
    """
    from .shared.compiled import compile_for
    from .shared.prediction import row_of
    from .static import cases, l2_of, planned_for

    compile_for(architecture)
    all_of = cases(torch.float32, shrink=shrink)
    for label in labels:
        for launch in planned_for(architecture, all_of[label], multiprocessors):
            row = {"case": label, "kernel": launch.kernel.__name__, "grid": list(launch.grid)}
            try:
                made = row_of(launch, architecture, l2_of(architecture, repeated=True))
                row |= {name: made[name] for name in ("predicted", "bound", "registers", "spills")}
            except Exception as error:  # of the compiler, or code the model does not understand
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(json.dumps(row), flush=True)


def predicting(architecture: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    """Another process that predicts."""
    count = None
    if args.device.type == "cuda":
        count = torch.cuda.get_device_properties(args.device).multi_processor_count
    command = PREDICT.format(architecture, list(args.cases), args.shrink, count)
    environment = os.environ | {"TRITON_INTERPRET": "0", "MOCAPSNET_TUNED": "0"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", command]
    return subprocess.Popen(words, env=environment, **pipes)


def predictions(process: subprocess.Popen[str]) -> tuple[list[report.Row], str]:
    """What another process has predicted, after WAIT seconds at most, and why some is missing.

    It is waited for no longer where this one is interrupted.
    """
    why = ""
    try:
        output, errors = process.communicate(timeout=WAIT)
        if process.returncode:
            why = f"predictions ended early: {(errors.strip().splitlines() or ['no message'])[-1]}"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
        why = "predictions are missing: " + (
            "interrupted" if isinstance(end, KeyboardInterrupt) else f"{WAIT} s were not enough"
        )
        process.kill()
        output, _ = process.communicate()
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], why


def beside(rows: list[report.Row], predicted: Sequence[report.Row]) -> None:
    """Puts each prediction, and the ratio to it, into the row of the same launch."""
    for case in dict.fromkeys(row["case"] for row in rows):
        pair = ([r for r in some if r["case"] == case] for some in (rows, predicted))
        for row, found in zip(*pair, strict=False):
            if (row["kernel"], row["grid"]) != (found["kernel"], found["grid"]):
                row["error"] = f"the prediction is of {found['kernel']} {found['grid']}"
                continue
            row |= {k: v for k, v in found.items() if k not in row}
            if found.get("predicted"):
                row["ratio"] = row["seconds"] / found["predicted"]


def describe(rows: Sequence[report.Row], name: str, notes: Sequence[str]) -> str:
    """Markdown: a row per launch, and their sum for each case."""

    def shown(row: report.Row, key: str, scale: float = 1e6) -> str:
        return f"{scale * row[key]:.2f}" if row.get(key) else ""

    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        some = [row for row in rows if row["case"] == case]
        for row in some:
            grid = " x ".join(map(str, row["grid"]))
            times = [shown(row, "seconds"), shown(row, "predicted"), shown(row, "ratio", 1)]
            lines.append([case, f"{row['kernel']} [{grid}]", *times, row.get("bound") or ""])
        total: report.Row = {"seconds": sum(row["seconds"] for row in some)}
        if all(row.get("predicted") for row in some):
            total["predicted"] = sum(row["predicted"] for row in some)
            total["ratio"] = total["seconds"] / total["predicted"]
        times = [shown(total, "seconds"), shown(total, "predicted"), shown(total, "ratio", 1)]
        lines.append([f"**{case}**", f"**all {len(some)}**", *times, ""])
    header = ["case", "launch", "measured us", f"predicted us, {name}", "ratio", "bound by"]
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    text = report.table(header, lines)
    if ratios:
        text += f"\n\nMedian ratio of {len(ratios)} launches: {statistics.median(ratios):.2f}."
    errors = [f"{row['case']}, {row['kernel']}: {row['error']}" for row in rows if "error" in row]
    eager = sorted({f"not timed as CUDA graphs: {r['eagerly']}" for r in rows if "eagerly" in r})
    return text + "".join(f"\n\n- {note}" for note in [*notes, *eager, *errors])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "launches")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of them")
    parser.add_argument("--repetitions", type=report.positive, default=20, help="timed rounds")
    parser.add_argument(
        "--shrink", type=report.positive, default=1, help="divides batch and capsules"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not (args.device.type == "cuda" or interpreting()):
        sys.exit("launches: they need a GPU, or TRITON_INTERPRET=1")
    from .shared.prediction import GPUS

    architecture, name = "90", "H100"
    if args.device.type == "cuda":
        architecture = "".join(map(str, torch.cuda.get_device_capability(args.device)))
    name = GPUS[architecture].name if architecture in GPUS else f"none known for sm_{architecture}"
    rows: list[report.Row] = []
    notes: list[str] = []
    interrupted = False
    process = predicting(architecture, args)  # compiles meanwhile
    try:
        with tuning.using(args.device, tuning.STATIC):
            for label in args.cases:
                try:
                    rows += timed(label, args)
                except Exception as error:  # whatever it is, the other cases go on
                    notes.append(f"{label}: {type(error).__name__}: {error}")
    except KeyboardInterrupt:  # the time is over: what is there is told
        notes.append("interrupted: the rest is missing")
        interrupted = True
        process.terminate()
    found, missing = predictions(process)
    beside(rows, found)
    if missing:
        notes.append(missing)
        interrupted = interrupted or "interrupted" in missing
    if not rows:
        sys.exit("launches: nothing was timed: " + "; ".join(notes))
    report.write(args, "launches", rows, [], describe(rows, name, notes))
    if interrupted:
        sys.exit(1)
