"""`mocapsnet experiment`: the paper's tables and figures, and one's own, as one command each.

configs/            the experiments, one JSON file each
configuration.py    reads and checks them
runs.py             the runs that they are made of
states.py           how far each of them is
record.py           what an experiment's folder holds, and its lock
schedule.py         trains what is missing
estimate.py         how long that will take
table.py            tables beside the paper's numbers, drawn by picture.py
measured.py         experiments that are made of benchmarks

OUT/NAME/experiment.json     what was asked for
OUT/NAME/RUN/                a run of `mocapsnet train`, with its output in train.log
OUT/NAME/failures.json       why runs failed
OUT/NAME/table.md, table.csv, runs.csv, table.png
"""

from __future__ import annotations

import collections
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from mocapsnet.train.errors import Failed, InputError
from mocapsnet.train.experiments import configuration, record, runs, table
from mocapsnet.train.experiments.configuration import Configuration
from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.runs import Run
from mocapsnet.train.experiments.states import State, states_of
from mocapsnet.train.options import ExperimentOptions

# Options that the experiment sets itself, and what does so.
OWN = {
    "dataset": "--datasets",
    "model": "--models",
    "seed": "--seeds",
    "resume": "nothing: what was interrupted goes on by itself",
}


def experiment(command: ExperimentOptions) -> None:
    """Run, list or report an experiment.

    Raises: InputError before anything is started; Interrupted; Failed if runs failed.
    """
    if not command.name:
        for option in ("copy", "report", "dry_run"):
            if getattr(command, option):
                raise InputError(
                    f"--{option.replace('_', '-')} needs the NAME of an experiment; "
                    "`mocapsnet experiment` lists them"
                )
        return _list()
    path = configuration.find(command.name)
    if command.copy is not None:
        return _copy(path, Path(command.copy))
    content = configuration.load(path)
    if "benchmarks" in content:
        from mocapsnet.train.experiments import measured

        return measured.experiment(content, path, command)
    found = configuration.parse(content, path.stem, path)
    folder = Path(command.out) / path.stem
    if command.report:
        return _report(folder)
    asked = _asked(found, command)
    if command.dry_run:
        return _dry_run(record.merge(folder, record.read(folder), asked), asked, folder, command)
    with record.claimed(folder):
        merged = record.merge(folder, record.read(folder), asked)
        _run(merged, asked, folder, command)


def _list() -> None:
    print("mocapsnet experiment NAME: experiments that come with the package\n")
    for name in configuration.names():
        print(f"  {name:<12}{configuration.load(configuration.find(name))['title']}")
    print("\n--copy FILE writes one of them to a file, to make one of your own of it")


def _copy(path: Path, to: Path) -> None:
    if to.exists():
        raise InputError(f"--copy {to}: exists; choose another file")
    if not to.parent.is_dir():
        raise InputError(f"--copy {to}: there is no folder {to.parent}")
    shutil.copyfile(path, to)
    print(f"{to} written; change it, and run it with: mocapsnet experiment {shlex.quote(str(to))}")


def _asked(found: Configuration, command: ExperimentOptions) -> Record:
    """What a command line asks for."""
    given = dict(command.train or {})
    for name, instead in OWN.items():
        if name in given:
            raise InputError(f"--{name} is for mocapsnet train; an experiment has {instead}")
    for name in ("epochs", "channels", "limit", "data_dir"):
        if getattr(command, name) is not None:
            given[name] = getattr(command, name)
    if command.jobs is not None and command.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {command.jobs}")
    chosen: dict[str, list[Any] | None] = {
        "dataset": _listed(command.datasets),
        "model": _listed(command.models),
        "blocks": _listed(command.blocks),
        "seed": _listed(command.seeds),
    }
    keys = runs.select(found, chosen)
    folders = _folders(command.folders, {one["dataset"] for one in keys})
    asked = Record(found, given, folders, keys)
    asked.runs()
    return asked


