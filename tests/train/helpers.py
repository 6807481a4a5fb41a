"""Running the command as a subprocess, and reading what a run wrote."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# A network so small that an epoch takes a fraction of a second.
TINY = "--channels 16 --capsules 4 --decoder 16 --limit 48 --batch-size 16 --device cpu".split()


def process(*arguments: str, processes: int = 1) -> list[str]:
    """The command line of `mocapsnet ARGUMENTS` in processes of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        sys.executable,
        *(torchrun if processes > 1 else []),
        "-m",
        "mocapsnet",
        *arguments,
    ]


def run_process(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `mocapsnet ARGUMENTS` in processes of its own, without a terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if processes > 1 else None
    return subprocess.run(
        process(*arguments, processes=processes),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


# One of two processes, as `torchrun` would start it.
ONE_OF_TWO = """
import os, sys, torch
os.environ.clear()
os.environ.update(environment)
for descriptor, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(f"{name}-{environment['RANK']}", os.O_CREAT | os.O_WRONLY), descriptor)
torch.set_num_threads(1)
exec(setup)
from mocapsnet.cli import main
sys.exit(main(arguments))
"""


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises this, whatever it is given."""

    def run(*_: object, **__: object) -> None:
        raise error

    return run


def run_two(*arguments: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    """Run `mocapsnet ARGUMENTS` in two processes that train together, without a terminal.

    Each runs the program `setup` beforehand.

    They are forked from one that has imported what they need, once for all tests: `torchrun`, which
    `run_process` takes, imports it three times for every call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mocapsnet.train.loop", "torch.utils.tensorboard"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = []
    for rank in ("0", "1"):
        given = {"environment": shared | {"RANK": rank, "LOCAL_RANK": rank}, "arguments": arguments}
        given["setup"] = setup
        both.append(context.Process(target=exec, args=(ONE_OF_TWO, given)))
        both[-1].start()
    deadline = time.monotonic() + 240
    for one in both:
        one.join(max(0, deadline - time.monotonic()))
        one.kill()
        one.join()
    code = max(abs(one.exitcode or 0) for one in both)
    texts = [
        "".join(Path(f"{name}-{rank}").read_text() for rank in (0, 1))
        for name in ("stdout", "stderr")
    ]
    for name in Path().glob("std???-[01]"):
        name.unlink()
    return subprocess.CompletedProcess(arguments, code, *texts)


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def checkpoint(run: Path) -> Path:
    """The only checkpoint of a run."""
    (only,) = (run / "checkpoints").iterdir()
    return only


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run) / "model.safetensors")


def optimizer_state(run: Path) -> dict[str, Any]:
    """As `Optimizer.state_dict`, with the parameters' numbers as text."""
    state = json.loads((checkpoint(run) / "state.json").read_text())["optimizer"]
    for key, tensor in load_file(checkpoint(run) / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state["state"][index][name] = tensor
    return state


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same metrics, weights and optimiser state."""
    assert rows(a) == rows(b)
    assert checkpoint(a).name == checkpoint(b).name
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)
    assert_equal_nested(optimizer_state(a), optimizer_state(b))


def assert_equal_nested(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_nested(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal_nested(one, other)
    else:
        assert a == b
