"""What is freed is used again, unless the user has settings for the allocator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ON_GLIBC = platform.libc_ver()[0] == "glibc"

PROGRAM = """
import resource, statistics, torch
from mocapsnet.train.options import MachineOptions
from mocapsnet.train.prepare import make_accelerator
make_accelerator(MachineOptions(device="cpu"))
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (40, 100):  # above 32 MB glibc maps every block anew
        torch.ones(megabytes << 18)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The heap grows at first, and again where a small block has come between; without the setting every
# round has as many faults.
print(int(statistics.median(faults)))
"""


def faults(**environment: str) -> int:
    """Pages given to a program each time that it fills 140 MB, in the median of nine times."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=kept | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not ON_GLIBC, reason="another C library has another allocator")
def test_training_on_a_cpu_asks_for_no_memory_twice() -> None:
    assert faults() < 70


@pytest.mark.skipif(not ON_GLIBC, reason="another C library has another allocator")
def test_settings_of_the_user_win() -> None:
    # With huge pages, of 2 MB, there are 70 faults in place of 35,840.
    assert faults(MALLOC_PERTURB_="0") >= 70
