"""Compiles every kernel for a GPU that need not be there, and prints what the compiler made.

    python -m tests.kernels.compiled ARCHITECTURE DTYPE      # e.g. 90 float32; JSON lines

Launchers run as they do on a GPU, on meta tensors, so the arguments are specialised as at a true
launch; each launch is replaced by compilation. Triton reads TRITON_INTERPRET when it is imported,
so this is a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mocapsnet.kernels.primary import triton as primary
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.squash import triton as squash
from mocapsnet.kernels.votes import triton as votes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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


class Compile:
    """Stands in for a kernel: kernel[grid](...) compiles and prints."""

    def __init__(self, name: str, kernel: Any, label: str):
        self.name, self.kernel, self.label = name, kernel, label

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            print(
                json.dumps(dict(kernel=self.name, of=self.label) | resources(compiled)), flush=True
            )

        return launch


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, spilling and 128-bit loading instructions, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = inspect(TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = inspect(TOOLS / "nvdisasm", "-c", cubin.name)
    return dict(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=len(re.findall(r"\bSTL\b", code)),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"\bLDG\.E\.128\b", code)),
    )


def inspect(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def routed(B: int, N: int, K: int, J: int, D: int) -> None:
        u, W = tensor(B, N, K), tensor(N, K, J, D)
        v, s = routing.forward(u, W, tensor(J, D), 3)
        routing.backward(v, u, W, s)

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
        "layer 1": lambda: routed(128, 1152, 8, 32, 8),
        "block layer": lambda: routed(128, 32, 8, 32, 8),
        "layer 2, 10 classes": lambda: routed(128, 32, 8, 10, 16),
        "layer 2, 100 classes": lambda: routed(128, 32, 8, 100, 16),
    }


def main() -> None:
    architecture, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    driver.set_active(Driver(architecture))
    for label, run in cases(dtype).items():
        for module in (squash, primary, votes, routing):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = getattr(module, name)
                kernel = kernel.kernel if isinstance(kernel, Compile) else kernel
                setattr(module, name, Compile(name, kernel, label))
        run()


if __name__ == "__main__":
    main()
