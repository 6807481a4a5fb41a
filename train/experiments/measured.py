"""Experiments that measure: benchmarks one after another, and their memory beside the paper's.

    benchmarks   [{"name": ..., "benchmark": ..., "options": {...}}, ...]: runs of `mocapsnet
                 benchmark`; the name is that of the folder of its results
    paper        [{"dataset": ..., "benchmark": NAME, "model": ..., "blocks": [...],
                 "megabytes": [...]}, ...]: the paper's numbers, and where ours are
    compare      {model: [candidate, ...]}: which of the benchmark's candidates stand beside them

title, about and notes are as in configuration.py. Benchmarks run one at a time, as they measure;
one that is finished with the same options is skipped.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from mocapsnet.train.errors import Failed, InputError, Interrupted
from mocapsnet.train.experiments import schedule
from mocapsnet.train.experiments.configuration import Reader
from mocapsnet.train.experiments.record import claimed
from mocapsnet.train.experiments.states import Failures, last_words
from mocapsnet.train.experiments.table import CSV, PICTURE, TABLE, heading
from mocapsnet.train.files import write_whole
from mocapsnet.train.options import ExperimentOptions
from mocapsnet.train.stopping import Stopper

LOG = "benchmark.log"


@dataclass(frozen=True)
class Benchmark:
    """One run of `mocapsnet benchmark`.

    Attributes:
        options: the file's, with those of the command line.
        paper: the file's.
    """

    name: str
    benchmark: str
    options: dict[str, Any]
    paper: dict[str, Any]

    def arguments(self, folder: Path, device: str | None) -> list[str]:
        """The words behind `mocapsnet` that run it."""
        words = ["benchmark", self.benchmark]
        for name, value in self.options.items():
            several = value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, several)]
        words += ["--device", device] if device else []
        return [*words, "--output", str(folder)]


@dataclass(frozen=True)
class Line:
    """Megabytes against blocks of one network: the paper's, or a candidate's."""

    dataset: str
    model: str
    whose: str
    megabytes: dict[int, float]
    kept: dict[int, float] = field(default_factory=dict)
    """Of it what blocks keep for backward; the paper does not say."""


@dataclass(frozen=True)
class Measured:
    """An experiment of benchmarks, as its file has it."""

    title: str
    about: str
    notes: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]
    paper: tuple[dict[str, Any], ...]
    compare: dict[str, list[str]]


def parse(content: dict[str, Any], path: Path, command: ExperimentOptions) -> Measured:
    """Check an experiment of benchmarks, and put the command line's options in.

    Raises: InputError naming the file, the first key that cannot be right, and why; or an option
        that benchmarks do not have.
    """
    reader = Reader(str(path))
    reader.known(content, "title about notes benchmarks paper compare".split(), "")
    title, about, notes = reader.texts(content)
    given = _given(command)
    benchmarks: list[Benchmark] = []
    for i, one in enumerate(reader.list(content, "benchmarks")):
        where = f"benchmarks[{i}]"
        _shape(reader, where, one, {"name": str, "benchmark": str, "options": dict})
        if one["name"] in {b.name for b in benchmarks} or "/" in one["name"]:
            raise reader.error(f"{where}.name", f"{one['name']!r} must be the name of a new folder")
        options = one["options"] | {k: v for k, v in given.items() if k in one["options"]}
        if isinstance(options.get("blocks"), list):  # as benchmarks keep them
            options["blocks"] = sorted(set(options["blocks"]))
        benchmarks.append(Benchmark(one["name"], one["benchmark"], options, one["options"]))
    if not benchmarks:
        raise reader.error("benchmarks", "must be a list of benchmarks, and is empty")
    names = {one.name for one in benchmarks}
    compare = reader.object(content, "compare")
    kinds: dict[str, type] = {
        "dataset": str,
        "benchmark": str,
        "model": str,
        "blocks": list,
        "megabytes": list,
    }
    for i, entry in enumerate(reader.list(content, "paper")):
        _shape(reader, f"paper[{i}]", entry, kinds)
        if entry["benchmark"] not in names or entry["model"] not in compare:
            raise reader.error(f"paper[{i}]", "names a benchmark or a model that is not there")
        if len(entry["blocks"]) != len(entry["megabytes"]):
            raise reader.error(f"paper[{i}]", "blocks and megabytes differ in length")
    return Measured(
        title, about, notes, tuple(benchmarks), tuple(content.get("paper", ())), compare
    )


def _shape(reader: Reader, where: str, content: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        raise reader.error(where, f"must be an object of {', '.join(kinds)}, not {content!r}")
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            raise reader.error(f"{where}.{name}", f"must not be {content[name]!r}")


def _given(command: ExperimentOptions) -> dict[str, Any]:
    """What a command line may change: blocks and channels."""
    others = {name: value for name, value in (command.train or {}).items() if name != "device"}
    for name in ("datasets", "models", "seeds", "epochs", "limit", "data_dir", "jobs"):
        if getattr(command, name) is not None:
            others[name] = getattr(command, name)
    if others or command.folders:
        name = next(iter(others), "folders").replace("_", "-")
        raise InputError(f"--{name} is for experiments that train; {command.name} measures")
    given: dict[str, Any] = {}
    if command.blocks is not None:
        given["blocks"] = sorted(set(command.blocks))
    if command.channels is not None:
        given["channels"] = command.channels
    for name, value in given.items():
        if not value or min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    return given


def experiment(content: dict[str, Any], path: Path, command: ExperimentOptions) -> None:
    """Run, list or report an experiment of benchmarks.

    Raises: InputError; Interrupted; Failed if benchmarks failed.
    """
    found, folder = parse(content, path, command), Path(command.out) / path.stem
    if command.report:
        if not folder.is_dir():
            raise InputError(f"{folder} holds no experiment; run it without --report first")
        return _show(found, folder)
    device = (command.train or {}).get("device", "auto")
    if command.dry_run:
        for one in found.benchmarks:
            print(f"{one.name:<16}{state(one, folder, device)}")
        print("no time is estimated: benchmarks measure themselves")
        return
    _refuse_others(found, folder, device)
    with claimed(folder):
        _run(found, folder, device)


def results(one: Benchmark, folder: Path) -> dict[str, Any] | None:
    """What a benchmark wrote; None if it did not."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / one.name / f"{one.benchmark}.json").read_bytes())
        if isinstance(found, dict):
            return found
    return None


