"""Stacks in two processes: right gradients, or an error that says how to get them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)


@pytest.mark.slow
def test_data_parallel_and_fully_sharded_stacks(tmp_path):
    script = str(Path(__file__).with_name("parallel.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (out, err), _ = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], err
    found = {(kind, way): result for kind, way, result in map(json.loads, out.splitlines())}
    assert len(found) == 12
    for (_, way), result in found.items():
        if way in ("every layer", "every layer and the stack"):
            assert "sharded on its own" in result and "fully_shard(stack)" in result
        else:
            assert result < 1e-9, way
