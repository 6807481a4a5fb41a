"""Tables and pictures of finished runs and of holes."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest
from PIL import Image

from mocapsnet.train.experiments import record, runs, table
from mocapsnet.train.experiments.picture import draw, figure
from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.states import State

from .helpers import GRID, Command, own, parsed, shipped

CELLS = {
    "title": "A title",
    "grid": GRID | {"model": ["rescapsnet", "mocapsnet"], "blocks": [2, 1], "seed": [0, 1, 2]},
    "options": {"epochs": 3, "channels": 64},
    "scale": {"channels": 256, "init": "paper"},
    "paper": [
        {"model": "mocapsnet", "blocks": 1, "accuracy": 97.5, "deviation": 0.25},
        {"model": "mocapsnet", "blocks": 2, "accuracy": 1, "shown": "≈ 1.00"},
    ],
    "notes": ["A note."],
}


@pytest.fixture
def fabricated() -> tuple[Record, dict[str, State]]:
    """Six runs of one network finished, two of another, and one hole of every kind."""
    found = parsed(CELLS)
    made = Record(found, {"epochs": 2, "limit": 1000}, {}, runs.select(found, {}), ["a CPU"])
    every = {}
    for run in made.runs():
        model, blocks, seed = (run.keys[name] for name in ("model", "blocks", "seed"))
        state = State("finished", 2, 0.9 + 0.01 * seed + 0.001 * blocks, 1.5)
        if model == "rescapsnet" and blocks == 1:
            state = [state, State("failed", 1, reason="no memory"), State("missing")][seed]
        elif model == "rescapsnet":
            state = State("interrupted", 1, 0.5) if seed else State("missing")
        every[run.name] = state
    return made, every


def test_a_table_is_exact(fabricated: tuple[Record, dict[str, State]]) -> None:
    page = table.markdown(*fabricated)
    assert page.splitlines()[2] == (
        "**Smaller than the paper: 1,000 training images at most instead of all; 64 channels "
        "instead of 256; 2 epochs instead of 3.** Other than the paper: --init length instead of "
        "paper. Run on: a CPU."
    )
    assert "\n7 of 12 runs are finished. " in page
    assert (
        "| blocks | digits, ResCapsNet | digits, MoCapsNet | paper |\n"
        "| --- | --- | --- | --- |\n"
        "| 1 | 90.10 (n = 1 of 3) | 91.10 ± 1.00 (n = 3) | 97.50 ± 0.25 |\n"
        "| 2 | – (interrupted, not run) | 91.20 ± 1.00 (n = 3) | ≈ 1.00 |\n"
    ) in page
    assert "* digits-rescapsnet-blocks-1-seed-1: failed: no memory\n" in page
    assert "* digits-rescapsnet-blocks-2-seed-1: interrupted after 1 of 2 epochs\n" in page
    assert page.count("* digits") == 3 and page.endswith("\n\nA note.\n")

    lines = list(csv.DictReader(io.StringIO(table.table_csv(*fabricated))))
    assert [line["blocks"] for line in lines] == ["1", "2", "1", "2"]
    assert lines[0] == {
        "dataset": "digits",
        "model": "rescapsnet",
        "blocks": "1",
        "n": "1",
        "of": "3",
        "mean": "90.1000",
        "deviation": "",
        "paper": "",
        "paper_deviation": "",
        "holes": "failed missing",
    }
    assert [lines[2][name] for name in ("mean", "deviation", "paper", "paper_deviation")] == [
        "91.1000",
        "1.0000",
        "97.5000",
        "0.2500",
    ]
    each = list(csv.DictReader(io.StringIO(table.runs_csv(*fabricated))))
    assert len(each) == 12
    (failed,) = (line for line in each if line["state"] == "failed")
    assert (failed["run"], failed["epochs"], failed["of"], failed["reason"]) == (
        "digits-rescapsnet-blocks-1-seed-1",
        "1",
        "2",
        "no memory",
    )


def test_a_report_is_written_of_the_record_alone(
    fabricated: tuple[Record, dict[str, State]], command: Command
) -> None:
    made, _ = fabricated
    folder = Path("runs/own")
    folder.mkdir(parents=True)
    record.write(folder, made)
    again = record.read(folder)
    assert again is not None and dataclasses.replace(again, commands=[]) == made
    own(CELLS)
    code, output, errors = command("experiment", "own.json", "--report")
    assert code == 0, errors
    assert "0 of 12 runs are finished" in output and "2 epochs instead of 3" in output
    assert (folder / "table.md").read_text() in output
    with Image.open(folder / "table.png") as picture:
        assert picture.width > 400
    assert command("experiment", "table1", "--report")[0] == 2


def test_cells_are_drawn_against_blocks_or_below_one_another(
    fabricated: tuple[Record, dict[str, State]],
) -> None:
    made, every = fabricated
    (axes,) = figure(made, table.cells(made, every)).axes
    assert axes.get_xlabel() == "blocks of two capsule layers"
    handles, labels = axes.get_legend_handles_labels()
    assert sorted(labels) == ["MoCapsNet", "MoCapsNet, the paper", "ResCapsNet"]
    ours = handles[labels.index("MoCapsNet")].lines[0]
    assert list(ours.get_ydata()) == pytest.approx([91.1, 91.2])
    without = every | {run.name: State("missing") for run in made.runs() if run.keys["blocks"] == 1}
    (axes,) = figure(made, table.cells(made, without)).axes
    handles, labels = axes.get_legend_handles_labels()
    assert math.isnan(handles[labels.index("MoCapsNet")].lines[0].get_ydata()[0])
    found = shipped("table5")
    made = Record(found, {}, {}, runs.select(found, {}))
    every = {run.name: State("missing") for run in made.runs()}
    (axes,) = figure(made, table.cells(made, every)).axes
    assert axes.get_yticklabels()[1].get_text() == "lr 0.01, capsules 32, batch size 64"
    assert draw(made, table.cells(made, every)).startswith(b"\x89PNG")