def _listed(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _folders(words: tuple[str, ...], datasets: set[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, _, folder = word.partition("=")
        if name not in datasets or not folder:
            raise InputError(
                f"--folders {word}: must be DATASET=DIR, of a data set that is asked for "
                f"({', '.join(sorted(datasets))})"
            )
        found[name] = str(Path(folder).absolute())
    return found


def _report(folder: Path) -> None:
    found = record.read(folder)
    if found is None:
        raise InputError(f"{folder} holds no experiment; run it without --report first")
    print(table.write(folder, found, states_of(found.runs(), folder)))
    _tell_files(folder)


def _tell_files(folder: Path) -> None:
    names = ", ".join((table.TABLE, table.CSV, table.RUNS, table.PICTURE))
    print(f"{folder} holds {names}")


def _mine(merged: Record, asked: Record) -> list[Run]:
    """The runs that this command asked for."""
    return [run for run in merged.runs() if run.keys in asked.keys]


def _check_others(mine: list[Run], states: dict[str, State], folder: Path) -> None:
    others = [run for run in mine if states[run.name].kind == "other"]
    if others:
        first = others[0]
        more = f", and so do {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"{folder / first.name} holds a run of other options "
            f"({states[first.name].reason}){more}; they are not mixed with this experiment's: give "
            "another --out, or move them away"
        )


def _dry_run(merged: Record, asked: Record, folder: Path, command: ExperimentOptions) -> None:
    from mocapsnet.train.experiments.estimate import disk, estimate
    from mocapsnet.train.experiments.schedule import clock, place

    mine = _mine(merged, asked)
    states = states_of(mine, folder)
    where = place(command.jobs, (command.train or {}).get("device", "auto"))
    found = estimate(mine, states, where, lambda what: print(f"{what} ...", file=sys.stderr))
    width = max(len(run.name) for run in mine)
    words = {run.name: states[run.name].words(run) for run in mine}
    wide = min(max(map(len, words.values())), 60)
    for run in mine:
        guess = found.get(run.name)
        time = f"  {clock(guess.seconds):>9}  by {guess.source}" if guess else ""
        print(f"{run.name:<{width}}  {words[run.name]:<{wide}}{time}".rstrip())
    total = sum(guess.seconds for guess in found.values())
    at_once = min(where.jobs, max(len(found), 1))
    print(
        f"{_counts(states)}; about {clock(total / at_once)} with {at_once} at a time on "
        f"{where.words}, without reading data; "
        f"{disk(mine) / 2**30:.1f} GiB of disk when all are finished"
    )
    _check_others(mine, states, folder)


def _counts(states: dict[str, State]) -> str:
    counts = collections.Counter(state.kind for state in states.values())
    words = {"missing": "not run", "other": "of other options"}
    return f"{len(states)} runs: " + ", ".join(
        f"{count} {words.get(kind, kind)}" for kind, count in sorted(counts.items())
    )


def _run(merged: Record, asked: Record, folder: Path, command: ExperimentOptions) -> None:
    from mocapsnet.train.experiments.schedule import place, train_all

    mine = _mine(merged, asked)
    states = states_of(mine, folder)
    _check_others(mine, states, folder)
    where = place(command.jobs, (command.train or {}).get("device", "auto"))
    busy = [run for run in mine if states[run.name].kind == "running"]
    for run in busy:
        print(f"{run.name}: left alone, in use by {states[run.name].reason}")
    todo = [run for run in mine if states[run.name].kind not in ("finished", "running")]
    if todo:
        record.note_start(merged, where.words)
    record.write(folder, merged)

    def write() -> str:
        return table.write(folder, merged, states_of(merged.runs(), folder))

    print(f"{folder}: {_counts(states)}; {where.jobs} at a time on {where.words}", flush=True)
    go_on = shlex.join(["mocapsnet", *sys.argv[1:]])
    failed = train_all(todo, states, folder, where, write, go_on)
    print(f"\n{write()}")
    _tell_files(folder)
    if failed:
        reasons = states_of([run for run in todo if run.name in failed], folder)
        first = f"{failed[0]}: {reasons[failed[0]].reason}"
        raise Failed(
            f"{len(failed)} of {len(todo)} runs failed, {first}"
            + (", ..." if len(failed) > 1 else "")
            + "; the same command tries them again"
        )
