"""Real machine code for GPUs that need not be there: it compiles, fits, and does not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes of dynamic shared memory that a program may use, by architecture."""

ROOT = Path(__file__).parents[2]
ROUTING_KERNELS = {
    "on_chip_forward_kernel",
    "on_chip_backward_kernel",
    "streamed_forward_kernel",
    "streamed_backward_kernel",
    "finish_kernel",
    "weight_gradient_kernel",
}


def compile_all(architecture, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled", str(architecture), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


KNOWN_SPILLS = {(80, "layer 1", "streamed_backward_kernel")}
"""Architecture, shape and kernel of those that spill a few registers; no others may."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, dtype", [(80, "float32"), (90, "float32"), (90, "bfloat16")]
)
def test_kernels_compile_fit_and_do_not_spill(architecture, dtype):
    rows = compile_all(architecture, dtype)
    print(f"\nsm_{architecture} {dtype}: registers, spills, shared bytes, 128-bit loads")
    for row in rows:
        print(
            "{of:24} {kernel:26} {registers:4} {spills:4} {shared:7} {wide_loads:4}".format(**row)
        )
    assert {row["kernel"] for row in rows} >= ROUTING_KERNELS
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[architecture], row
        if (architecture, row["of"], row["kernel"]) not in KNOWN_SPILLS:
            assert row["spills"] == 0, row
