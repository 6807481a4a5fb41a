"""An experiment of tiny runs, and what is made of an experiment's file."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mocapsnet.train.experiments import configuration, runs
from mocapsnet.train.experiments.configuration import Configuration
from mocapsnet.train.experiments.runs import Run

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


# One step an epoch; as TINY beside.
OPTIONS = {"channels": 16, "capsules": 4, "decoder": [16], "limit": 16, "batch_size": 16}

GRID = {"dataset": ["digits"], "model": ["mocapsnet"], "blocks": [1], "seed": [0]}

OWN: dict[str, Any] = {
    "title": "Learning rates",
    "grid": GRID,
    "cases": [{"name": "slow", "lr": 0.001}, {"name": "too fast", "lr": 1e30}],
    "options": OPTIONS,
    "columns": ["model"],
}

NAME = "digits-mocapsnet-blocks-1-seed-"


def own(content: dict[str, Any] = OWN, name: str = "own.json") -> Path:
    path = Path(name)
    path.write_text(json.dumps(content))
    return path


def parsed(content: dict[str, Any] = OWN) -> Configuration:
    return configuration.parse(content, "own", "own.json")


def shipped(name: str) -> Configuration:
    path = configuration.find(name)
    return configuration.parse(configuration.load(path), name, path)


def runs_of(found: Configuration, **given: Any) -> list[Run]:
    return runs.build(found, runs.select(found, {}), given, {})


def outputs(seed: int) -> str:
    return Path(f"runs/own/{NAME}{seed}/train.log").read_text()


def interrupt_when(ready: Callable[[], bool]) -> None:
    """Send this process what a job scheduler sends."""
    deadline = time.monotonic() + 120
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)
