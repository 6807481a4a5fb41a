"""Experiments' files: the paper's, and mistakes in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mocapsnet.train.experiments import configuration

from .helpers import GRID, OWN, Command, own, runs_of, shipped


def test_the_papers_tables() -> None:
    """Section 4.1 and the tables: how many runs, of what, and some of the numbers beside."""
    counts = {name: len(runs_of(shipped(name))) for name in ("table1", "table2", "table3")}
    others = ("table5", "deep")
    counts |= {name: len(runs_of(shipped(name))) for name in others}
    assert counts == {
        "table1": 2 * 2 * 8 * 3,
        "table2": 2 * 2 * 8 * 3,
        "table3": 2 * 3 * 4 * 3,
        "table5": 2 * 6 * 3,
        "deep": 1,
    }
    for name, epochs in {"table1": {30, 60}, "table2": {60}, "table5": {100}}.items():
        assert {run.options.optim.epochs for run in runs_of(shipped(name))} == epochs
    for run in runs_of(shipped("table1")):
        optim, model = run.options.optim, run.options.model
        assert (optim.optimizer, optim.lr, optim.batch_size) == ("adam", 1e-3, 128)
        assert (model.channels, model.capsules, model.iterations) == (256, 32, 3)
        assert optim.epochs == (30 if run.options.data.dataset == "mnist" else 60)
    rates = {(r.options.optim.optimizer, r.options.optim.lr) for r in runs_of(shipped("table3"))}
    assert rates == {("adam", 1e-3), ("ranger21", 1e-2)}

    def paper(name: str, **keys: Any) -> float:
        (entry,) = (e for e in shipped(name).paper if e.keys == keys)
        return entry.accuracy

    assert paper("table1", dataset="mnist", model="mocapsnet", blocks=7) == 99.54
    assert paper("table1", dataset="svhn", model="rescapsnet", blocks=4) == 91.87
    assert paper("table2", dataset="cifar100", model="mocapsnet", blocks=8) == 43.48
    assert [len(shipped(n).paper) for n in counts] == [32, 32, 24, 12, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": 3}, "title: must be a text of one line"),
        ({"tilte": "x"}, "tilte: unknown; there are title, about"),
        ({"grid": None}, "grid: must be an object, not None"),
        ({"grid": {"dataset": ["digits"]}}, "grid.model: is missing"),
        ({"grid": GRID | {"seed": 0}}, "grid.seed: must be a list of values, not 0"),
        ({"grid": GRID | {"seed": []}}, "grid.seed: must be a list of values, not []"),
        ({"grid": GRID | {"seed": ["a"]}}, "grid.seed[0] is 'a', but must be an integer"),
        ({"grid": GRID | {"seed": [1, 1]}}, "grid.seed[1]: 1 stands there twice"),
        ({"grid": GRID | {"batch-size": [1]}}, "grid.batch-size[0]: no option of mocapsnet train"),
        ({"cases": {}}, "cases: must be a list, not {}"),
        ({"cases": [3]}, "cases[0]: must be an object of options, not 3"),
        ({"cases": [{"name": "a"}, {"lr": 1}]}, "cases[1]: all cases must have a name, or none"),
        ({"cases": [{"name": 1, "lr": 1}]}, "cases[0].name: must be a text, not 1"),
        (
            {"cases": [{"name": "a b", "lr": 1}, {"name": "a/b", "lr": 2}]},
            "cases[1]: 'a-b' stands there twice",
        ),
        ({"cases": [{"name": "/", "lr": 1}]}, "cases[0].name: must have letters or digits"),
        ({"cases": [{"seed": 1}]}, "cases[0].seed: stands in the grid as well"),
        ({"options": {"lr": "fast"}}, "options.lr is 'fast', but must be a number"),
        ({"where": [{"if": {}}]}, 'where[0]: must be {"if": {...}, "then": {...}}'),
        ({"where": [{"if": {"lr": 1}, "then": {}}]}, "where[0].if.lr: must be one of dataset,"),
        ({"columns": ["seed"]}, "columns: 'seed' is nothing that runs differ in"),
        ({"paper": [{"blocks": 1}]}, "paper[0].accuracy: must be a number, not None"),
        ({"paper": [{"blocks": 9, "accuracy": 1}]}, "paper[0]: is for none of the runs"),
        (
            {"paper": [{"blocks": 1, "accuracy": 1}, {"accuracy": 1}]},
            "paper[1]: is for the cells of paper[0] too",
        ),
        ({"scale": {"lrr": 1}}, "scale.lrr: no option of mocapsnet train"),
        ({"notes": [1]}, "notes[0]: must be a text, not 1"),
    ],
)
def test_one_clear_error_for_a_wrong_file(
    change: dict[str, Any], said: str, command: Command
) -> None:
    own(OWN | change)
    code, _, errors = command("experiment", "own.json", "--dry-run")
    assert code == 2 and f"own.json: {said}" in errors and errors.count("\n") == 1, errors


def test_a_file_that_is_no_json(command: Command) -> None:
    for content, said in {
        '{"title": "x",}': "own.json is not JSON: ",
        "[]": "own.json must hold an object, not []",
        '{"title": "x", "title": "y"}': "own.json: title stands twice in one object",
    }.items():
        Path("own.json").write_text(content)
        code, _, errors = command("experiment", "own.json")
        assert code == 2 and said in errors and errors.count("\n") == 1, errors


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "paper.md").read_text()
    content = json.loads(page.partition("```json\n")[2].partition("```")[0])
    mine = runs_of(configuration.parse(content, "own", "docs/paper.md"))
    assert len(mine) == 2 * 2 * 3
    assert {run.options.optim.epochs for run in mine if run.keys["blocks"] == 2} == {20}
