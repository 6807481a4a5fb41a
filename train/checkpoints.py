"""Checkpoints: what a run needs to go on, in files that cannot run anything.

    RUN/checkpoints/epoch-0003/      the state after epoch 3
        model.safetensors            weights
        optimizer.safetensors        the optimiser's tensors
        state.json                   its numbers, the learning rate's schedule, the best epoch so
                                     far, the format's version
    RUN/checkpoints/epoch-0003-steps-000120/    the same, 120 steps further, and in state.json what
                                     these steps found

There is no state of random generators: what a run draws after its initial weights is drawn anew in
each epoch, from the seed and the epoch's number, and for each step before the first; no network
that can be trained draws anything in a step.

A checkpoint is written beside its final name and renamed when complete, so a folder named
epoch-NNNN is always whole. The last one is kept, from which a run goes on, and with --keep best the
one with the best validation accuracy too, which the last one names; and the last one within an
epoch until the epoch is done. Nothing is removed before what takes its place is there.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mocapsnet.train.best import Best
from mocapsnet.train.errors import InputError
from mocapsnet.train.files import sync_folder, write_whole
from mocapsnet.train.run_folder import FORMAT, check_format
from mocapsnet.train.trainer import Position

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

# Options of an optimiser that say how it computes where it runs, and not what.
HERE = ("foreach", "fused", "capturable")


@dataclass(frozen=True)
class State:
    """What an epoch changes.

    Attributes:
        model: the bare model, so that the number of processes may change between checkpoints.
        schedule: of the learning rate, if the optimiser does not keep its own.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None


def latest(run: Path) -> tuple[Path, int] | None:
    """The last whole checkpoint of a run and the number of epochs done.

    Returns: None for a run that was stopped before its first checkpoint.
    Raises: InputError if there is none, but was.
    """
    found = whole(run)
    if found:
        last = max(found, key=found.__getitem__)
        return last, found[last]
    if (run / "metrics.jsonl").exists():
        raise InputError(f"{run} holds no checkpoint; start the training anew in another folder")
    return None


def whole(run: Path) -> dict[Path, int]:
    """The whole checkpoints of a run with their epochs; whatever else lies there is not ours."""
    named = [
        (path, re.fullmatch(r"epoch-(\d{4,9})", path.name))
        for path in (run / "checkpoints").glob("epoch-*")
    ]
    return {path: int(name[1]) for path, name in named if name and path.is_dir()}


def folder(run: Path, epochs_done: int) -> Path:
    """Where the checkpoint after so many epochs lies."""
    return run / "checkpoints" / f"epoch-{epochs_done:04d}"


def within(run: Path, epochs_done: int) -> Path | None:
    """The last checkpoint within the epoch after so many."""
    found = _within(run, f"{epochs_done:04d}")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _within(run: Path, epochs: str = "*") -> list[Path]:
    named = (run / "checkpoints").glob(f"epoch-{epochs}-steps-*")
    return [path for path in named if re.fullmatch(r"epoch-\d{4,9}-steps-\d{6,12}", path.name)]