def state(one: Benchmark, folder: Path, device: str | None = None) -> str:
    """finished, not run, failed with the reason, or what other options it ran with.

    Args:
        device: where it is asked for, as of --device; None: wherever it was.
    """
    found = results(one, folder)
    if found is not None:
        for name, value in one.options.items():
            then = found["settings"].get(name)
            if then != value:
                return f"other: --{name} {_words(then)} there, {_words(value)} asked for"
        then, now = found["machine"]["cuda"] is not None, torch.cuda.is_available()
        if device is not None and then != (now and device != "cpu"):
            where = "a GPU" if now and device != "cpu" else "a CPU"
            return f"other: measured on {found['machine']['device']}, {where} asked for"
        return "finished"
    reason = Failures(folder).reasons.get(one.name)
    return f"failed: {reason}" if reason else "not run"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse_others(found: Measured, folder: Path, device: str) -> None:
    for one in found.benchmarks:
        words = state(one, folder, device)
        if words.startswith("other: "):
            raise InputError(
                f"{folder / one.name} holds results with other options ({words[7:]}); give the "
                "same options again, or another --out"
            )


def _run(found: Measured, folder: Path, device: str) -> None:
    failures, failed = Failures(folder), list[str]()
    for one in found.benchmarks:
        if state(one, folder) == "finished":
            print(f"{one.name}: finished before")
            continue
        failures.note(one.name, None)
        print(f"{one.name}: started; its output is in {folder / one.name / LOG}", flush=True)
        started = time.monotonic()
        reason = _measure(one, folder / one.name, None if device == "auto" else device)
        if reason:
            failures.note(one.name, reason)
            failed.append(one.name)
        said = f"failed: {reason}" if reason else "finished"
        print(f"{one.name}: {said} ({schedule.clock(time.monotonic() - started)})", flush=True)
        write(found, folder)
    _show(found, folder)
    if failed:
        raise Failed(
            f"{len(failed)} of {len(found.benchmarks)} benchmarks failed, {failed[0]}: "
            f"{failures.reasons[failed[0]]}; the same command tries them again"
        )


def _measure(one: Benchmark, folder: Path, device: str | None) -> str:
    """Run a benchmark; returns why it failed, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [*schedule.PROGRAM, *one.arguments(folder, device)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=schedule.end_with_parent if sys.platform == "linux" else None,
        )
        try:
            with Stopper().watching():
                code = process.wait()
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped in {one.name}, which begins anew; the same command goes on"
            ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return last_words(folder / LOG, start) if code else ""


def lines(found: Measured, folder: Path) -> list[Line]:
    """The paper's numbers, each followed by ours as far as they are there."""
    made = []
    for entry in found.paper:
        numbers = dict(zip(entry["blocks"], entry["megabytes"], strict=True))
        made.append(Line(entry["dataset"], entry["model"], "the paper", numbers))
        (one,) = (b for b in found.benchmarks if b.name == entry["benchmark"])
        rows = (results(one, folder) or {}).get("rows", [])
        for candidate in found.compare[entry["model"]]:
            mine = [row for row in rows if row.get("candidate") == candidate]
            ours, kept = (
                {row["blocks"]: row[name] / 1e6 for row in mine if name in row}
                for name in ("peak_bytes", "kept_bytes")
            )
            whose = candidate.partition(", ")[2]
            made.append(Line(entry["dataset"], entry["model"], whose, ours, kept))
    return made


