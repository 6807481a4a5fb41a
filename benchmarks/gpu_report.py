"""What does this GPU make of it all?

The verdicts on its kernels, their tests natively, routing, a training step, every launch beside its
prediction, plans tuned for the default network, a step as one CUDA graph and by the tuned plans,
memory, depth, reversal, and a short training on the embedded digits with a graph and without; with
a page of tables and pictures in benchmarks/results/GPU/README.md below the current folder, ready to
commit. Ends within --minutes, installation not included: a part that takes longer than its share is
stopped, and a part that fails leaves its error on the page. Plans are the static ones but where
the tuned ones are named; those lie in plans.json beside the page, the user's own table stays.

--dry-run tries all this without a GPU: the same parts on the CPU at small sizes, routing also by
the kernels in Triton's interpreter, results in build/gpu-report, in up to four times the time. Its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .shared import report
from .shared.parts import Part, benchmark, run_all

TESTS = (  # without the searches for shapes that fail, which take minutes
    "tests/kernels tests/mocapsnet --ignore tests/kernels/test_compiled.py -k 'not test_any'"
)
DRY_TESTS = "tests/kernels/test_reference.py -k squash"
SMALL_LAUNCHES = '--cases "block layer, rba final" --shrink 32 --repetitions 1'
SMALL_GRAPH = "--batch 2 --channels 8 --steps 1 --repetitions 1"
SMALL_STEP = "--blocks 1 2 --batch 2 --channels 8 --repetitions 1"


TABLE = "plans.json"
SLOWER = 4
"""Times as long as a part, and all together, may take in a dry run."""


def parts(folder: Path, scratch: Path, dry: bool) -> list[Part]:
    """What is run, and for how long at most: 9.5 minutes in all."""
    device = "cpu" if dry else "cuda"

    def one(title: str, name: str, limit: float, options: str, small: str) -> Part:
        return benchmark(
            title, name, f"--device {device} {small if dry else options}", folder, limit
        )

    tests, workers = DRY_TESTS if dry else TESTS, min(os.cpu_count() or 1, 16)
    run = [sys.executable, "-m"]
    table = str(folder / TABLE)

    def training(title: str, graph: str, limit: float) -> Part:
        length = "1 --limit 64" if dry else 10
        words = f"train --device {device} --graph {graph} --epochs {length}"
        command = (*run, "mocapsnet", *words.split(), "--out", f"run-{graph}")
        return Part(title, f"mocapsnet {words}", command, limit, tail=18, cwd=scratch)

    return [
        one("Machine", "machine", 25, "", ""),
        Part(
            "Verification",
            "mocapsnet doctor",
            (*run, "mocapsnet", "doctor"),
            60,
            tail=90,
            environment=(("TRITON_INTERPRET", "0"),),  # interpreted, it would take minutes
        ),
        Part(
            "Tests",
            f"python -m pytest -q -n {workers} {tests}",
            (*run, "pytest", "-q", "-n", str(workers), *shlex.split(tests)),
            115,
            tail=8,
        ),
        one(
            "Routing",
            "routing",
            60,
            "--repetitions 15 --sweeps B --compiled first",
            "--repetitions 1 --sweeps B --compiled first --shrink 32 --shapes block",
        ),
        one("Training step", "step", 40, "--repetitions 10 --blocks 1 4", SMALL_STEP),
        one("Launches", "launches", 75, "", SMALL_LAUNCHES),
        benchmark(
            "Plans",
            "tune",
            f"--table {shlex.quote(table)} "
            + ("--dry-run --rounds 1 --plans 2" if dry else "--seconds 40 --dataset mnist"),
            folder,
            55,
        ),
        one("Graph and plans", "graph", 40, "", SMALL_GRAPH)._replace(
            environment=(("MOCAPSNET_TUNED", table),)
        ),
        one("Memory", "memory", 20, "", "--blocks 1 2 --batch 2 --channels 8 --layers 2 4"),
        one("Depth", "depth", 20, "", "--blocks 1 2 --batch 2 --repetitions 1"),
        one(
            "Reversal",
            "reversal",
            25,
            "--depths 2 10 40 100 400 --gammas 0.5 0.9 0.99",
            "--depths 2 10 --gammas 0.9 --batch 2",
        ),
        training("Training on digits", "auto", 20),
        training("Training on digits, eagerly", "off", 15),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__, "gpu-report", device=False)
    parser.add_argument("--dry-run", action="store_true", help="try it on the CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit(
            "gpu-report: no NVIDIA GPU that PyTorch can use; --dry-run (make gpu-report DRY_RUN=1) "
            "tries the command on the CPU"
        )
    if not Path("tests/kernels").is_dir():
        sys.exit("gpu-report: run it in the repository's folder, where the tests are")
    environment = {"MOCAPSNET_TUNED": "0"} | ({"TRITON_INTERPRET": "1"} if args.dry_run else {})
    if args.dry_run:
        folder: Path = args.output or Path("build/gpu-report")
        heading = "# Dry run on a CPU: these figures mean nothing"
    else:
        folder = args.output or report.results_folder(torch.device("cuda"))
        heading = f"# {torch.cuda.get_device_name()}"
    (folder / TABLE).unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    with tempfile.TemporaryDirectory() as scratch:
        these, seconds = parts(folder, Path(scratch), args.dry_run), 60 * args.minutes
        if args.dry_run:  # a CPU may have other things to do
            these = [part._replace(limit=SLOWER * part.limit) for part in these]
            seconds *= SLOWER
        outcomes = run_all(these, folder, heading, environment, seconds)
    print(f"\nwritten: {folder}/README.md")
    failed = [f"{o.part.title}: {o.error}" for o in outcomes if o.error]
    if failed:
        sys.exit("gpu-report: not everything ran through\n" + "\n".join(failed))
