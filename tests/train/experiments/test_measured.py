"""Experiments that are benchmarks."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mocapsnet.train.experiments import configuration, schedule

from .helpers import Command, own

# Measures nothing: writes what a benchmark would.
BENCHMARK = """
import json, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output") + 1])
blocks = [int(w) for w in words[words.index("--blocks") + 1 : words.index("--batch")]]
if "depth" in words and not pathlib.Path("repaired").exists():
    sys.exit("depth: relative error 1; nothing was measured")
rows = [
    {"candidate": f"{model}, {kind}", "blocks": n, "peak_bytes": (base + 2 * n) * 1e6,
     "kept_bytes": n * base * 1e6}
    for model, kind, base in (("ResCapsNet", "published", 100), ("ResCapsNet", "fused", 10),
    ("MoCapsNet", "published", 90), ("MoCapsNet", "fused, reversible", 9)) for n in blocks
]
found = {"machine": {"device": "a machine", "cuda": None}}
found["settings"] = {"blocks": blocks, "batch": 128}
if "memory" in words:
    found["settings"] |= {"images": words[words.index("--images") + 1], "channels": 256}
(out / f"{words[1]}.json").write_text(json.dumps(found | {"rows": rows}))
(out / f"{words[1]}.md").write_text("What " + words[1] + " found")
"""


def test_memory_and_time_are_measured_by_benchmarks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("fake.py").write_text(BENCHMARK)
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, "fake.py"))
    code, output, errors = command("experiment", "figure3", "--dry-run")
    assert code == 0 and output.count("not run") == 3, errors
    words = ["experiment", "figure3", "--blocks", "2", "1", "4"]
    code, output, errors = command(*words)
    assert code == 1 and "1 of 3 benchmarks failed, depth: depth: relative error 1" in errors
    page = Path("runs/figure3/table.md").read_text()
    assert "blocks 1 2 4 instead of 1 2 3 4 5 6 7 8" in page.splitlines()[2]
    assert "2 of 3 benchmarks are finished" in page and "* depth: failed: depth: relative" in page
    paper = "4,462 | 4,612 | 4,858 | 5,199 | 5,204 | 5,502 | 5,572 | 5,786 | 190.5 | – |\n"
    assert f"| MNIST | ResCapsNet | the paper | {paper}" in page
    assert (
        "| MNIST | ResCapsNet | published | 102 | 104 | – | 108 | – | – | – | – | 2.0 | 100.0 |"
        in page
    )
    assert "| SVHN | MoCapsNet | fused, reversible | 11 | 13 | – | 17 " in page
    assert page in output and "## memory-cifar10\n\nWhat memory found" in page

    Path("repaired").touch()
    code, output, errors = command(*words)
    assert code == 0 and output.count("finished before") == 2, errors
    assert "3 of 3 benchmarks are finished" in Path("runs/figure3/table.md").read_text()
    code, _, errors = command("experiment", "figure3")
    assert code == 2 and "memory-mnist holds results with other options (--blocks 1 2 4" in errors
    code, _, errors = command("experiment", "figure3", "--epochs", "2")
    assert code == 2 and "--epochs is for experiments that train; figure3 measures" in errors
    lines = list(csv.DictReader(Path("runs/figure3/table.csv").open()))
    assert len(lines) == 6 * 8 + 12 * 3
    code, output, _ = command("experiment", "figure3", "--report")
    assert code == 0 and "3 of 3" in output
    with Image.open("runs/figure3/table.png") as picture:
        assert picture.width > 1000
    # A GPU's figures are not mixed with a processor's.
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        code, _, errors = command(*words)
        assert code == 2 and "measured on a machine, a GPU asked for" in errors
        assert command(*words, "--device", "cpu")[0] == 0


def test_benchmarks_of_one_s_own_need_no_figures_of_a_paper(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("fake.py").write_text(BENCHMARK)
    Path("repaired").touch()
    monkeypatch.setattr(schedule, "PROGRAM", (sys.executable, "fake.py"))
    content = configuration.load(configuration.find("figure3"))
    del content["paper"]
    content["benchmarks"][0]["options"]["blocks"] = [4, 1, 4]
    own(content)
    code, output, errors = command("experiment", "own.json")
    assert code == 0 and "3 of 3 benchmarks are finished" in output, errors
    assert not Path("runs/own/table.png").exists()
    code, output, errors = command("experiment", "own.json")
    assert code == 0 and output.count("finished before") == 3, errors
    assert command("experiment", "own.json", "--report")[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmarks": []}, "benchmarks: must be a list of benchmarks, and is empty"),
        ({"benchmarks": [3]}, "benchmarks[0]: must be an object of name, benchmark, options"),
        ({"grid": {}}, "grid: unknown; there are title, about, notes, benchmarks"),
        ({"paper": [{"model": "x"}]}, "paper[0]: must be an object of dataset, benchmark, model"),
        ({"compare": {}}, "paper[0]: names a benchmark or a model that is not there"),
    ],
)
def test_one_clear_error_for_a_wrong_file_of_benchmarks(
    change: dict[str, Any], said: str, command: Command
) -> None:
    own(configuration.load(configuration.find("figure3")) | change)
    code, _, errors = command("experiment", "own.json", "--dry-run")
    assert code == 2 and f"own.json: {said}" in errors and errors.count("\n") == 1, errors
