"""Trains what an experiment lacks: each run a process of its own, so that one may fail alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from mocapsnet.train.console import LINE_EVERY
from mocapsnet.train.errors import Interrupted
from mocapsnet.train.experiments.runs import Run
from mocapsnet.train.experiments.states import Failures, State, last_words, state_of
from mocapsnet.train.metrics import judged_by, read_rows
from mocapsnet.train.option_values import RESUMABLE, arguments
from mocapsnet.train.run_folder import CONFIG, LOG
from mocapsnet.train.stopping import Stopper

PROGRAM = (sys.executable, "-m", "mocapsnet")

# Seconds between two looks at the processes, and that they have to end when they are told to.
EVERY, PATIENCE = 0.2, 60.0


@dataclass(frozen=True)
class Place:
    """Where runs go: so many at a time, on these devices or with so many threads each."""

    jobs: int
    devices: tuple[str, ...]
    threads: int

    @property
    def words(self) -> str:
        """What it is, for tables and the terminal."""
        if self.devices:
            return torch.cuda.get_device_name(0)
        return f"CPU, {self.threads} thread{'s' * (self.threads > 1)} a run"

    def environment(self, slot: int) -> dict[str, str]:
        """Of the process in the slot-th place."""
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": self.devices[slot % len(self.devices)]}
        return {"OMP_NUM_THREADS": str(self.threads)}


def place(jobs: int | None, device: str) -> Place:
    """Share this machine among runs.

    Args:
        jobs: runs at a time (None: one, or one on every GPU).
        device: "auto", "cpu" or "cuda".
    """
    devices: tuple[str, ...] = ()
    if device != "cpu" and torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        named = tuple(name.strip() for name in seen.split(",") if name.strip())
        devices = named or tuple(map(str, range(torch.cuda.device_count())))
    jobs = jobs or len(devices) or 1
    return Place(jobs, devices, max(1, torch.get_num_threads() // jobs))


@dataclass
class Child:
    """A training that runs.

    Attributes:
        slot: its place among those that run at a time.
        log, start: its output, and the bytes of it that were there before.
        epochs: that it had done when it was started, or that were told of since.
        told: when something was told of it.
        since: when it was started.
    """

    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    log: BinaryIO
    start: int
    epochs: int
    told: float
    since: float


def train_all(
    runs: list[Run],
    states: dict[str, State],
    folder: Path,
    where: Place,
    ended: Callable[[], object],
    go_on: str,
) -> list[str]:
    """Train runs until all are finished or have failed.

    Args:
        runs: to begin or to continue.
        states: theirs.
        ended: called whenever one has ended.
        go_on: the command that continues, for messages.
    Returns: the names of those that failed.
    Raises: Interrupted on Ctrl-C or SIGTERM, when all processes have ended.
    """
    failures = Failures(folder)
    waiting, children, failed = list(runs), list[Child](), list[str]()
    done = 0
    try:
        with Stopper().watching():
            while waiting or children:
                free = set(range(where.jobs)) - {child.slot for child in children}
                for slot in sorted(free)[: len(waiting)]:
                    run = waiting.pop(0)
                    failures.note(run.name, None)
                    children.append(_start(run, states[run.name], folder / run.name, slot, where))
                time.sleep(EVERY)
                for child in list(children):
                    _tell_epochs(child, folder / child.run.name)
                    code = child.process.poll()
                    if code is None:
                        continue
                    children.remove(child)
                    child.log.close()
                    done += 1
                    state, reason = _outcome(child, code, folder / child.run.name)
                    if reason:
                        failures.note(child.run.name, reason)
                        failed.append(child.run.name)
                    took = clock(time.monotonic() - child.since)
                    said = f"failed: {reason}"
                    if not reason:
                        said = f"finished, test accuracy {state.accuracy or 0:.2%}"
                    _say(child.run, f"{said} ({took}; {done} of {len(runs)})")
                    ended()
    except KeyboardInterrupt:
        _stop(children)
        ended()
        begun = ", ".join(child.run.name for child in children)
        raise Interrupted(
            f"stopped{f' in {begun}' if begun else ''}; what was done is kept. Go on with: {go_on}"
        ) from None
    finally:
        _stop(children)
    return failed


def _start(run: Run, state: State, folder: Path, slot: int, where: Place) -> Child:
    if (folder / CONFIG).exists():
        again = {"epochs": run.options.optim.epochs} | {
            name: run.values[name] for name in _ANEW if name in run.values
        }
        words = ["train", "--resume", str(folder), *arguments(again)]
        verb = f"continued after epoch {state.epochs}" if state.epochs else "started again"
    else:
        words, verb = run.arguments(str(folder)), "started"
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / LOG).open("ab")
    log.write(f"$ mocapsnet {subprocess.list2cmdline(words)}\n".encode())
    log.flush()
    start = log.tell()
    process = subprocess.Popen(
        [*PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | where.environment(slot) | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C is for this process, which then tells the others
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    _say(run, f"{verb}; its output is in {folder / LOG}")
    now = time.monotonic()
    return Child(run, slot, process, log, start, state.epochs, now, now)


# What a run may be given anew when it goes on.
_ANEW = tuple(sorted(name.split(".")[-1] for name in RESUMABLE - {"optim.epochs", "resume"}))

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In the child: be told to stop when the parent is killed, which cannot do so itself then."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tell_epochs(child: Child, folder: Path) -> None:
    """Print a run's last epoch, as often as a training prints a line."""
    now = time.monotonic()
    if now - child.told < LINE_EVERY:
        return
    child.told = now
    rows = read_rows(folder).rows
    if rows and rows[-1]["epoch"] > child.epochs:
        child.epochs = rows[-1]["epoch"]
        split, epochs = judged_by(rows[-1]), child.run.options.optim.epochs
        accuracy = rows[-1][f"{split}_accuracy"]
        _say(child.run, f"epoch {child.epochs}/{epochs}, {split} accuracy {accuracy:.2%}")


def _outcome(child: Child, code: int, folder: Path) -> tuple[State, str]:
    """The state of a run that has ended, and why it is not finished; empty if it is."""
    state = state_of(child.run, folder, None)
    if code == 0:
        words = state.words(child.run)
        return state, "" if state.kind == "finished" else f"it ended, but is {words}"
    if code < 0:
        hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return state, f"killed by {signal.Signals(-code).name}{hint}"
    return state, last_words(folder / LOG, child.start)


def _stop(children: list[Child]) -> None:
    """End trainings as Ctrl-C does; those that do not end in time, or a second Ctrl-C, at once."""
    alive = [child for child in children if child.process.poll() is None]
    for child in alive:
        _signal(child, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    try:
        for child in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.1, end - time.monotonic()))
    finally:
        for child in alive:
            if child.process.poll() is None:
                _signal(child, signal.SIGKILL)
                child.process.wait()
            child.log.close()


def _signal(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


def _say(run: Run, what: str) -> None:
    print(f"{run.name}: {what}", flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
