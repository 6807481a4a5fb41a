"""What the compiler makes of every kernel for GPUs that need not be there, and what that predicts.

    python -m benchmarks.static --architecture 80 90 --dtype float32 --only "layer 1, rba final"

Launchers run as they do on a GPU, on meta tensors, so the arguments are specialised as at a true
launch; each launch is recorded and compiled. One JSON object a line with --json, else tables.
Triton must not be interpreting (TRITON_INTERPRET unset). Compiled code is cached by Triton.

Predictions, for the two GPUs of `GPUS`, are the instructions that the compiled code issues over
what the datasheet's clock and multiprocessors can issue, or bytes over bandwidth if that is more.
They know nothing of latency, of cache misses, or of a launch's cost. The floor counts only the
multiply-adds that the equations need, and each input and output once.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from mocapsnet.kernels.launch import Launch, accumulation_dtype, recording
from mocapsnet.kernels.momentum import triton as momentum
from mocapsnet.kernels.momentum.schedule import schedule
from mocapsnet.kernels.primary import triton as primary
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.routing.weight_gradient import weight_gradient_kernel
from mocapsnet.kernels.squash import triton as squash
from mocapsnet.kernels.votes import triton as votes

from .compiled import ARCHITECTURES, Compiled, compile_for, compiled, kinds

SHAPES = {  # B, N, K, J, D
    "layer 1": (128, 1152, 8, 32, 8),
    "block layer": (128, 32, 8, 32, 8),
    "layer 2, 10 classes": (128, 32, 8, 10, 16),
    "layer 2, 100 classes": (128, 32, 8, 100, 16),
}


class Gpu(NamedTuple):
    """Datasheet rates."""

    name: str
    multiprocessors: int
    clock: float
    """Boost clock in Hz."""
    lanes: int
    """float32 multiply-adds of a multiprocessor per clock."""
    bandwidth: float
    """Bytes per second of device memory."""


GPUS = {
    "80": Gpu("A100 SXM 40 GB", 108, 1.41e9, 64, 1.555e12),
    "90": Gpu("H100 SXM 80 GB", 132, 1.98e9, 128, 3.35e12),
}


def report(launch: Launch, architecture: str) -> dict[str, Any]:
    """One launch's row of the table."""
    made = compiled(launch, architecture)
    return made._asdict() | dict(
        kernel=launch.kernel.__name__,
        grid=launch.grid,
        warps=launch.options["num_warps"],
        wide_loads=made.wide_loads,
        instructions=len(made.instructions),
        loop=len(made.loop),
        loop_kinds=dict(kinds(made.loop or made.instructions)),
        predicted=predicted(launch, architecture, made),
    )


def predicted(launch: Launch, architecture: str, made: Compiled) -> float | None:
    """Seconds of one launch: issue of all instructions, arithmetic, or device memory."""
    gpu = GPUS.get(architecture)
    if gpu is None:
        return None
    per_multiprocessor = math.ceil(math.prod(launch.grid) / gpu.multiprocessors)
    warps = launch.options["num_warps"] * per_multiprocessor
    issued = len(made.instructions) + (trips(launch) - 1) * len(made.loop)
    arithmetic = kinds(made.instructions)
    for kind, count in kinds(made.loop).items():
        arithmetic[kind] += (trips(launch) - 1) * count
    cycles = warps * max(issued / 4, (arithmetic["fma"] + arithmetic["float"]) * 32 / gpu.lanes)
    tensors = {id(x): x for x in launch.args if isinstance(x, torch.Tensor)}.values()
    memory = sum(x.numel() * x.itemsize for x in tensors) / gpu.bandwidth
    return max(cycles / gpu.clock, memory)


def trips(launch: Launch) -> int:
    """How often a kernel runs its innermost loop."""
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    if "per_slice" in named:
        return named["per_slice"]
    if "slices" in named:
        return math.ceil(named["slices"] / named["BLOCK_S"])
    if launch.kernel is routing.kept_backward_kernel:
        return named["J"]
    if launch.kernel is weight_gradient_kernel:
        return math.ceil(named["B"] / named["BLOCK_B"])
    if "GAMMA" in named:
        return named["end"] - named["begin"]
    return named["R"] - 1 if named.get("FULL") else 1


