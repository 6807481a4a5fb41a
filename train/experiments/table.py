"""What came of an experiment, beside the paper's numbers: Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocapsnet.train.experiments.configuration import Keys, Published, fits
from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.runs import Run, text
from mocapsnet.train.experiments.states import NO_MATTER, State
from mocapsnet.train.files import write_whole
from mocapsnet.train.option_values import flag, flat

TABLE, CSV, RUNS, PICTURE = "table.md", "table.csv", "runs.csv", "table.png"

# Options of which less than the paper's is a smaller scale, and what to call them.
SIZES = {
    "optim.epochs": "epochs",
    "model.channels": "channels",
    "model.capsules": "capsules",
    "model.blocks": "blocks",
    "data.limit": "training images at most",
}


# How to write what options call in lower case.
NAMES = {
    "adam": "Adam",
    "capsnet": "CapsNet",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cnn": "CNN",
    "fashion-mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "mocapsnet": "MoCapsNet",
    "ranger21": "Ranger21",
    "rba": "RBA",
    "rescapsnet": "ResCapsNet",
    "resnet18": "ResNet-18",
    "sda": "SDA",
    "svhn": "SVHN",
}


def heading(value: Any) -> str:
    """A value as a reader knows it."""
    return NAMES.get(text(value), text(value))


@dataclass(frozen=True)
class Cell:
    """The runs of the same options but for the seed.

    Attributes:
        keys: what they share.
        accuracies: of those that are finished, in percent.
        holes: the others' states by name.
        paper: the number to print beside.
    """

    keys: Keys
    accuracies: tuple[float, ...]
    holes: dict[str, State]
    paper: Published | None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation, over n - 1; None of fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def words(self) -> str:
        """For a table: 99.42 ± 0.04 (n = 3), or a hole and what kind of one."""
        n = len(self.accuracies)
        if self.mean is None:
            kinds = sorted({state.kind for state in self.holes.values()})
            return f"– ({', '.join('not run' if k == 'missing' else k for k in kinds)})"
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        of = f" of {n + len(self.holes)}" if self.holes else ""
        return f"{self.mean:.2f}{spread} (n = {n}{of})"

    @property
    def published(self) -> str:
        """What the paper has."""
        if self.paper is None:
            return ""
        spread = "" if self.paper.deviation is None else f" ± {self.paper.deviation:.2f}"
        return self.paper.shown or f"{self.paper.accuracy:.2f}{spread}"


def cells(record: Record, states: dict[str, State]) -> list[Cell]:
    """The cells of an experiment, in the order of its keys."""
    grouped: dict[tuple[tuple[str, Any], ...], list[Run]] = {}
    for run in record.runs():
        grouped.setdefault(tuple(run.cell.items()), []).append(run)
    found = []
    for key, runs in grouped.items():
        accuracies, holes = [], {}
        for run in sorted(runs, key=lambda run: run.keys["seed"]):
            state = states[run.name]
            if state.kind == "finished" and state.accuracy is not None:
                accuracies.append(100 * state.accuracy)
            else:
                holes[run.name] = state
        keys = dict(key)
        paper = [entry for entry in record.configuration.paper if fits(keys, entry.keys)]
        found.append(Cell(keys, tuple(accuracies), holes, paper[0] if paper else None))
    return _in_order(record, found)


def _in_order(record: Record, found: list[Cell]) -> list[Cell]:
    """As the file has its values; others come after, but blocks by their number."""
    configuration = record.configuration
    order: dict[str, list[Any]] = {}
    for name in configuration.grid_order:
        values = [*configuration.grid[name], *(cell.keys[name] for cell in found)]
        order[name] = list(dict.fromkeys(values))
    order["blocks"].sort()
    cases = [case.keys for case in configuration.cases]

    def place(cell: Cell) -> list[int]:
        case = next(i for i, keys in enumerate(cases) if fits(cell.keys, keys))
        return [*(values.index(cell.keys[name]) for name, values in order.items()), case]

    return sorted(found, key=place)


def scale(record: Record) -> str:
    """One line: where this is smaller than what the paper did, and where it is something else."""
    configuration, runs = record.configuration, record.runs()
    whom = "the paper" if configuration.paper or configuration.scale else configuration.name
    smaller, other = [], []
    differences: dict[str, set[tuple[Any, Any]]] = {}
    for run in runs:
        ours, theirs = flat(run.options), flat(run.scale)
        for name, value in ours.items():
            ignored = name in NO_MATTER - {"optim.epochs"} or name == "data.dataset"
            if not ignored and value != theirs[name]:
                differences.setdefault(name, set()).add((value, theirs[name]))
    for name, pairs in differences.items():
        words = (lambda v: f"{v:,}" if type(v) is int else text(v)) if name in SIZES else text
        now = " or ".join(dict.fromkeys(words(a) for a, _ in sorted(pairs, key=str)))
        then = " or ".join(dict.fromkeys(words(b) for _, b in sorted(pairs, key=str)))
        if name in SIZES and all(b is None or a is not None and a < b for a, b in pairs):
            then = "all" if then == "none" else then
            smaller.append(f"{now} {SIZES[name]} instead of {then}")
        else:
            other.append(f"{flag(name)} {now} instead of {then}")
    for name in ("seed", *(n for n in configuration.grid if n != "seed")):
        wanted = configuration.grid[name]
        have = list(dict.fromkeys(run.keys[name] for run in runs))
        if name == "seed" and len(have) < len(wanted):
            smaller.append(f"{len(have)} seed{'s' * (len(have) > 1)} instead of {len(wanted)}")
        elif name != "seed" and (missing := [v for v in wanted if v not in have]):
            smaller.append(f"no {name.replace('_', ' ')} {', '.join(map(heading, missing))}")
        if name != "seed" and (more := [v for v in have if v not in wanted]):
            other.append(f"{name.replace('_', ' ')} {', '.join(map(text, more))} besides")
    other += [f"{name} read from a folder of images" for name in sorted(record.folders)]
    parts = [f"**Smaller than {whom}: {'; '.join(smaller)}.**"] if smaller else []
    parts += [f"Other than {whom}: {'; '.join(other)}."] if other else []
    parts = parts or [f"As {whom}, in all that can be set."]
    if record.machines:
        parts.append(f"Run on: {'; '.join(record.machines)}.")
    return " ".join(parts)


def markdown(record: Record, states: dict[str, State], picture: bool = True) -> str:
    """The whole page."""
    configuration = record.configuration
    found = cells(record, states)
    done = sum(state.kind == "finished" for state in states.values())
    parts = [f"# {configuration.title}", scale(record)]
    if configuration.about:
        parts.append(configuration.about)
    parts.append(
        f"{done} of {len(states)} runs are finished. Test accuracy of the trained networks in "
        "percent, mean ± standard deviation (over n - 1) of n seeds"
        + (", beside the paper's." if configuration.paper else ".")
    )
    parts.append(_table(record, found))
    if picture:
        parts.append(f"![{configuration.title}]({PICTURE})")
    holes = [
        f"* {name}: {state.words(run)}"
        for run in record.runs()
        for name, state in [(run.name, states[run.name])]
        if state.kind not in ("finished", "missing")
    ]
    if holes:
        parts.append("Not in the table, beside runs that have not begun:\n\n" + "\n".join(holes))
    parts += configuration.notes
    return "\n\n".join(parts) + "\n"


def layout(record: Record, found: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """The names of what goes down the table, and across it.

    What has one value in all cells is left out, but for the columns' names and one row's.
    """
    names = record.configuration.compared[:-1]
    columns = [name for name in record.configuration.columns]
    varied = [n for n in names if len({text(cell.keys[n]) for cell in found}) > 1]
    rows = [name for name in names if name in varied and name not in columns]
    return rows or ["blocks"] if "blocks" not in columns else rows, columns


def _table(record: Record, found: Sequence[Cell]) -> str:
    rows, columns = layout(record, found)

    def values(cell: Cell, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(heading(cell.keys[name]) for name in names)

    by_place = {(values(cell, rows), values(cell, columns)): cell for cell in found}
    across = list(dict.fromkeys(values(cell, columns) for cell in found))
    beside = {head: any(c.paper for (_, h), c in by_place.items() if h == head) for head in across}
    header = [name.replace("_", " ") for name in rows]
    for head in across:
        header += [", ".join(head), *(["paper"] if beside[head] else [])]
    lines = [header, ["---"] * len(header)]
    for row in dict.fromkeys(values(cell, rows) for cell in found):
        line = list(row)
        for head in across:
            cell = by_place.get((row, head))
            line.append(cell.words if cell else "–")
            line += [cell.published if cell else ""] if beside[head] else []
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_csv(record: Record, states: dict[str, State]) -> str:
    """A line for every cell."""
    names = record.configuration.compared[:-1]
    header = [*names, "n", "of", "mean", "deviation", "paper", "paper_deviation", "holes"]
    lines = []
    for cell in cells(record, states):
        n, paper = len(cell.accuracies), cell.paper
        kinds = sorted(state.kind for state in cell.holes.values())
        lines.append(
            [
                *(text(cell.keys[name]) for name in names),
                n,
                n + len(cell.holes),
                _number(cell.mean),
                _number(cell.deviation),
                _number(paper.accuracy if paper else None),
                _number(paper.deviation if paper else None),
                " ".join(kinds),
            ]
        )
    return _csv(header, lines)


def runs_csv(record: Record, states: dict[str, State]) -> str:
    """A line for every run."""
    names = record.configuration.compared
    header = ["run", *names, "state", "epochs", "of", "accuracy", "seconds_per_epoch", "reason"]
    lines = []
    for run in record.runs():
        state = states[run.name]
        accuracy = None if state.accuracy is None else 100 * state.accuracy
        lines.append(
            [
                run.name,
                *(text(run.keys[name]) for name in names),
                state.kind,
                state.epochs,
                run.options.optim.epochs,
                _number(accuracy),
                _number(state.seconds),
                state.reason,
            ]
        )
    return _csv(header, lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _csv(header: Sequence[Any], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return out.getvalue()


def write(folder: Path, record: Record, states: dict[str, State]) -> str:
    """Write all into the experiment's folder; returns the Markdown."""
    from mocapsnet.train.experiments.picture import draw

    page = markdown(record, states)
    write_whole(folder / TABLE, page)
    write_whole(folder / CSV, table_csv(record, states))
    write_whole(folder / RUNS, runs_csv(record, states))
    write_whole(folder / PICTURE, draw(record, cells(record, states)))
    return page