def position(checkpoint: Path) -> Position:
    """How far the epoch had come at a checkpoint within it.

    Raises: InputError if the checkpoint is damaged.
    """
    path = checkpoint / STATE
    try:
        found = json.loads(path.read_bytes())["position"]
        steps = torch.tensor(found["steps"], dtype=torch.float64).view(-1, 4)
        return Position(steps, float(found["lr"]), float(found["seconds"]))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def best(checkpoint: Path) -> Best | None:
    """The best epoch up to a checkpoint; None if nothing was validated.

    Raises: InputError if the checkpoint is damaged.
    """
    path = checkpoint / STATE
    try:
        found = json.loads(path.read_bytes()).get("best") if path.exists() else None
        return None if found is None else Best(int(found["epoch"]), float(found["accuracy"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def kept(run: Path, keep: str) -> tuple[Path, int] | None:
    """The checkpoint of the network that a run has kept, "last" or "best", and its epochs.

    Returns: None as `latest`. Raises: InputError as `latest`, or if it is not there.
    """
    found = latest(run)
    chosen = best(found[0]) if found and keep == "best" else None
    if chosen is None:
        return found
    path = folder(run, chosen.epoch)
    if not path.is_dir():
        raise InputError(f"{path}, the checkpoint of the best epoch of {run}, is missing")
    return path, chosen.epoch


def save(
    state: State,
    run: Path,
    epochs_done: int,
    best: Best | None = None,
    keep: str = "last",
    position: Position | None = None,
) -> None:
    """Write the state after `epochs_done` epochs, then drop the others, but for a best to keep.

    Or, given its `position`, the state within the next epoch; then only others within one are
    dropped. For one process, as all hold the same state.

    Raises: OSError, with the last checkpoint in place.
    """
    final = folder(run, epochs_done)
    if position is not None:
        final = final.with_name(f"{final.name}-steps-{len(position.steps):06d}")
        if final.exists():  # the same
            return
    partial = final.with_suffix(".tmp")
    for stale in final.parent.glob("epoch-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        optimizer = state.optimizer.state_dict()
        tensors, numbers = _split(optimizer.pop("state"))
        rest = {
            "format": FORMAT,
            "epochs_done": epochs_done,
            "optimizer": optimizer | {"state": numbers},
            "schedule": state.schedule and state.schedule.state_dict(),
            "best": best and {"epoch": best.epoch, "accuracy": best.accuracy},
        }
        if position is not None:
            rest["position"] = {
                "steps": position.steps.tolist(),
                "lr": position.lr,
                "seconds": position.seconds,
            }
        write_whole(partial / WEIGHTS, to_bytes(_plain(state.model.state_dict())))
        write_whole(partial / OPTIMIZER, to_bytes(_plain(tensors)))
        write_whole(partial / STATE, json.dumps(rest, indent=2) + "\n")
        before = _within(run) if position else [*whole(run), *_within(run)]
        partial.replace(final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
        raise
    for older in before:
        if not (best is not None and keep == "best" and older == folder(run, best.epoch)):
            shutil.rmtree(older, ignore_errors=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _split(
    state: dict[int, dict[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's state by parameter as tensors, "3.exp_avg", and what is not a tensor."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state.items():
        numbers[str(index)] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        tensors |= {f"{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    return tensors, numbers


def restore(checkpoint: Path, state: State) -> None:
    """Load everything a run needs to go on.

    Raises: InputError if the checkpoint is damaged, of another version, or of another model.
    """
    weights = read_weights(checkpoint, state.model)
    path = checkpoint / STATE
    if not path.exists():
        raise InputError(
            f"{checkpoint} has no {STATE}: it is damaged, or of a version of MoCapsNet that kept "
            "its training state in pickles, which are not read because they can run programs. "
            "`mocapsnet evaluate` can use its weights; to train, start a new run"
        )
    tensors = _read(checkpoint / OPTIMIZER)
    try:
        rest = json.loads(path.read_bytes())
        check_format(rest, path)
        optimizer = rest["optimizer"]
        by_parameter = {int(i): dict(values) for i, values in optimizer["state"].items()}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            by_parameter[int(index)][name] = tensor
        _check_shapes(by_parameter, state.optimizer)
        for group, own in zip(optimizer["param_groups"], state.optimizer.param_groups, strict=True):
            group |= {name: own[name] for name in HERE if name in own}
        state.optimizer.load_state_dict(optimizer | {"state": by_parameter})
        if state.schedule is not None:
            state.schedule.load_state_dict(rest["schedule"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error
    state.model.load_state_dict(weights)


def _check_shapes(by_parameter: dict[int, dict[str, Any]], optimizer: Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in by_parameter.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in (parameters[index].shape, ()):
                raise ValueError(f"{name} of parameter {index} has shape {list(value.shape)}")


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load only the model's weights. Raises: InputError as `restore`."""
    model.load_state_dict(read_weights(checkpoint, model))


def read_weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint's weights and compare names and shapes with the model's."""
    path = checkpoint / WEIGHTS
    weights = _read(path)
    have = {name: tuple(w.shape) for name, w in weights.items()}
    need = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    if have != need:
        name = next(n for n in {**need, **have} if have.get(n) != need.get(n))
        raise InputError(
            f"{path} belongs to another model: {name} is {have.get(name, 'missing')} there, but "
            f"{need.get(name, 'missing')} in the model that config.json describes"
        )
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
