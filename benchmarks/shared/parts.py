"""Runs commands one after another, each for a limited time, and tells in one page what they found.

A command that fails or takes too long leaves its error on the page, and the next one runs. The page
is written anew after each, so nothing is lost if the whole is cut off.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TAIL = 25
"""Lines of output that the page shows of a command that failed."""


class Part(NamedTuple):
    """One section of the page."""

    title: str
    shown: str
    """The command as a user would type it."""
    command: tuple[str, ...]
    """What is run: a program and its arguments."""
    limit: float
    """Seconds."""
    results: str | None = None
    """Name of the result files that the command writes, without ending."""
    tail: int = 0
    """Lines of output that belong into the page where there are no result files."""
    cwd: Path | None = None
    """Where it runs; where this process does if None."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of its own."""


class Outcome(NamedTuple):
    part: Part
    error: str | None
    """None if the command succeeded."""
    seconds: float | None
    """None if it was not run."""
    output: str


def run_all(
    parts: Sequence[Part],
    folder: Path,
    heading: str,
    environment: dict[str, str],
    seconds: float,
    keep: Sequence[Part] = (),
) -> list[Outcome]:
    """Runs the parts, which end together within `seconds`, and writes folder/README.md.

    What is in `keep` is not run: the page shows the results that an earlier run left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: dict[Part, Outcome] = {part: Outcome(part, None, None, "") for part in keep}
    for part in parts:
        if part in outcomes:
            continue
        print(f"\n=== {part.title}: {part.shown}", flush=True)
        for old in results_of(part, folder):
            old.unlink()  # results of an earlier run must not pass for this one's
        outcome = run(part, environment, min(part.limit, end - time.monotonic()))
        outcomes[part] = outcome
        ending = outcome.error or "done"
        print(f"=== {part.title}: {ending}, {outcome.seconds or 0:.0f} s", flush=True)
        known = [outcomes[part] for part in parts if part in outcomes]
        left = [part for part in parts if part not in outcomes]
        (folder / "README.md").write_text(page(heading, known, left, folder))
    return [outcomes[part] for part in parts]


def results_of(part: Part, folder: Path) -> list[Path]:
    """Files that belong to a part: its tables, and its pictures, which may have longer names."""
    if part.results is None:
        return []
    exact = [folder / f"{part.results}.{ending}" for ending in ("csv", "json", "md", "png")]
    longer = sorted(folder.glob(f"{part.results}_*.png"))
    return [path for path in [*exact, *longer] if path.exists()]


def run(part: Part, environment: dict[str, str], seconds: float) -> Outcome:
    """One command with all it starts, stopped after so long; its output is shown as it comes."""
    start = time.monotonic()
    if seconds <= 0:
        return Outcome(part, "not run: no time was left", 0.0, "")
    stop_at = start + seconds
    try:
        process = subprocess.Popen(
            part.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, **dict(part.environment)},
            cwd=part.cwd,
            start_new_session=True,
            # What a shell runs in the background ignores it, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    except OSError as reason:
        return Outcome(part, f"did not start: {reason}", time.monotonic() - start, "")
    assert process.stdout is not None
    output = bytearray()
    error: str | None = None
    os.set_blocking(process.stdout.fileno(), False)
    # A command may leave a grandchild that holds the pipe open: the process's end is what counts.
    try:
        while True:
            ended = process.poll() is not None
            chunk = process.stdout.read()
            if chunk:
                output += chunk
                sys.stdout.write(chunk.decode(errors="replace"))
                sys.stdout.flush()
            if ended:
                break
            if time.monotonic() > stop_at and error is None:
                error = f"stopped after {seconds:.0f} s"
                interrupt(process)
            time.sleep(0.05)
    finally:  # nothing that it started goes on, whatever ended it, Ctrl-C included
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if error is None and process.returncode != 0:
        error = f"failed with exit code {process.returncode}"
    return Outcome(part, error, time.monotonic() - start, output.decode(errors="replace"))


def interrupt(process: subprocess.Popen[bytes], grace: float = 10.0) -> None:
    """Asks a process group to end, as Ctrl-C does, so that it can sum up if it knows how; then
    makes it."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def page(heading: str, outcomes: Sequence[Outcome], left: Sequence[Part], folder: Path) -> str:
    """Markdown of what is known so far."""
    failed = [outcome.part.title for outcome in outcomes if outcome.error]
    parts = [heading]
    if failed:
        parts.append(f"**Not everything ran through: see {', '.join(failed)}.**")
    if left:
        parts.append(f"Still to run: {', '.join(part.title for part in left)}.")
    parts += [section(outcome, folder) for outcome in outcomes]
    return "\n\n".join(parts) + "\n"


def section(outcome: Outcome, folder: Path) -> str:
    part, error, seconds, output = outcome
    took = "" if seconds is None else f", {seconds:.0f} s"
    parts = [f"## {part.title}", f"`{part.shown}`{took}"]
    lines = output.replace("\r", "\n").rstrip().splitlines()
    if error:
        parts.append(f"**{error[0].upper()}{error[1:]}.** Its last lines:" if lines else error)
        parts += [fenced(lines[-max(TAIL, part.tail) :])] if lines else []
    for path in results_of(part, folder):
        if path.suffix == ".md":
            parts.append(path.read_text().rstrip())
        elif path.suffix == ".png":
            parts.append(f"![{part.title}]({path.name})")
    if not error and part.results is None and part.tail:
        parts.append(fenced(lines[-part.tail :]))
    return "\n\n".join(parts)


def fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def benchmark(title: str, name: str, options: str, folder: Path, limit: float) -> Part:
    """A part that is one of the benchmarks, with its results in `folder`."""
    words = ["benchmark", name, *shlex.split(options)]
    return Part(
        title,
        shlex.join(["mocapsnet", *words]),
        (sys.executable, "-m", "mocapsnet", *words, "--output", str(folder)),
        limit,
        results=name,
    )
