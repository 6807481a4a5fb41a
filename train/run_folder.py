"""Run folders on disk: their config.json, and the lock that one training holds.

    RUN/config.json                  resolved options, images and classes, versions, command lines
    RUN/metrics.jsonl                the numbers of each epoch, see metrics.py
    RUN/checkpoints/                 the state to go on from, see checkpoints.py
    RUN/model/                       the trained network, see model_folder.py
    RUN/result.json                  what was kept, and its test, see result.py

Nothing in a run folder can run when it is read: there are no pickles, only JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from mocapsnet.train import data
from mocapsnet.train.errors import InputError
from mocapsnet.train.files import is_partial, write_whole
from mocapsnet.train.option_values import from_json, to_json
from mocapsnet.train.options import TrainOptions

# Of config.json and of checkpoints. 0, which they do not name: training state in pickles. A new
# option needs a new format: in files of an older one an option that is missing has its default.
FORMAT = 8

CONFIG = "config.json"
LOCK, HOLDER = ".lock", ".lock-holder.json"
# What `mocapsnet experiment` keeps of the output of the trainings that it starts.
LOG = "train.log"
# TensorBoard's files, begun before config.json: a tracker that does not start is refused.
TENSORBOARD = "tensorboard"


def choose(options: TrainOptions) -> Path:
    """The run folder, the same for all processes; nothing is made yet. Collective.

    Raises: InputError if a new run would need a folder that holds something.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    default = f"runs/{options.data.dataset}-{options.model.name}-{now}"
    names = [options.resume or options.out or default]
    broadcast_object_list(names)
    run = Path(names[0])
    if options.resume is None:
        _check_empty(run)
    return run


def _check_empty(run: Path) -> None:
    # What a run leaves that was killed before its config.json was there.
    remains = {LOCK, HOLDER, LOG, TENSORBOARD}
    names = {p.name for p in run.iterdir()} if run.is_dir() else {""}
    names -= {name for name in names if is_partial(name, CONFIG)}
    if run.exists() and names - remains:
        raise InputError(
            f"{run} exists and is not an empty folder; choose another --out, or continue that run "
            f"with --resume {run}"
        )


@contextlib.contextmanager
def claimed(run: Path, accelerator: Accelerator, new: bool) -> Iterator[None]:
    """Hold a run folder for this training, and make it if it is new. Collective.

    The system gives the lock back when the process ends, however it ends.

    Raises: InputError if another training holds it, which all processes say alike.
    """
    lock = FileLock(run / LOCK)
    problem = [_claim(run, lock, new) if accelerator.is_main_process else ""]
    broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])
    try:
        yield
    finally:
        if lock.is_locked:
            (run / HOLDER).unlink(missing_ok=True)
            lock.release()


def _claim(run: Path, lock: FileLock, new: bool) -> str:
    """Take the lock; returns what prevents it."""
    try:
        if new:
            run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if new:
            _check_empty(run)  # another training may have come in between
        write_holder(run)
    except Timeout:
        return f"{run} is in use by {holder(run)}; wait for that training or end it"
    except InputError as error:
        lock.release()
        return str(error)
    except OSError as error:
        return f"{'--out' if new else '--resume'} {run}: cannot write there: {error.strerror}"
    return ""


def write_holder(folder: Path) -> None:
    """Note that this process holds a folder's lock."""
    write_whole(folder / HOLDER, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))


def still_held(folder: Path) -> None:
    """Note that this process still holds a folder's lock, for those on other machines."""
    with contextlib.suppress(OSError):
        os.utime(folder / HOLDER)


def holder(folder: Path) -> str:
    """Who holds a folder's lock, in words."""
    try:
        found = json.loads((folder / HOLDER).read_bytes())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


def write_config(
    run: Path, options: TrainOptions, images: data.ImageSet, test_images: data.ImageSet
) -> None:
    """Write or update RUN/config.json; each start of the run adds its command line."""
    path = run / CONFIG
    commands = _read(path).get("commands") if path.exists() else None
    packages = ("mocapsnet", "torch", "torchvision", "numpy", "accelerate", "pytorch-optimizer")
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    config = {
        "format": FORMAT,
        "options": to_json(options),
        "image_shape": images.image_shape,
        "classes": images.classes,
        "files": {"training": images.files, "test": test_images.files},
        "versions": versions,
        "commands": [
            *(commands if isinstance(commands, list) else []),
            ["mocapsnet", *sys.argv[1:]],
        ],
    }
    write_whole(path, json.dumps(config, indent=2) + "\n")


