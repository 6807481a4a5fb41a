"""Trainings that only look like some."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mocapsnet.cli import main
from mocapsnet.train.experiments import schedule
from mocapsnet.train.experiments.configuration import Configuration

from ..helpers import TINY
from .helpers import GRID, OPTIONS, OWN, own, parsed

# Trains nothing: copies a run, with the options that it is given; seed 1 fails, seed 2 is killed
# as where memory runs out, seed 3 does not end by itself.
FAKE = """
import json, os, pathlib, shutil, signal, sys, time
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
resumed = "--resume" in words
out = pathlib.Path(option("--resume" if resumed else "--out"))
seed = int(out.name.rpartition("-")[2])
print("threads", os.environ.get("OMP_NUM_THREADS"), "GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
print("mocapsnet: warning: a warning is no reason")
if seed == 1:
    sys.exit("mocapsnet: not enough memory: nothing is left. Fewer images need less")
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if not resumed:
    shutil.copytree("template", out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    config["options"]["optim"]["seed"] = seed
    (out / "config.json").write_text(json.dumps(config))
if seed == 3:
    (out / "waiting").touch()
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    run = tmp_path_factory.mktemp("template") / "template"
    assert main(["train", *TINY, "--limit", "16", "--epochs", "1", "--out", str(run)]) == 0
    return run


@pytest.fixture
def fake(template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configuration]:
    """An experiment of five seeds, and trainings that only look like some."""
    shutil.copytree(template, "template")
    Path("fake.py").write_text(FAKE)
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, "fake.py"))
    monkeypatch.setattr(schedule, "EVERY", 0.01)
    content = OWN | {"grid": GRID | {"seed": [0, 1, 2, 4, 3]}, "cases": []}
    content["options"] = OPTIONS | {"epochs": 1, "device": "cpu"}
    own(content)
    yield parsed(content)
