"""The runs of an experiment: their names, their options, and the command line of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mocapsnet.train.errors import InputError
from mocapsnet.train.experiments.configuration import (
    AXES,
    Configuration,
    Keys,
    combinations,
    fits,
    slug,
)
from mocapsnet.train.files import hidden
from mocapsnet.train.option_values import (
    CONV,
    MOMENTUM,
    arguments,
    flag,
    from_names,
    kinds,
    of_kind,
)
from mocapsnet.train.options import TrainOptions

# Values that say by themselves what they are; others stand behind their option's name.
PLAIN = ("dataset", "model", "optimizer", "method", "case")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        keys: what it differs in from the experiment's other runs, seed last.
        values: the options that it is given, by their names.
        options: all of them, resolved.
        scale: the same as the paper had them.
    """

    keys: Keys
    values: dict[str, Any]
    options: TrainOptions
    scale: TrainOptions

    @property
    def name(self) -> str:
        """Readable, and the name of the run's folder: mnist-mocapsnet-blocks-4-seed-1."""
        parts = [
            text(value) if name in PLAIN else f"{name.replace('_', '-')}-{text(value)}"
            for name, value in self.keys.items()
        ]
        return "-".join(map(slug, parts))

    @property
    def cell(self) -> Keys:
        """The keys without the seed."""
        return {name: value for name, value in self.keys.items() if name != "seed"}

    def arguments(self, folder: str) -> list[str]:
        """The words behind `mocapsnet` that begin this run."""
        return ["train", *arguments(self.values), "--out", folder]


def text(value: Any) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def select(configuration: Configuration, chosen: dict[str, list[Any] | None]) -> list[Keys]:
    """The keys of the runs that are asked for.

    Args:
        chosen: values of `AXES` instead of the file's (None: the file's); others than the file's
            are runs too, though nothing of the paper is beside them.
    Raises: InputError if a value is none, or is given twice.
    """
    grid = dict(configuration.grid)
    for name in AXES:
        values = chosen.get(name)
        if values is None:
            continue
        option = {"dataset": "--datasets", "model": "--models", "seed": "--seeds"}.get(
            name, f"--{name}"
        )
        kind = kinds()[name][1]
        for i, value in enumerate(values):
            of_kind(option, value, kind)
            if value in values[:i]:
                raise InputError(f"{option}: {value} is given twice")
        grid[name] = list(values)
    return combinations(grid, configuration.cases)


def build(
    configuration: Configuration,
    keys: Iterable[Keys],
    given: dict[str, Any],
    folders: dict[str, str],
) -> list[Run]:
    """Runs of some keys; those of a case that the file no longer has are left out.

    Args:
        given: options of the command line for all runs, by their names.
        folders: data sets to read from a folder of images, and which.
    Raises: InputError if options are refused, with the run's name.
    """
    for name in given:
        if name in configuration.reserved:
            raise InputError(
                f"--{name.replace('_', '-')} {text(given[name])}: {configuration.name} compares "
                f"values of it; to compare others copy the experiment with --copy and change it"
            )
    runs = []
    for one in keys:
        cases = [
            case
            for case in configuration.cases
            if fits({**dict.fromkeys(case.keys), **one}, case.keys)
        ]
        if cases:
            runs.append(_build(configuration, one, cases[0].options, given, folders))
    return runs


def _build(
    configuration: Configuration,
    keys: Keys,
    case: dict[str, Any],
    given: dict[str, Any],
    folders: dict[str, str],
) -> Run:
    values = dict(configuration.options)
    for rule in configuration.where:
        if fits(keys, rule.when):
            values |= rule.then
    axes = {name: value for name, value in keys.items() if name != "case"}
    values = {**axes, **values, **case, **axes}
    scale = values | {k: v for k, v in configuration.scale.items() if k not in axes}
    # Of no use to a network without momentum, and refused there.
    momentum = {name.partition(".")[2] for name in MOMENTUM}
    moves = keys["model"] in ("mocapsnet", CONV)
    values |= {k: v for k, v in given.items() if k not in momentum or moves}
    if keys["dataset"] in folders:
        values |= {"dataset": "folder", "data_dir": folders[keys["dataset"]]}
    values, scale = _usable(values), _usable(scale)
    run = Run(keys, values, TrainOptions(), TrainOptions())
    try:
        return Run(keys, values, from_names(values), from_names(scale))
    except InputError as error:
        raise InputError(f"{configuration.name}, {run.name}: {error}") from error


def _usable(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is given for all runs and of no use to this one, and refused there."""
    unused = set()
    if values.get("memory") == "stored":
        unused.add("anchor_every")
    if values.get("method") != "sda":
        unused.add("sda_mean")
    cropped = values.get("crop") != "resized" or values.get("test_crop") == "random"
    if not cropped and values.get("recipe") is None:
        unused.add("pad")
    return {name: value for name, value in values.items() if name not in unused}


def difference(
    then: TrainOptions, now: TrainOptions, ignored: Iterable[str]
) -> tuple[str, Any, Any] | None:
    """The first option that differs: its spelling on a command line, and both values."""
    from mocapsnet.train.option_values import SETTLED, flat

    before, after = flat(then), flat(now)
    for name, value in after.items():
        left_open = value is None and name in SETTLED
        if name not in ignored and before[name] != value and not left_open:
            return flag(name), before[name], value
    folders = then.data.data_dir, now.data.data_dir
    if now.data.dataset == "folder" and all(Path(folder).is_dir() for folder in folders):
        if images_below(folders[0]) != images_below(folders[1]):  # and none that has moved
            return "--data-dir", *folders
    return None


@cache
def images_below(folder: str) -> frozenset[str]:
    """Names of a data set's files, by which a copy of it is the same."""
    root = Path(folder)
    names = (path.relative_to(root) for path in root.rglob("*") if path.suffix)
    return frozenset(name.as_posix() for name in names if not hidden(name))
