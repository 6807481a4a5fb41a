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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mocapsnet.kernels.launch import Launch, recording
from mocapsnet.kernels.primary import triton as primary
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.squash import triton as squash
from mocapsnet.kernels.votes import triton as votes

SHAPES = {  # B, N, K, J, D
    "layer 1": (128, 1152, 8, 32, 8),
    "block layer": (128, 32, 8, 32, 8),
    "layer 2, 10 classes": (128, 32, 8, 10, 16),
    "layer 2, 100 classes": (128, 32, 8, 100, 16),
}


class Multiprocessor(NamedTuple):
    """Limits of a multiprocessor, from the CUDA programming guide, section compute capabilities."""

    threads: int
    blocks: int
    shared: int
    """Bytes of shared memory, of which each block takes 1,024 for the system."""
    program_shared: int
    """Bytes of shared memory that one program may use."""


ARCHITECTURES = {
    80: Multiprocessor(2048, 32, 167_936, 166_912),
    86: Multiprocessor(1536, 16, 102_400, 101_376),
    89: Multiprocessor(1536, 24, 102_400, 101_376),
    90: Multiprocessor(2048, 32, 233_472, 232_448),
    100: Multiprocessor(2048, 32, 233_472, 232_448),
    120: Multiprocessor(1536, 24, 102_400, 101_376),
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
    80: Gpu("A100 SXM 40 GB", 108, 1.41e9, 64, 1.555e12),
    90: Gpu("H100 SXM 80 GB", 132, 1.98e9, 128, 3.35e12),
}

REGISTERS = 65_536
"""Registers of a multiprocessor, on all of them."""

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

