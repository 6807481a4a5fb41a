"""Run folders on disk: config.json and atomic checkpoints.

    RUN/config.json                  resolved options, versions, command lines
    RUN/checkpoints/epoch-0003/      state after epoch 3, written by Accelerate

A checkpoint is written beside its final name and renamed when complete, so a folder named
epoch-NNNN is always whole. Only the last one is kept: choosing the best by test accuracy would be
selecting on the test set.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mocapsnet.train.errors import InputError
from mocapsnet.train.options import TrainOptions, from_json

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS = "model.safetensors"


def write_config(run: Path, options: TrainOptions) -> None:
    """Write or update RUN/config.json; each start of the run adds its command line."""
    path = run / "config.json"
    commands = json.loads(path.read_text())["commands"] if path.exists() else []
    packages = ("mocapsnet", "torch", "torchvision", "numpy", "accelerate", "pytorch-optimizer")
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    config = {
        "options": dataclasses.asdict(dataclasses.replace(options, resume=None)),
        "versions": versions,
        "commands": [*commands, [Path(sys.argv[0]).name, *sys.argv[1:]]],
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(path)


def read_config(run: Path) -> TrainOptions:
    """The options a run was started with.

    Raises: InputError if `run` is not a run folder or its config.json is damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        what = "has no config.json, so it is not a run folder" if run.is_dir() else "does not exist"
        raise InputError(f"{run} {what}; give a folder that `mocapsnet train` wrote")
    try:
        return from_json(json.loads(path.read_text())["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or of another version: {error!r}") from error


def latest(run: Path) -> tuple[Path, int]:
    """The last whole checkpoint of a run and the number of epochs done.

    Raises: InputError if there is none.
    """
    found = [p for p in (run / "checkpoints").glob("epoch-*") if p.suffix != ".tmp"]
    if not found:
        raise InputError(f"{run} holds no checkpoint; start the training anew in another folder")
    last = max(found)
    return last, int(last.name.removeprefix("epoch-"))


def keep_unwrapped(accelerator: Accelerator) -> None:
    """Save and load the bare model's weights, so that the number of processes may change.

    Accelerate would save those of the data-parallel wrapper, whose names begin with "module.".
    """

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save(accelerator: Accelerator, run: Path, epochs_done: int) -> Path:
    """Write the state after `epochs_done` epochs, then drop the one before it. Collective."""
    final = run / "checkpoints" / f"epoch-{epochs_done:04d}"
    partial = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        for stale in final.parent.glob("*.tmp"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.replace(final)
        for older in final.parent.glob("epoch-*"):
            if older != final:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()
    return final


def restore(accelerator: Accelerator, checkpoint: Path, model: nn.Module) -> None:
    """Load everything a run needs to go on: weights, optimiser, schedule, random states.

    Raises: InputError if the checkpoint is damaged or belongs to another model.
    """
    check_weights(checkpoint, model)
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # noqa: BLE001 - unpickling a damaged file can raise anything
        raise InputError(f"{checkpoint} is damaged: {error!r}") from error


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load only the model's weights. Raises: InputError as `restore`."""
    model.load_state_dict(check_weights(checkpoint, model))


def check_weights(checkpoint: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights and compare names and shapes with the model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checkpoint / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
    have = {name: tuple(w.shape) for name, w in weights.items()}
    need = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    if have != need:
        name = next(n for n in {**need, **have} if have.get(n) != need.get(n))
        raise InputError(
            f"{path} belongs to another model: {name} is {have.get(name, 'missing')} there, but "
            f"{need.get(name, 'missing')} in the model that config.json describes"
        )
    return weights
