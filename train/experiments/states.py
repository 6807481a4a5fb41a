"""How far the runs of an experiment are, read from their folders."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from mocapsnet.train import result
from mocapsnet.train.errors import InputError
from mocapsnet.train.experiments.runs import Run, difference
from mocapsnet.train.files import write_whole
from mocapsnet.train.loop import finished
from mocapsnet.train.metrics import read_rows
from mocapsnet.train.option_values import RESUMABLE, planned
from mocapsnet.train.run_folder import CONFIG, HOLDER, holder, read_config

# Options that no result depends on, and those that say how far to go.
NO_MATTER = {*RESUMABLE, "out"}

FAILURES = "failures.json"

# A training says once a minute that it is there, but not while it tests or writes.
QUIET = 1800.0


@dataclass(frozen=True)
class State:
    """Of a run.

    Attributes:
        kind: "missing", "interrupted", "failed", "running", "finished", or "other" for a folder
            that holds a run of other options.
        epochs: that are done.
        accuracy: of the last one on the test images, in 0..1, or of the one that is kept where the
            epochs are not tested but validated; None before there is one.
        seconds: that an epoch takes, tests not included, by the median; None before the first.
        reason: of "failed", "running" and "other", in one line.
    """

    kind: str
    epochs: int = 0
    accuracy: float | None = None
    seconds: float | None = None
    reason: str = ""

    def words(self, run: Run) -> str:
        """One line."""
        progress = f"{self.epochs} of {run.options.optim.epochs} epochs"
        if self.kind == "finished":
            return "finished"
        if self.kind == "missing":
            return "not run"
        if self.kind == "interrupted":
            return f"interrupted after {progress}" if self.epochs else "interrupted"
        if self.kind == "running":
            return f"running, {progress}"
        return f"{self.kind}: {self.reason}"


def state_of(run: Run, folder: Path, failure: str | None) -> State:
    """Read the state of a run.

    Args:
        folder: of the run; need not be there.
        failure: why it failed when it was last started.
    """
    if not (folder / CONFIG).exists():
        if in_use(folder):
            return State("running", reason=holder(folder))
        return State("failed", reason=failure) if failure else State("missing")
    rows = read_rows(folder).rows
    epochs = rows[-1]["epoch"] if rows else 0
    accuracy = rows[-1].get("test_accuracy") if rows else None
    times = sorted(row["train_seconds"] for row in rows if "train_seconds" in row)
    seconds = times[len(times) // 2] if times else None

    def state(kind: str, reason: str = "") -> State:
        return State(kind, epochs, accuracy, seconds, reason)

    try:
        saved = read_config(folder)
        differs = difference(saved, run.options, NO_MATTER)
        if differs is not None:
            option, then, now = differs
            return state("other", f"{option} {then} there, {now} asked for")
        if epochs > run.options.optim.epochs or (
            saved.optim.epochs != run.options.optim.epochs and planned(run.options.optim)
        ):
            now = run.options.optim.epochs
            return state("other", f"--epochs {saved.optim.epochs} there, {now} asked for")
        if in_use(folder):
            return state("running", holder(folder))
        if finished(folder, run.options):
            # With a validation share only the network that is kept is tested, at the end.
            accuracy = result.test_accuracy(folder) if accuracy is None else accuracy
            return state("finished")
    except InputError as error:
        return state("failed", str(error))
    return state("failed", failure) if failure else state("interrupted")


def in_use(folder: Path) -> bool:
    """Whether a training holds the folder now, as far as can be seen without trying its lock.

    Trying it could make a training fail that takes it at the same moment. One of another machine
    does if it has said so within the last QUIET seconds.
    """
    try:
        found = json.loads((folder / HOLDER).read_bytes())
        if found["host"] != socket.gethostname():
            return (folder / HOLDER).stat().st_mtime > time.time() - QUIET
        # A process that is younger than the note is another one, with the number of the first.
        since = psutil.Process(found["pid"]).create_time()
        return bool(since <= (folder / HOLDER).stat().st_mtime + 1)
    except (OSError, ValueError, LookupError, TypeError, psutil.Error):
        return False


class Failures:
    """Why runs failed when they were last started, in FOLDER/failures.json."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAILURES
        self.reasons: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_bytes())
            if isinstance(found, dict):
                self.reasons = {str(name): str(reason) for name, reason in found.items()}

    def note(self, name: str, reason: str | None) -> None:
        """Keep why a run failed, or that it did not."""
        if self.reasons.get(name) == reason:
            return
        self.reasons.pop(name, None)
        if reason is not None:
            self.reasons[name] = reason
        write_whole(self._path, json.dumps(self.reasons, indent=2) + "\n")


def states_of(runs: list[Run], folder: Path) -> dict[str, State]:
    """The states of an experiment's runs by their names."""
    failures = Failures(folder).reasons
    return {run.name: state_of(run, folder / run.name, failures.get(run.name)) for run in runs}


def last_words(log: Path, start: int) -> str:
    """The first line of why a training failed, from its output since byte `start`."""
    with contextlib.suppress(OSError):
        lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip()]
        own = [
            line.removeprefix("mocapsnet: ")
            for line in said
            if line.startswith("mocapsnet: ") and not line.startswith("mocapsnet: warning")
        ]
        if own or said:
            return (own or said)[-1].strip()
    return "nothing was said"
