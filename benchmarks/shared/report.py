"""What the benchmarks' results look like: options, the machine's description, files, tables."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.ticker import LogLocator

from mocapsnet.doctor import processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROJECT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def parser(
    doc: str | None, name: str, *, device: bool = True, output: bool = True
) -> argparse.ArgumentParser:
    """Options that every benchmark has; its module's docstring is the description.

    Args:
        device: whether it runs where it is told; else the CPU.
        output: whether it leaves files.
    """
    made = argparse.ArgumentParser(
        prog=f"mocapsnet benchmark {name}",
        description=doc,
        formatter_class=Formatter,
    )
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        made.add_argument("--device", type=device_of, default=default, help="where to run")
    else:
        made.set_defaults(device=torch.device("cpu"))
    if output:
        made.add_argument(
            "--output",
            type=folder_of,
            help="folder for results (default: benchmarks/results/MACHINE)",
        )
    return made


def folder_of(text: str) -> Path:
    """A folder that is there, or may be made; else nothing is measured first."""
    folder = Path(text)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: {above} is no folder that can be written")
    return folder


def device_of(text: str) -> torch.device:
    """A device that is there; a GPU becomes the current one."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("PyTorch finds no CUDA device here; use cpu")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    return device


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text) if text.strip().lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return value


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, those that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return f"{action.help} (default: %(default)s)"


def machine(device: torch.device) -> Row:
    """What a result depends on beside the code."""
    gpu = device.type == "cuda"
    cudnn: Any = torch.backends.cudnn
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
        "convolution_precision": cudnn.conv.fp32_precision if gpu else None,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def title(machine: Row) -> str:
    """The machine in one line."""
    gpu = (
        f"CUDA {machine['cuda']}, driver {machine['driver']}, on {machine['processor']}, "
        f"convolutions at {machine['convolution_precision']!r}"
    )
    where = gpu if machine["cuda"] else f"{machine['threads']} threads, {machine['instructions']}"
    return (
        f"{machine['device']}, {where}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{machine['dtype']} (matrix products at precision {machine['matmul_precision']!r}), "
        f"commit {machine['commit']}, {machine['date']}"
    )


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(*words: str) -> str | None:
    """First line that a command prints; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def commit() -> str | None:
    """Short name of the git commit, with "-dirty" where tracked code differs from it.

    None outside the repository. Results and texts are no code: a benchmark may follow another.
    """
    if not (PROJECT / ".git").exists():
        return None
    name = command("git", "rev-parse", "--short", "HEAD")
    exclude = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    changed = command("git", "status", "--porcelain", "-uno", "--", ".", *exclude)
    return f"{name}-dirty" if name and changed else name


def results_folder(device: torch.device) -> Path:
    """Below the current folder, named after the GPU, or the number of processor threads."""
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    else:
        name = f"cpu-{torch.get_num_threads()}core"
    return Path("benchmarks/results", name)


def write(
    args: argparse.Namespace,
    name: str,
    rows: Sequence[Row],
    summary: Sequence[Row],
    text: str,
    pictures: Mapping[str, Figure] | None = None,
) -> Path:
    """Prints the text, and writes NAME.csv (rows), NAME.json (all), NAME.md (text) and pictures.

    Numbers that are not finite become strings in JSON, which has none.
    Returns: the folder.
    """
    about = machine(args.device) | {"dtype": getattr(args, "dtype", "float32")}
    text = f"{text}\n\n{title(about)}\n"
    print(text, flush=True)
    folder: Path = args.output or results_folder(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "device")}
    everything = {"machine": about, "settings": settings, "summary": summary, "rows": rows}
    content = json.dumps(plain(everything), indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(content + "\n")
    (folder / f"{name}.md").write_text(text)
    for stem, picture in (pictures or {}).items():
        picture.savefig(folder / f"{stem}.png", dpi=110)
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


def series(
    rows: Iterable[Row], x: str, y: str, **where: Any
) -> dict[str, tuple[list[Any], list[Any]]]:
    """Columns `x` and `y` of every candidate, of the rows where the columns in `where` match."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for row in rows:
        if all(row[key] == value for key, value in where.items()):
            xs, ys = found.setdefault(row["candidate"], ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return found


def lines(
    axes: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    styles: Mapping[str, Mapping[str, Any]],
    xlabel: str = "blocks",
) -> None:
    """One line per candidate, thinner and thinner: equal ones stay visible."""
    for n, (name, (x, y)) in enumerate(series.items()):
        width = 3 - 2 * n / len(series)
        axes.plot(x, y, label=name, marker="o", markersize=4, linewidth=width, **styles[name])
    axes.set(xlabel=xlabel, yscale="log")
    axes.set_xticks(sorted({n for x, _ in series.values() for n in x}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