def read_config(run: Path) -> TrainOptions:
    """The options a run was started with, resolved.

    Raises: InputError if `run` is not a run folder, or says what in its config.json is wrong.
    """
    path = run / CONFIG
    if not path.is_file():
        what = "is not a folder" if run.exists() else "does not exist"
        if run.is_dir():
            what = "has no config.json, so it is not a run folder"
        raise InputError(f"{run} {what}; give a folder that `mocapsnet train` wrote")
    config = _read(path)
    check_format(config, path)
    options, written = config.get("options"), config.get("format", 0)
    if options is None and "network" in config:
        above = run.resolve().parent
        where = f": {above}" if (above / CONFIG).is_file() else ""
        raise InputError(f"{run} holds a network alone; give the run's folder{where}")
    try:
        return from_json(_as_it_was(options, written), complete=written == FORMAT)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _as_it_was(options: Any, written: int) -> Any:
    """The options of a run in whose time one of them had another default, or was accepted where it
    had no effect."""
    match options:
        case {"model": {"name": "conv-mocapsnet"}, "optim": dict(optim)} if written < 7:
            options = options | {"optim": {"class_lr_factor": 1.0, "down_weight": 0.5} | optim}
    match options:
        case {"data": {"crop": "resized"} as data} if written < 8:
            if data.get("test_crop", "centre") == "centre":
                options = options | {"data": data | {"pad": 0}}
    match options:
        case {"model": {"method": "rba"} as model} if written < 8:
            options = options | {"model": model | {"sda_mean": "input"}}
    match options:
        case {"model": {"memory": "stored"} as model} if written < 8:
            options = options | {"model": model | {"anchor_every": None}}
    return options


def check_images(run: Path, images: data.ImageSet, test_images: data.ImageSet) -> None:
    """Raises: InputError if a run cannot go on with these images, as it began with others."""
    _check_classes(run, images)
    for split, now in (("training", images), ("test", test_images)):
        if not same_files(run, split, now):
            raise InputError(
                f"the {split} images are other files than those {run} began with; restore them, "
                "give their folder with --data-dir, or train a new run"
            )


def known(run: Path) -> data.Known:
    """What a run knows of the images that it was begun with; the first ones say nothing."""
    config = _read(run / CONFIG)
    classes, shape = config.get("classes"), config.get("image_shape")
    return data.Known(
        tuple(map(str, classes)) if isinstance(classes, list) else (),
        tuple(map(int, shape)) if isinstance(shape, list) else (),
    )


def check_test_images(run: Path, images: data.ImageSet) -> None:
    """Raises: InputError if a run cannot be tested with these images: it knows other classes, or
    it may have been trained on some of them."""
    _check_classes(run, images)
    if images.drawn and not same_files(run, "test", images):
        raise InputError(
            f"the folder does not hold the image files that {run} was trained and tested with, so "
            "others would be held out for testing, and some of them it may have been trained on; "
            "restore those files, or test with others: --data-dir DIR, with these in DIR/test/CLASS"
        )


def _check_classes(run: Path, images: data.ImageSet) -> None:
    """Raises: InputError if a run knows other classes, or images of another shape, than these."""
    config = _read(run / CONFIG)
    for name, now in (("classes", images.classes), ("image_shape", images.image_shape)):
        then = config.get(name, list(now))  # the first runs did not write them down
        if then != list(now):
            then = then if isinstance(then, list) else [then]
            shown: tuple[Any, Any] = (now, then)
            if name == "classes":  # those that the other does not have, if there are any
                new, gone = [c for c in now if c not in then], [c for c in then if c not in now]
                shown = (new or now, gone or then)
            have, had = (", ".join(map(str, s[:5])) + ", ..." * (len(s) > 5) for s in shown)
            raise InputError(
                f"the images are not those of {run}: {name.replace('_', ' ')} {have} where "
                f"{run / CONFIG} has {had}; give the data set of that run, with --data-dir where "
                "it has moved, or train a new run"
            )


def same_files(run: Path, split: str, images: data.ImageSet) -> bool:
    """Whether "training" or "test" images are of the files that a run was begun with."""
    files = _read(run / CONFIG).get("files")  # the first runs did not write them down
    return not isinstance(files, dict) or files.get(split) == images.files


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return config


def check_format(content: dict[str, Any], path: Path) -> None:
    """Raises: InputError if a file was written by a later version than this one can read."""
    written = content.get("format", 0)
    if type(written) is not int or not 0 <= written <= FORMAT:
        raise InputError(
            f"{path} is of format {written}, and this version of MoCapsNet reads up to {FORMAT}; "
            "use the version that wrote it, which the run's config.json names"
        )
