"""The page of several commands survives whatever a command does; tried without a GPU."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from mocapsnet.benchmarks import gpu_report, suite
from mocapsnet.benchmarks.shared import parts
from mocapsnet.benchmarks.shared.parts import Part, run_all
from mocapsnet.cli import main as mocapsnet

ROOT = Path(__file__).resolve().parents[1]


def python(title, code, limit=60.0, **options):
    return Part(title, f"python {title}", (sys.executable, "-c", code), limit, **options)


WRITES = """
import pathlib
folder = pathlib.Path({!r})
(folder / "good.md").write_text("| a table |")
(folder / "good.png").write_bytes(b"picture")
(folder / "good_more.png").write_bytes(b"picture")
print("not shown")
"""
WAITS = """
import time
print("so far", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("summed up", flush=True)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("started", flush=True)
time.sleep(60)
"""


def test_page_of_everything_that_can_happen(tmp_path, monkeypatch, capsys):
    interrupt = parts.interrupt
    monkeypatch.setattr(parts, "interrupt", lambda process: interrupt(process, grace=3))
    (tmp_path / "lost.md").write_text("an old result")
    missing = Part("Missing", "nothing", (str(tmp_path / "no such program"),), 60)
    sections = [
        python("Good", WRITES.format(str(tmp_path)), results="good"),
        python("Text", "print('first\\nlast')", tail=1),
        python("Bad", "print('reason'); raise SystemExit(3)", results="lost"),
        python("Slow", WAITS, limit=3.0),
        python("Stubborn", STUBBORN, limit=3.0),
        missing,
    ]
    start = time.monotonic()
    outcomes = run_all(sections, tmp_path, "# Heading", {}, 120)
    assert time.monotonic() - start < 40
    assert [outcome.error for outcome in outcomes[:5]] == [
        None,
        None,
        "failed with exit code 3",
        "stopped after 3 s",
        "stopped after 3 s",
    ]
    assert outcomes[5].error.startswith("did not start")
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Heading\n\n**Not everything ran through: see Bad, Slow, Stubborn, ")
    assert "Still to run" not in page and "not shown" not in page and "first" not in page
    assert "| a table |\n\n![Good](good.png)\n\n![Good](good_more.png)" in page
    assert "```text\nlast\n```" in page
    assert "**Failed with exit code 3.** Its last lines:\n\n```text\nreason\n```" in page
    assert "so far\nsummed up" in page and "started" in page
    assert "an old result" not in page and not (tmp_path / "lost.md").exists()
    assert "summed up" in capsys.readouterr().out


def test_time_runs_out(tmp_path):
    sections = [python("First", WAITS, limit=60.0), python("Second", "print(1)")]
    first, second = run_all(sections, tmp_path, "# Heading", {}, 1)
    assert first.error == "stopped after 1 s" and second.error == "not run: no time was left"
    page = (tmp_path / "README.md").read_text()
    assert "## Second\n\n`python Second`, 0 s\n\nnot run: no time was left" in page


def test_a_part_can_be_interrupted_where_this_process_cannot(tmp_path):
    """As when a script has started it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (outcome,) = run_all([python("Slow", WAITS, limit=3.0)], tmp_path, "# Heading", {}, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.output == "so far\nsummed up\n"


def test_page_exists_while_parts_run(tmp_path):
    readme = tmp_path / "README.md"
    code = f"import pathlib; print(pathlib.Path({str(readme)!r}).read_text())"
    sections = [python("First", "pass"), python("Second", code), python("Third", "pass")]
    outcomes = run_all(sections, tmp_path, "# Heading", {}, 60)
    assert "Still to run: Second, Third." in outcomes[1].output


def test_environment_reaches_the_parts(tmp_path):
    part = python("Part", "import os; print(os.environ['TRITON_INTERPRET'])")
    (outcome,) = run_all([part], tmp_path, "", {"TRITON_INTERPRET": "7"}, 60)
    assert outcome.output == "7\n"


def test_parts_of_the_true_report_fit_into_ten_minutes(tmp_path, capsys):
    true, dry = (gpu_report.parts(tmp_path, tmp_path, dry) for dry in (False, True))
    assert [part.title for part in true] == [part.title for part in dry]
    assert sum(part.limit for part in true) <= 9.5 * 60
    assert {"Verification", "Launches", "Plans", "Graph and plans"} <= {p.title for p in true}
    for part in true:
        assert "cpu" not in part.shown
        if part.results:  # the options exist: the parser gets past them to --help
            words = ["cpu" if word == "cuda" else word for word in part.command[3:]]
            assert part.command[1:3] == ("-m", "mocapsnet")
            with pytest.raises(SystemExit) as left:
                mocapsnet([*words, "--help"])
            out = capsys.readouterr()
            assert left.value.code == 0 and part.results in out.out, out.err
    tuned = [part for part in true if dict(part.environment).get("MOCAPSNET_TUNED")]
    assert [part.title for part in tuned] == ["Graph and plans"]
    assert f"--table {tmp_path}/plans.json" in next(p.shown for p in true if p.title == "Plans")


def test_a_part_s_own_environment_wins(tmp_path):
    code = "import os; print(os.environ['A'], os.environ['B'])"
    part = python("Part", code, environment=(("A", "own"),))
    (outcome,) = run_all([part], tmp_path, "", {"A": "all", "B": "all"}, 60)
    assert outcome.output == "own all\n"


def test_a_failed_part_shows_as_much_as_it_was_to_show(tmp_path):
    code = "print(*range(100), sep='\\n'); raise SystemExit(1)"
    run_all([python("Bad", code, tail=90)], tmp_path, "", {}, 60)
    page = (tmp_path / "README.md").read_text()
    assert "```text\n10\n11\n" in page


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no NVIDIA GPU .* DRY_RUN=1"):
            gpu_report.main([])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="in the repository's folder"):
        gpu_report.main(["--dry-run"])


@pytest.mark.slow
def test_dry_run(tmp_path, monkeypatch):
    """Without the doctor, who has tests of its own, and the second training."""
    monkeypatch.chdir(ROOT)
    left_out, every = {"Verification", "Training on digits, eagerly"}, gpu_report.parts

    def some(*args):
        return [part for part in every(*args) if part.title not in left_out]

    monkeypatch.setattr(gpu_report, "parts", some)
    gpu_report.main(["--dry-run", "--output", str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Dry run on a CPU: these figures mean nothing\n\n## Machine")
    for part in gpu_report.parts(tmp_path, tmp_path, True):
        assert f"## {part.title}\n" in page
        if part.results:
            assert (tmp_path / f"{part.results}.csv").exists()
    assert "| on_chip_forward_kernel [4] |" in page and "bound by" in page
    assert "| momentum (2, 2, 2, 2, 2), 2 layers, " in page
    assert "--graph on: a CUDA graph needs a CUDA device" in page
    assert json.loads((tmp_path / "plans.json").read_text())["margin"] > 0
    assert "triton" in (tmp_path / "routing.csv").read_text()
    assert " passed" in page and "test loss" in page and "run-auto holds:" in page
    assert "einsum, compiled" in (tmp_path / "routing.csv").read_text()


def test_report_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="Machine: not run: no time was left"):
        gpu_report.main(["--dry-run", "--minutes", "0", "--output", str(tmp_path)])
    assert (
        "Not everything ran through: see Machine, Verification, Tests, "
        in (tmp_path / "README.md").read_text()
    )


def test_what_is_kept_is_shown_and_not_run(tmp_path):
    (tmp_path / "kept.md").write_text("| from before |")
    kept = python("Kept", "raise SystemExit(1)", results="kept")
    run_all([kept, python("New", "pass")], tmp_path, "# Heading", {}, 60, keep=[kept])
    page = (tmp_path / "README.md").read_text()
    assert "## Kept\n\n`python Kept`\n\n| from before |\n\n## New\n\n`python New`, 0 s" in page


def test_suite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "NAMES", ("overhead", "machine"))

    def small(title, name, options, folder, limit):
        code = "print(1)" if name == "overhead" else "raise SystemExit(1)"
        return python(title, code)

    monkeypatch.setattr(suite, "benchmark", small)
    with pytest.raises(SystemExit) as left:
        suite.main(["--device", "cpu", "--output", str(tmp_path)])
    assert left.value.code == 1
    assert "failed with exit code 1" in (tmp_path / "README.md").read_text().lower()
