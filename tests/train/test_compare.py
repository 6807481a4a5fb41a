"""`mocapsnet compare`: its tables hold what start.json, config.json and metrics.jsonl hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mocapsnet.train import start
from mocapsnet.train.pictures import compared, sheet

from .helpers import rows

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


def tables(output: str) -> dict[str, list[list[str]]]:
    """The cells of every table, by its title's first word."""
    parts = [part for part in output.split("\n\n") if part.strip()]
    return {
        title.split()[0]: [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in table.splitlines()
            if not line.startswith("|-")
        ]
        for title, table in zip(parts[::2], parts[1::2], strict=True)
    }


def test_accuracies_are_of_the_images_that_are_named(train: Train, command: Command) -> None:
    train("a", "--epochs", "1")
    b = train("b", "--epochs", "1", "--validation-share", "0.25")
    train("c", "--epochs", "1")
    (Path("c") / "metrics.jsonl").unlink()
    code, output, errors = command("compare", "a", "b", "c")
    assert code == 0, errors
    ((_, *found),) = [tables(output)["Accuracy"]]
    assert [line[1] for line in found] == ["test", "validation", ""]
    assert found[1][2] == f"{rows(b)[0]['validation_accuracy']:.2%}" and found[2][2] == ""


def test_tables(train: Train, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "STEPS", (2, 5))
    a = train("a", "--epochs", "1", "--init", "paper", "--decoder", "8", "4")
    b = train("b", "--epochs", "2", "--blocks", "2", "--model", "rescapsnet")
    code, output, errors = command("compare", "a", "b")
    assert code == 0, errors
    found = tables(output)
    assert found["Options"] == [
        ["run", "--model", "--blocks", "--init", "--decoder", "--epochs"],
        ["a", "mocapsnet", "1", "paper", "8 4", "1"],
        ["b", "rescapsnet", "2", "length", "16", "2"],
    ]
    ours = [json.loads((run / "start.json").read_text()) for run in (a, b)]

    def loss(numbers: dict[str, float]) -> str:
        return f"{numbers['margin']:.3g} ({numbers['accuracy']:.1%})"

    assert found["Margin"] == [
        ["run", "0", "2", "5"],
        ["a", loss(ours[0]), loss(ours[0]["losses"]["2"]), ""],
        ["b", *(loss(n) for n in (ours[1], *ours[1]["losses"].values()))],
    ]
    assert found["Accuracy"] == [
        ["run", "of the images for", "1", "2"],
        *(
            [run.name, "test", *(f"{row['test_accuracy']:.2%}" for row in rows(run)), *[""] * rest]
            for run, rest in ((a, 1), (b, 0))
        ),
    ]
    hidden = [f"hidden {n}" for n in (1, 2, 3, 4)]
    assert [line[0] for line in found["Mean"]] == ["layer", "first capsules", *hidden, "classes"]
    assert [line[0] for line in found["Root"]] == [
        *["layer", "convolution 1", "convolution 2", "first capsules", *hidden, "classes"],
        *["decoder 1", "decoder 2", "decoder 3"],
    ]
    for title, name in (("Mean", "out_length"), ("Root", "gradient_rms")):
        for column, content in enumerate(ours, start=1):
            values = [f"{row[name]:.3g}" for row in content["layers"] if name in row]
            assert [line[column] for line in found[title][1:] if line[column]] == values

    # The same numbers, drawn.
    figures: list[Figure] = []
    monkeypatch.setattr(compared, "save", lambda figure, path: figures.append(figure))
    code, _, errors = command("compare", "a", "b", "--picture", "c.png")
    assert code == 0, errors
    by_layer = [list(zip(*found[title], strict=True)) for title in ("Mean", "Root")]
    accuracies = [[run, *cells] for run, _, *cells in found["Accuracy"]]
    drawn = [found["Margin"], accuracies, *by_layer]
    for axes, (_, *table) in zip(figures[0].axes, drawn, strict=True):
        for line, (_, *cells) in zip(axes.lines, table, strict=False):
            shown = [float(cell.split()[0].rstrip("%")) for cell in cells if cell]
            assert line.get_ydata() == pytest.approx(shown, rel=5e-3)
    for run, content in zip((a, b), ours, strict=True):  # not far enough for the first losses
        (run / "start.json").write_text(json.dumps(content | {"losses": {}}))
    assert command("compare", "a", "b", "--picture", "c.png")[0] == 0
    assert [len(figure.axes) for figure in figures] == [4, 2]
    monkeypatch.setattr(compared, "save", sheet.save)
    code, _, errors = command("compare", "a", "b", "--picture", "no/c.png")
    assert code == 2 and "no/c.png cannot be written" in errors and errors.count("\n") == 1

    # A run from before there was such a file, alone: there is nothing to compare, but epochs.
    (a / "start.json").unlink()
    code, output, errors = command("compare", "a")
    assert code == 0, errors
    assert list(tables(output)) == ["Accuracy"]
    for content in ("[]", "{", '{"layers": [{"layer": "first"}]}', '{"loss": 1}'):
        (a / "start.json").write_text(content)
        code, _, errors = command("compare", "a", "b")
        assert code == 2 and "a/start.json is damaged: " in errors and errors.count("\n") == 1


def test_layers_are_called_alike_whatever_the_stack_is() -> None:
    from mocapsnet.train.compare import by_layer

    names = {
        "a": ["convolutions.0", "first", *(f"stack.layers.{n}" for n in range(12)), "last"],
        "b": ["first", "stack.blocks.0.layers.0", "stages.0.layers.1", "last", "other"],
    }
    starts = [
        {"layers": [{"layer": name, "value": n} for n, name in enumerate(layers)]}
        for layers in names.values()
    ]
    table = by_layer(list(names), starts, lambda row: row["value"])
    assert [line[0] for line in table] == [
        *["layer", "convolution 1", "first capsules"],
        *(f"hidden {n}" for n in range(1, 13)),
        *["classes", "other"],
    ]
    assert [line[2] for line in table[1:] if line[2]] == ["0", "1", "2", "3", "4"]


def test_what_is_no_run(command: Command) -> None:
    code, _, errors = command("compare")
    assert code == 2 and "give a run folder, or several" in errors
    code, _, errors = command("compare", "nowhere")
    assert code == 2 and "nowhere does not exist" in errors
