"""Run folders on disk, and their config.json.

    RUN/config.json                  resolved options, versions, command lines
    RUN/metrics.jsonl                the numbers of each epoch, see metrics.py
    RUN/checkpoints/                 the state to go on from, see checkpoints.py

Nothing in a run folder can run when it is read: there are no pickles, only JSON and safetensors.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from mocapsnet.train.errors import InputError
from mocapsnet.train.files import write_whole
from mocapsnet.train.options import TrainOptions, from_json

# Of config.json and of checkpoints. 0, which they do not name: training state in pickles.
FORMAT = 1


def write_config(run: Path, options: TrainOptions) -> None:
    """Write or update RUN/config.json; each start of the run adds its command line."""
    path = run / "config.json"
    commands = json.loads(path.read_text())["commands"] if path.exists() else []
    packages = ("mocapsnet", "torch", "torchvision", "numpy", "accelerate", "pytorch-optimizer")
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    config = {
        "format": FORMAT,
        "options": dataclasses.asdict(dataclasses.replace(options, resume=None)),
        "versions": versions,
        "commands": [*commands, ["mocapsnet", *sys.argv[1:]]],
    }
    write_whole(path, json.dumps(config, indent=2) + "\n")


def read_config(run: Path) -> TrainOptions:
    """The options a run was started with.

    Raises: InputError if `run` is not a run folder or its config.json is damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        what = "has no config.json, so it is not a run folder" if run.is_dir() else "does not exist"
        raise InputError(f"{run} {what}; give a folder that `mocapsnet train` wrote")
    try:
        config = json.loads(path.read_bytes())
        check_format(config, path)
        return from_json(config["options"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def check_format(content: dict[str, Any], path: Path) -> None:
    """Raises: InputError if a file was written by a later version than this one can read."""
    written = content.get("format", 0)
    if not isinstance(written, int) or not 0 <= written <= FORMAT:
        raise InputError(
            f"{path} is of format {written}, and this version of MoCapsNet reads up to {FORMAT}; "
            "use the version that wrote it, which the run's config.json names"
        )