def floor(sizes: tuple[int, ...], iterations: int, itemsize: int, gpu: Gpu) -> float:
    """Seconds that forward and backward of rba, "final", take at least."""
    B, N, K, J, D = sizes
    forward = K + (iterations - 1) * (K + 2)  # votes; with logit and weighted sum
    backward = 1 + K + 1 + K  # c ds and du; c ds again and dW
    arithmetic = B * N * J * D * (forward + backward) / gpu.multiprocessors / gpu.lanes / gpu.clock
    values = 2 * (B * N * K + N * K * J * D + B * J * D)
    return max(arithmetic, values * itemsize / gpu.bandwidth)


def cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What to compile: functions that launch, by the name of their shape and mode."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def routed(sizes: tuple[int, ...], method: str, routing_grad: str) -> None:
        B, N, K, J, D = sizes
        u, W = tensor(B, N, K), tensor(N, K, J, D)
        keep = (method, routing_grad) == ("rba", "final")
        v, *saved = routing.forward(u, W, tensor(J, D), 3, method, keep)
        routing.backward(v, u, W, *saved, method, routing_grad, with_bias=True)

    def stacked(method: str, routing_grad: str) -> None:
        x = torch.empty(128, 32, 8, dtype=accumulation_dtype(tensor(1)), device="meta")
        weights, biases = [tensor(32, 8, 32, 8)] * 8, [tensor(32, 8)] * 8
        plan = schedule(8, 0.9, 39, 0)
        _, anchors = momentum.forward(x, x, weights, biases, plan, 3, method)
        momentum.backward(x, anchors, weights, biases, plan, 3, method, routing_grad)

    features = tensor(128, 256, 6, 6)
    channels_last = features.to(memory_format=torch.channels_last)
    u, W, u_hat = tensor(128, 32, 8), tensor(32, 8, 32, 8), tensor(128, 32, 32, 8)
    capsules = tensor(128, 1152, 8)
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
            f"stack of 8 layers, {method} {routing_grad}": partial(stacked, method, routing_grad)
            for method in ("rba", "sda")
            for routing_grad in ("final", "full")
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--architecture",
        nargs="+",
        choices=ARCHITECTURES,
        default=["80", "90"],
        metavar="A",
        help="compute capabilities, as 80 90, or gfx942 (AMD); all: " + " ".join(ARCHITECTURES),
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument(
        "--only", default="", help="regular expression; compile what it is found in"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.set_defaults(dtype="float32")
    options = parser.parse_args()
    for architecture in options.architecture:
        compile_for(architecture)
        if not options.json:
            print(f"\n{architecture} {options.dtype}\n" + HEADER, flush=True)
        for label, run in cases(getattr(torch, options.dtype)).items():
            if re.search(options.only, label):
                launches = rows(label, run, architecture)
                for row in launches:
                    print(json.dumps(row) if options.json else line(row), flush=True)
                if not options.json and architecture in GPUS:
                    print(summary(label, launches, options.dtype), flush=True)


def rows(label: str, run: Callable[[], object], architecture: str) -> list[dict[str, Any]]:
    """What one case compiles to, in the order of its launches."""
    with recording() as launches:
        run()
    return [
        dict(architecture=architecture, case=label) | report(launch, architecture)
        for launch in launches
    ]


HEADER = (
    f"{'case':34} {'kernel':26} {'programs':>8} {'warps':>5} {'regs':>4} {'spills':>6} "
    f"{'shared':>6} {'blocks':>6} {'wide':>4} {'instr':>5} {'loop':>5}  of the loop, by kind"
)


def line(row: dict[str, Any]) -> str:
    kinds_ = " ".join(f"{kind} {n}" for kind, n in sorted(row["loop_kinds"].items()))
    return (
        f"{row['case']:34} {row['kernel']:26} {math.prod(row['grid']):8} {row['warps']:5} "
        f"{row['registers']:4} {row['spills']:6} {row['shared']:6} {row['resident']:6} "
        f"{row['wide_loads']:4} {row['instructions']:5} {row['loop']:5}  {kinds_}"
    )


def summary(label: str, launches: list[dict[str, Any]], dtype: str) -> str:
    """One line: the predicted time of all launches of a case, and the floor where it is known."""
    gpu = GPUS[launches[0]["architecture"]]
    time = sum(row["predicted"] for row in launches)
    text = f"{label}: {time * 1e6:.1f} us predicted on {gpu.name}, not measured"
    shape, _, mode = label.rpartition(", ")
    if mode == "rba final" and shape in SHAPES:
        least = floor(SHAPES[shape], 3, getattr(torch, dtype).itemsize, gpu)
        text += f"; floor {least * 1e6:.1f} us, ratio {time / least:.2f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
