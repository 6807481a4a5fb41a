"""What the benchmarks share: the machine's description, timing, memory, tables and result files."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import math
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent
Run = Callable[[], Any]
Row = dict[str, Any]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Options that every benchmark has; its question, the docstring's head, is the description."""
    head = (doc or "").split("\n\n")[0]
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=head,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=torch.device, default=device, help="where to run")
    made.add_argument(
        "--output", type=Path, help="folder for results; benchmarks/results/MACHINE if not given"
    )
    return made


def machine(device: torch.device) -> Row:
    """What a result depends on beside the code."""
    gpu = device.type == "cuda"
    conv = torch.backends.cudnn.conv.fp32_precision if gpu else None
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "driver": command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cuda": torch.version.cuda if gpu else None,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "dtype": "float32",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "convolution_precision": conv,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def title(machine: Row) -> str:
    """The machine in one line."""
    where = f"CUDA {machine['cuda']}" if machine["cuda"] else f"{machine['threads']} threads"
    return f"{machine['device']}, {where}, torch {machine['torch']}, {machine['dtype']}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(*words: str) -> str | None:
    """First line that a command prints; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def commit() -> str | None:
    """Short name of the git commit, with "-dirty" where tracked files differ from it."""
    return command("git", "describe", "--always", "--dirty", "--exclude=*")


def write(
    args: argparse.Namespace,
    name: str,
    rows: Sequence[Row],
    summary: Sequence[Row],
    text: str,
) -> Path:
    """Writes NAME.csv (rows), NAME.json (all) and NAME.md (`text`), prints the text as well.

    Numbers that are not finite become strings in JSON, which has none.
    Returns: the folder.
    """
    about = machine(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    folder: Path = args.output or ROOT / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "device")}
    everything = {"machine": about, "settings": settings, "summary": summary, "rows": rows}
    content = json.dumps(plain(everything), indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(content + "\n")
    text = f"{title(about)}, {about['date']}, commit {about['commit']}\n\n{text}\n"
    (folder / f"{name}.md").write_text(text)
    print(text)
    return folder


def plain(value: Any) -> Any:
    """A copy that JSON can hold."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def interleaved(
    candidates: Mapping[Any, Run], rounds: int, device: torch.device, calls: int = 1
) -> dict[Any, list[float]]:
    """Seconds per call of every candidate in every round.

    Candidates take turns, so that a drift of the machine's speed meets all alike, in an order that
    changes from round to round, so that none always inherits the same neighbour's caches. A first
    round, not counted, warms up.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for n in range(rounds + 1):
        for name in order:
            run = candidates[name]
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            if n > 0:
                seconds[name].append((time.perf_counter() - start) / calls)
        shuffle(order)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, method="inclusive")
    return low, median, high


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; NaN for a single point."""
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


def peak_bytes(run: Run, device: torch.device) -> int:
    """Peak of live tensor bytes beyond those alive before the call, counted by the allocator.

    On a CPU the call has a thread of its own: operations keep workspaces per thread, and one from
    an earlier call would not be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_peak_bytes_cpu, run).result()


def _peak_bytes_cpu(run: Run) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def lines(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """One line per candidate against blocks, thinner and thinner: equal ones stay visible."""
    for n, (name, (x, y)) in enumerate(series.items()):
        width = 3 - 2 * n / len(series)
        axes.plot(x, y, label=name, marker="o", markersize=4, linewidth=width, **styles[name])
    axes.set(xlabel="blocks", yscale="log")
    axes.set_xticks(sorted({n for x, _ in series.values() for n in x}))
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
