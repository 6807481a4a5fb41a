"""The benchmarks of every machine one after another, with one page of their tables and pictures.

Results go to benchmarks/results/MACHINE below the current folder, or where --output says. Nothing
else should run on the machine meanwhile. One that fails does not stop the others. With --only the
page keeps the results of the others that are there already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mocapsnet.kernels.launch import triton_installed

from .cli import OF_KERNELS, QUESTIONS
from .shared import report
from .shared.parts import benchmark, run_all

NAMES = (
    "machine",
    "routing",
    "step",
    "depth",
    "memory",
    "convolution",
    "reversal",
    "overhead",
    "static",
)
LIMIT = 3600.0
ON_CPU = ("overhead", "static")
"""These have no --device."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__, "suite")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="benchmarks to run")
    args = parser.parse_args(argv)
    folder: Path = args.output or report.results_folder(args.device)
    parts = {
        name: benchmark(
            QUESTIONS[name][0].upper() + QUESTIONS[name][1:],
            name,
            "" if name in ON_CPU else f"--device {args.device}",
            folder,
            LIMIT,
        )
        for name in NAMES
        if name in args.only or (folder / f"{name}.md").exists()
        if triton_installed() or name not in OF_KERNELS
    }
    keep = [part for name, part in parts.items() if name not in args.only]
    seconds = len(parts) * LIMIT
    outcomes = run_all(list(parts.values()), folder, f"# {folder.name}", {}, seconds, keep)
    print(f"\nwritten: {folder}/README.md")
    if any(outcome.error for outcome in outcomes):
        sys.exit(1)
