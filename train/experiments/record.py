"""FOLDER/experiment.json: what an experiment's folder holds, so that nothing else is mixed in."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mocapsnet.train.errors import InputError
from mocapsnet.train.experiments.configuration import Configuration, Keys, parse
from mocapsnet.train.experiments.runs import Run, build, difference
from mocapsnet.train.experiments.states import NO_MATTER
from mocapsnet.train.files import write_whole
from mocapsnet.train.option_values import planned
from mocapsnet.train.run_folder import HOLDER, LOCK, holder, write_holder

FORMAT = 1
RECORD = "experiment.json"


@dataclass
class Record:
    """What was asked for in a folder, in all commands together.

    Attributes:
        given: options of the command line for all runs, by their names.
        folders: data sets that are read from a folder of images, and which.
        keys: of the runs.
        machines: that they ran on.
        commands: command lines.
    """

    configuration: Configuration
    given: dict[str, Any]
    folders: dict[str, str]
    keys: list[Keys] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def runs(self) -> list[Run]:
        return build(self.configuration, self.keys, self.given, self.folders)


def read(folder: Path) -> Record | None:
    """The record of a folder; None where no experiment was begun.

    Raises: InputError if it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise InputError(
                f"{path} is of format {found['format']}, and this version of MoCapsNet reads "
                f"{FORMAT}; use the version that wrote it, or another --out"
            )
        record = Record(
            parse(found["experiment"], found["name"], path),
            {name: _tuple(value) for name, value in found["given"].items()},
            dict(found["folders"]),
            [{n: _tuple(v) for n, v in keys.items()} for keys in found["runs"]],
            list(found["machines"]),
            list(found["commands"]),
        )
        record.runs()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error
    return record


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write(folder: Path, record: Record) -> None:
    content = {
        "format": FORMAT,
        "name": record.configuration.name,
        "experiment": record.configuration.content,
        "given": record.given,
        "folders": record.folders,
        "runs": record.keys,
        "machines": record.machines,
        "commands": record.commands,
    }
    write_whole(folder / RECORD, json.dumps(content, indent=1) + "\n")


def merge(folder: Path, then: Record | None, now: Record) -> Record:
    """What was begun together with what is asked for.

    Raises: InputError if runs that were begun would get other options than they were begun with,
        so that a table would mix the two; more epochs are none, as a run can be made longer.
    """
    if then is None:
        return now
    old, new = then.configuration.compared, now.configuration.compared
    if set(old) != set(new):
        raise InputError(
            f"{folder} was begun to compare {', '.join(old)}, and now it is {', '.join(new)}; "
            "a table has cells of one kind: give another --out"
        )
    keys = [*now.keys, *(keys for keys in then.keys if keys not in now.keys)]
    merged = Record(now.configuration, now.given, now.folders, keys, then.machines, then.commands)
    after = {run.name: run for run in merged.runs()}
    for before in then.runs():
        run = after.get(before.name)
        if run is None:
            continue
        found = difference(before.options, run.options, NO_MATTER)
        longer = run.options.optim.epochs - before.options.optim.epochs
        if found is None and (longer < 0 or longer and planned(run.options.optim)):
            found = ("--epochs", before.options.optim.epochs, run.options.optim.epochs)
        if found is not None:
            option, old, new = found
            before_that, now_it = (
                f"without {option}" if value is None else f"with {option} {value}"
                for value in (old, new)
            )
            raise InputError(
                f"{folder} was begun {before_that}, and now it is asked for {now_it} "
                f"({run.name}); runs of both are not mixed in one table: give the same options "
                "again, or another --out"
            )
    merged.keys = [run.keys for run in after.values()]
    return merged


def note_start(record: Record, machine: str) -> None:
    """Add this command to a record."""
    if machine not in record.machines:
        record.machines.append(machine)
    record.commands.append(["mocapsnet", *sys.argv[1:]])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold an experiment's folder, and make it if it is new.

    The system gives the lock back when the process ends, however it ends.

    Raises: InputError if another experiment holds it, or nothing can be written there.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        write_holder(folder)
    except Timeout:
        raise InputError(
            f"{folder} is in use by {holder(folder)}; wait for that experiment or end it. "
            "--report and --dry-run work meanwhile"
        ) from None
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write there: {error.strerror}") from error
    try:
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()
