"""Kernels as compiled for NVIDIA GPUs, executed on the CPU: they compute the same, stay inside of
their tensors, and no two warps or programs race. See executor/execute.py.

It takes minutes, and g++, so `make test-executed` alone runs it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
TESTS = "executor/faults.py test_triton.py test_momentum.py test_conv_triton.py".split()
# What compiles with PyTorch's compiler, or needs the interpreter.
OTHERS = "not test_compiles"


@pytest.mark.executed
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiled_kernels_are_right_and_touch_nothing_else(architecture, tmp_path):
    if not shutil.which("g++"):
        pytest.fail("needs g++, the C++ compiler, which is not there: install it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.executor.plugin"]
    command += ["-p", "no:cacheprovider", "-k", OTHERS, *(str(HERE / name) for name in TESTS)]
    about = {"TRITON_INTERPRET": "0", "EXECUTED_ARCHITECTURE": architecture}
    about |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=os.environ | about, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