def scale(found: Measured, folder: Path) -> str:
    """One line: where what was measured is smaller than the file's."""
    smaller, devices = [], []
    for one in found.benchmarks:
        result = results(one, folder)
        if result is None:
            continue
        devices.append(result["machine"]["device"])
        for name, value in one.paper.items():
            have = result["settings"].get(name)
            if have != value:
                smaller.append(f"{one.name}: {name} {_words(have)} instead of {_words(value)}")
    parts = [f"**Other than the paper: {'; '.join(smaller)}.**"] if smaller else []
    parts = parts or ["As the paper, in all that can be set."]
    if devices:
        parts.append(f"Measured on: {'; '.join(dict.fromkeys(devices))}.")
    return " ".join(parts)


def markdown(found: Measured, folder: Path) -> str:
    """The whole page."""
    words = {one.name: state(one, folder) for one in found.benchmarks}
    done = sum(results(one, folder) is not None for one in found.benchmarks)
    parts = [f"# {found.title}", scale(found, folder), found.about]
    parts.append(
        f"{done} of {len(words)} benchmarks are finished. Megabytes at the peak of a step, against "
        "blocks, what a block adds to it, and what a block keeps from forward to its backward, "
        "which the peak hides where it lies elsewhere:"
    )
    made = lines(found, folder)
    blocks = sorted({n for line in made for n in line.megabytes})
    header = ["images", "network", "of", *map(str, blocks), "MB per block", "kept per block"]
    table = [header, ["---"] * len(header)]
    for line in made:
        numbers = [f"{line.megabytes[n]:,.0f}" if n in line.megabytes else "–" for n in blocks]
        slopes = _slope(line.megabytes), _slope(line.kept)
        table.append([heading(line.dataset), line.model, line.whose, *numbers, *slopes])
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    if found.paper:
        parts.append(f"![{found.title}]({PICTURE})")
    holes = [f"* {name}: {said}" for name, said in words.items() if said.startswith("failed")]
    if holes:
        parts.append("Not in the table, beside what has not run:\n\n" + "\n".join(holes))
    parts += found.notes
    for one in found.benchmarks:
        page = folder / one.name / f"{one.benchmark}.md"
        if results(one, folder) is not None and page.exists():
            picture = f"![{one.name}]({one.name}/{one.benchmark}.png)"
            parts += [f"## {one.name}", page.read_text().strip(), picture]
    return "\n\n".join(parts) + "\n"


def _slope(megabytes: dict[int, float]) -> str:
    """Megabytes that a block adds, by least squares."""
    if len(megabytes) < 2:
        return "–"
    mean = sum(megabytes) / len(megabytes)
    above = sum((n - mean) * value for n, value in megabytes.items())
    return f"{above / sum((n - mean) ** 2 for n in megabytes):,.1f}"


def write(found: Measured, folder: Path) -> str:
    """Write table, CSV and picture; returns the Markdown."""
    page = markdown(found, folder)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "model", "of", "blocks", "megabytes"])
    for line in lines(found, folder):
        for blocks, value in sorted(line.megabytes.items()):
            writer.writerow([line.dataset, line.model, line.whose, blocks, f"{value:.3f}"])
    write_whole(folder / TABLE, page)
    write_whole(folder / CSV, out.getvalue())
    if found.paper:
        figure = draw(found, folder)
        FigureCanvasAgg(figure)
        image = io.BytesIO()
        figure.savefig(image, dpi=120, format="png")
        write_whole(folder / PICTURE, image.getvalue())
    return page


def _show(found: Measured, folder: Path) -> None:
    print(write(found, folder))
    print(f"{folder} holds {TABLE}, {CSV}" + f", {PICTURE}" * bool(found.paper))


def draw(found: Measured, folder: Path) -> Figure:
    """Megabytes against blocks: colours by whose they are, broken lines without reversal."""
    made = lines(found, folder)
    panels = list(dict.fromkeys(line.dataset for line in made))
    colours = {"the paper": "0.5", "published": "tab:red"}
    figure = Figure(figsize=(1.6 + 4.2 * len(panels), 5.2), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, dataset in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for line in made:
            if line.dataset != dataset or not line.megabytes:
                continue
            whose = line.whose.partition(",")[0]
            label = f"{line.model}, {line.whose}"
            (handles[label],) = axes.plot(
                *zip(*sorted(line.megabytes.items()), strict=True),
                color=colours.get(whose, "tab:blue"),
                linestyle="-" if line.model.startswith("Mo") else "--",
                linewidth=1.5 if line.model.startswith("Mo") else 2.5,
                marker="o",
                markersize=4,
            )
        axes.set(title=heading(dataset), xlabel="blocks of two capsule layers", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.set_ylabel("MB in a training step")
        axes.grid(alpha=0.3)
    names = list(handles)
    figure.legend(
        handles.values(), names, loc="outside lower center", ncols=len(panels), frameon=False
    )
    figure.suptitle(found.title, size=11)
    return figure