KINDS = {  # by the first letters of an instruction's name, in this order
    "fma": ("FFMA", "DFMA", "HFMA2"),
    "float": ("FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "FCHK", "DADD", "DMUL", "DSETP", "HADD2"),
    "matrix": ("HMMA", "DMMA", "HGMMA", "QGMMA", "UTCHMMA"),
    "special": ("MUFU",),
    "convert": ("F2F", "I2F", "F2I", "F2FP", "PRMT"),
    "shuffle": ("SHFL",),
    "global": ("LDG", "STG", "LDGSTS", "LD.", "ST."),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "barrier": ("BAR", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "SYNCS"),
}


class Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, architecture: int) -> dict[str, Any]:
    """One launch's kernel: registers, spills, shared memory, occupancy and instructions."""
    binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = inspect(TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = inspect(TOOLS / "nvdisasm", "-c", cubin.name)
    registers, shared = int(re.findall(r"REG:(\d+)", usage)[0]), binary.metadata.shared
    warps = launch.options["num_warps"]
    instructions, loop = parse(code)
    return dict(
        kernel=launch.kernel.__name__,
        grid=launch.grid,
        warps=warps,
        registers=registers,
        spills=sum(name.startswith("STL") for name in instructions),
        shared=shared,
        shared_limit=ARCHITECTURES[architecture].program_shared,
        resident=resident(architecture, registers, warps, shared),
        wide_loads=sum(name.startswith("LDG") and ".128" in name for name in instructions),
        instructions=len(instructions),
        loop=len(loop),
        loop_kinds=dict(kinds(loop or instructions)),
        predicted=predicted(launch, architecture, instructions, loop),
    )


def predicted(
    launch: Launch, architecture: int, instructions: list[str], loop: list[str]
) -> float | None:
    """Seconds of one launch: issue of all instructions, arithmetic, or device memory."""
    gpu = GPUS.get(architecture)
    if gpu is None:
        return None
    per_multiprocessor = math.ceil(math.prod(launch.grid) / gpu.multiprocessors)
    warps = launch.options["num_warps"] * per_multiprocessor
    issued = len(instructions) + (trips(launch) - 1) * len(loop)
    arithmetic = Counter(kinds(instructions))
    for kind, count in kinds(loop).items():
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
    if launch.kernel is routing.weight_gradient_kernel:
        return math.ceil(named["B"] / named["BLOCK_B"])
    return named["R"] - 1 if named.get("FULL") else 1


def floor(sizes: tuple[int, ...], iterations: int, itemsize: int, gpu: Gpu) -> float:
    """Seconds that forward and backward of rba, "final", take at least."""
    B, N, K, J, D = sizes
    forward = K + (iterations - 1) * (K + 2)  # votes; with logit and weighted sum
    backward = 1 + K + 1 + K  # c ds and du; c ds again and dW
    arithmetic = B * N * J * D * (forward + backward) / gpu.multiprocessors / gpu.lanes / gpu.clock
    values = 2 * (B * N * K + N * K * J * D + B * J * D)
    return max(arithmetic, values * itemsize / gpu.bandwidth)


def inspect(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident(architecture: int, registers: int, warps: int, shared: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at a time."""
    limits = ARCHITECTURES[architecture]
    per_warp = math.ceil(registers / 8) * 8 * 32
    return min(
        REGISTERS // (per_warp * warps),
        limits.threads // (32 * warps),
        limits.blocks,
        limits.shared // (shared + 1024),
    )


def parse(code: str) -> tuple[list[str], list[str]]:
    """Names of all instructions of a disassembly, and of those of its longest innermost loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line
        ):
            name, rest = instruction.groups()
            target = re.search(r"\(?(\.L_x_\d+)\)?", rest)
            names.append(name)
            if name.startswith("BRA") and target and target[1] in labels:
                if len(names) - labels[target[1]] > 2:  # not the endless loop after the end
                    loops.append((labels[target[1]], len(names)))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda span: span[1] - span[0], default=(0, 0))
    return names, names[start:end]


def kinds(instructions: list[str]) -> Counter[str]:
    """How many instructions are of each kind; what is not arithmetic or memory is "other"."""

    def kind(name: str) -> str:
        return next((k for k, prefixes in KINDS.items() if name.startswith(prefixes)), "other")

    return Counter(map(kind, instructions))


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

    features = tensor(128, 256, 6, 6)
    channels_last = features.to(memory_format=torch.channels_last)
    u, W, u_hat = tensor(128, 32, 8), tensor(32, 8, 32, 8), tensor(128, 32, 32, 8)
    capsules = tensor(128, 1152, 8)
    return {
        "squash": lambda: (squash.forward(capsules), squash.backward(capsules, capsules)),
        "primary": lambda: (primary.forward(features, 8), primary.backward(features, capsules, 8)),
        "primary, channels-last": lambda: (
            primary.forward(channels_last, 8),
            primary.backward(channels_last, capsules, 8),
        ),
        "votes": lambda: (votes.forward(u, W), votes.backward(u_hat, u, W)),
    } | {
        f"{shape}, {method} {routing_grad}": partial(routed, sizes, method, routing_grad)
        for method in ("rba", "sda")
        for routing_grad in ("final", "full")
        for shape, sizes in SHAPES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--architecture", type=int, nargs="+", choices=list(ARCHITECTURES), default=[80, 90]
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument(
        "--only", default="", help="regular expression; compile what it is found in"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.set_defaults(dtype="float32")
    options = parser.parse_args()
    for architecture in options.architecture:
        driver.set_active(Driver(architecture))
        if not options.json:
            print(f"\nsm_{architecture} {options.dtype}\n" + HEADER, flush=True)
        for label, run in cases(getattr(torch, options.dtype)).items():
            if re.search(options.only, label):
                launches = rows(label, run, architecture)
                for row in launches:
                    print(json.dumps(row) if options.json else line(row), flush=True)
                if not options.json and architecture in GPUS:
                    print(summary(label, launches, options.dtype), flush=True)


def rows(label: str, run: Callable[[], object], architecture: int) -> list[dict[str, Any]]:
    """What one case compiles to, in the order of its launches."""
    with recording() as launches:
        run()
    return [
        dict(architecture=architecture, case=label) | compiled(launch, architecture)
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
    if mode == "rba final":
        least = floor(SHAPES[shape], 3, getattr(torch, dtype).itemsize, gpu)
        text += f"; floor {least * 1e6:.1f} us, ratio {time / least:.2f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
