"""`mocapsnet compare RUN...`: what runs differ in, how they started, and how far they have got."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mocapsnet.train import start
from mocapsnet.train.errors import InputError
from mocapsnet.train.metrics import Row, judged_by, read_rows
from mocapsnet.train.option_values import flag, flat
from mocapsnet.train.options import CompareOptions
from mocapsnet.train.run_folder import read_config

# Options that say where and how fast, not what; and the recipe, whose options stand for themselves.
UNTOLD = {"data.data_dir", "data.download", "machine.device", "recipe", "out", "resume"}

Table = list[list[str]]


def compare(options: CompareOptions) -> None:
    """Print the tables in Markdown. Raises: InputError if a folder is none that a run left."""
    if not options.runs:
        raise InputError("give a run folder, or several")
    runs = [Path(run) for run in options.runs]
    names = short(runs)
    configs = [flat(read_config(run)) for run in runs]
    starts = [read_start(run) for run in runs]
    rows = [read_rows(run).rows for run in runs]
    lengths = by_layer(names, starts, lambda row: row.get("out_length"))
    gradients = by_layer(names, starts, lambda row: row["gradient_rms"])
    tables = {
        "Options that differ": differences(names, configs),
        "Margin loss (of cnn and resnet18: cross-entropy) per image and training accuracy, at the "
        f"start and after so many steps (means of {start.WINDOW})": losses(names, starts),
        "Accuracy after each epoch": accuracies(names, rows),
        "Mean length of the capsules that a layer makes, at the start": lengths,
        "Root mean square of the gradient of a layer's weights, at the start": gradients,
    }
    for title, table in tables.items():
        if len(table) > 1:
            print(f"{title}\n\n{markdown(table)}\n")
    if options.picture is not None:
        from mocapsnet.train.pictures.compared import draw

        curves = [[(row["epoch"], accuracy(row)) for row in found] for found in rows]
        draw(Path(options.picture), names, starts, curves, lengths, gradients)
        print(f"drawn in {options.picture}")


def short(runs: Sequence[Path]) -> list[str]:
    """What to call the runs: the names of their folders, or whole paths where two have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_start(run: Path) -> dict[str, Any]:
    """RUN/start.json, or {} where there is none. Raises: InputError if it is damaged."""
    path = run / start.FILE
    try:
        content = json.loads(path.read_bytes())
        by_layer([""], [content], lambda row: row["gradient_rms"])
        losses([""], [content])
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return dict(content)


def differences(names: Sequence[str], configs: Sequence[dict[str, Any]]) -> Table:
    """A row for each run, a column for each option whose values are not all one."""
    differ = [
        name
        for name in configs[0]
        if name not in UNTOLD and any(config[name] != configs[0][name] for config in configs)
    ]
    if not differ:
        return []
    return [
        ["run", *(flag(name) for name in differ)],
        *(
            [run, *(text(config[name]) for name in differ)]
            for run, config in zip(names, configs, strict=True)
        ),
    ]


def losses(names: Sequence[str], starts: Sequence[dict[str, Any]]) -> Table:
    """A row for each run, a column for the start and each of the counts of steps."""
    counts = sorted({int(n) for found in starts for n in found.get("losses", {})})
    table = [["run", "0", *(f"{n:,}" for n in counts)]]
    for run, found in zip(names, starts, strict=True):
        after = [found.get("losses", {}).get(str(n)) for n in counts]
        cells = [f"{f['margin']:.3g} ({f['accuracy']:.1%})" if f else "" for f in (found, *after)]
        table.append([run, *cells])
    return table if any(starts) else []


def accuracies(names: Sequence[str], rows: Sequence[list[Row]]) -> Table:
    """A row for each run, a column for each epoch that any has done; of the test images, or of
    those held out for validation where there are some."""
    epochs = sorted({row["epoch"] for found in rows for row in found})
    table = [["run", "of the images for", *map(str, epochs)]]
    for run, found in zip(names, rows, strict=True):
        by_epoch = {row["epoch"]: f"{accuracy(row):.2%}" for row in found}
        split = judged_by(found[-1]) if found else ""
        table.append([run, split, *(by_epoch.get(epoch, "") for epoch in epochs)])
    return table if epochs else []


def accuracy(row: Row) -> float:
    """Of the images held out for validation, if there are some, else of the test images."""
    return float(row[f"{judged_by(row)}_accuracy"])


def by_layer(
    names: Sequence[str],
    starts: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float | None],
) -> Table:
    """A row for each layer that has the value in any run, a column for each run."""
    columns = []
    for found in starts:
        layers = found.get("layers", [])
        texts = [number(value(row)) for row in layers]
        columns.append(dict(zip(titles([row["layer"] for row in layers]), texts, strict=True)))
    order = {"convolution": 0, "first": 1, "hidden": 2, "classes": 3, "decoder": 4}
    known = {title for column in columns for title, text in column.items() if text}
    lines = sorted(known, key=lambda t: (order.get(t.split()[0], 5), len(t), t))
    return [
        ["layer", *names],
        *([title, *(column.get(title, "") for column in columns)] for title in lines),
    ]


def titles(layers: Sequence[str]) -> list[str]:
    """What layers are called in the tables, the same whatever the stack is: "hidden 3"."""
    kinds = {
        "convolutions": "convolution",
        "stack": "hidden",
        "stages": "hidden",  # of a convolutional network
        "decoder": "decoder",
    }
    counts: dict[str, int] = {}
    found = []
    for name in layers:
        kind = kinds.get(name.split(".")[0])
        if kind is None:
            found.append({"first": "first capsules", "last": "classes"}.get(name, name))
            continue
        counts[kind] = counts.get(kind, 0) + 1
        found.append(f"{kind} {counts[kind]}")
    return found


def text(value: Any) -> str:
    """The value of an option."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def number(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}"


def markdown(table: Table) -> str:
    """A Markdown table whose columns are as wide as they need to be; the first row is its head."""
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
