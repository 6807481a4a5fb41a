"""`mocapsnet benchmark NAME`: one module and one command per question."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mocapsnet.kernels.launch import triton_installed

QUESTIONS = {
    "routing": "how much faster is routing than eager code, and how much memory does it take?",
    "step": "how long does a training step take, and where does the time go?",
    "memory": "what does a block cost in memory?",
    "depth": "what does a block cost in time?",
    "convolution": "what do convolutional capsules cost beside unfold and einsum?",
    "reversal": "how exact is the reversal?",
    "overhead": "what does a call of routing cost beside its computation?",
    "static": "what does the compiler make of every kernel for GPUs that need not be there?",
    "graph": "what do a training step as one CUDA graph, and tuned plans, bring?",
    "launches": "is a launch of a kernel as fast as its compiled code lets expect? (a GPU)",
    "tune": "which plans of the kernels are the fastest for a network on this GPU?",
    "machine": "what is this machine, and how fast does it copy and multiply?",
    "guard": "is the speed still there? (a minute; fails if not)",
    "suite": "all above but graph, launches, tune and guard, with a summary of their results",
    "gpu-report": "what does this GPU make of it all? (tests, benchmarks, a training; ten minutes)",
}

OF_KERNELS = ("static", "overhead", "launches", "tune")


def main(arguments: Sequence[str]) -> None:
    """Runs one benchmark; its own options follow its name. Raises: SystemExit, with --help too."""
    listing = "\n".join(f"  {name:13}{question}" for name, question in QUESTIONS.items())
    parser = argparse.ArgumentParser(
        prog="mocapsnet benchmark",
        usage="mocapsnet benchmark NAME [options]",
        description="Measure speed, memory and precision on this machine.",
        epilog=f"names:\n{listing}\n\n`mocapsnet benchmark NAME --help` explains a benchmark and "
        "its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=list(QUESTIONS), help="see below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.name in OF_KERNELS and not triton_installed():
        sys.exit(f"{args.name}: it is about the Triton kernels: pip install triton")
    module = args.name.replace("-", "_")
    importlib.import_module(f"mocapsnet.benchmarks.{module}").main(args.options)
