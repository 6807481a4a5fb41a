"""Times the plans of a call that are right, in turns, and chooses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from mocapsnet.kernels.routing.plans import Plan
from mocapsnet.kernels.tuning import DIRECTIONS, Chosen, Problem
from mocapsnet.kernels.verification import usable
from mocapsnet.train import graph

from .calls import Call
from .measure import Run, quartiles, turns
from .plans import STATIC, Judge, Launchers, launchers
from .report import Row

MARGIN = 0.03
"""The share of the static plan's time that another must save to take its place."""

Clock = Callable[[Sequence[Run]], list[float]]
"""Makes calls one after another, and returns the seconds that each took."""


def by_processor(runs: Sequence[Run]) -> list[float]:
    seconds = []
    for run in runs:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


class ByEvents:
    """By the GPU's events, with what it holds in its L2 cache overwritten before each call."""

    def __init__(self, device: torch.device):
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.swept = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        pairs = []
        for run in runs:
            self.swept.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        pairs[-1][1].synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def captured(runs: Mapping[str, Run], device: torch.device) -> tuple[Mapping[str, Run], str]:
    """The same calls as CUDA graphs, or as they are and why, if one cannot be captured.

    Launched from Python, a small launch is over before the next is there: then Python is timed.
    """
    if device.type not in graph.DEVICES:
        return runs, ""
    replays: dict[str, Run] = {}
    try:
        for name, run in runs.items():
            with graph.aside(device) as stream:  # warm up there, as capturing asks for
                run()
            replays[name] = graph.recorded(run, stream)[0]
    except Exception as error:  # whatever the driver may raise: timed without graphs, and told
        return runs, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return replays, ""


class Choice(NamedTuple):
    """What was chosen for one direction."""

    name: str
    """Of the plan among the candidates."""
    plan: Plan | None
    """None: the static one."""
    seconds: float
    static_seconds: float

    def entry(self) -> Chosen:
        """As a table has it."""
        times = (round(1e6 * t, 2) for t in (self.seconds, self.static_seconds))
        return Chosen(self.plan, *times)


def in_turns(runs: Mapping[str, Run], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every candidate in every round of `turns`."""
    order = turns(list(runs), rounds)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for (counts, name), value in zip(order, clock([runs[name] for _, name in order]), strict=True):
        if counts:
            seconds[name].append(value)
    return seconds


def choose(
    runs: Mapping[str, Run], rounds: int, clock: Clock
) -> tuple[str, float, float, dict[str, list[float]]]:
    """The name of the plan to take, its seconds and the static plan's, and all that was timed.

    The fastest by medians meets the static plan again in as many rounds of their own, for of many
    the fastest is partly the luckiest; it is taken if it saves `MARGIN` there.
    """
    seconds = in_turns(runs, rounds, clock)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    if best != STATIC:
        again = in_turns({name: runs[name] for name in (STATIC, best)}, rounds, clock)
        pairs = zip(again[best], again[STATIC], strict=True)
        if statistics.median(a / b for a, b in pairs) <= 1 - MARGIN:
            own, of_static = (statistics.median(again[name]) for name in (best, STATIC))
            return best, own, of_static, seconds
    return STATIC, medians[STATIC], medians[STATIC], seconds


class Tuned(NamedTuple):
    """What came of one call."""

    call: Call
    choices: dict[str, Choice]
    """By direction; none if the call could not be tuned."""
    dropped: dict[str, str]
    """Candidates that were not timed, and why."""
    eagerly: str
    """Why calls were not timed as CUDA graphs, if so."""
    rows: list[Row]
    """A row per direction and candidate."""

    def entries(self, precision: str) -> dict[Problem, Chosen]:
        return {self.call.problem(d, precision): c.entry() for d, c in self.choices.items()}


def tune(
    call: Call,
    found: Mapping[str, Plan],
    precision: str,
    device: torch.device,
    rounds: int,
    clock: Clock,
    end: float = float("inf"),
) -> Tuned:
    """Verifies and times the candidates of a call.

    Args:
        found: the candidates, the static plan first.
        precision: as of torch.set_float32_matmul_precision.
        end: by time.monotonic, after which no further candidate is tried.
    Raises: RuntimeError if the process has lost the GPU.
    """
    dropped: dict[str, str] = {}
    right: dict[str, Plan] = {}
    choices: dict[str, Choice] = {}
    rows: list[Row] = []
    works: Launchers | None = None
    eagerly = ""
    try:
        works = launchers(call, device)
        judge = Judge(call, precision, device, works)
    except Exception as error:
        lost(call, STATIC, error, device)
        return Tuned(call, {}, {STATIC: told(error)}, "", [])
    for name, plan in found.items():
        wrong = judged(judge, call, name, plan, plan, end)
        if wrong:
            dropped[name] = wrong
        else:
            right[name] = plan
        if name == STATIC and wrong:
            return Tuned(call, {}, dropped, "", [])
    for direction in DIRECTIONS:
        by_plan: Callable[[Plan], Any] = getattr(works, direction)
        runs, eagerly = captured({n: partial(by_plan, p) for n, p in right.items()}, device)
        best, own, of_static, seconds = choose(runs, rounds, clock)
        choices[direction] = Choice(best, None if best == STATIC else right[best], own, of_static)
        for name, values in seconds.items():
            low, median, high = quartiles(values)
            row: Row = {"call": str(call), "direction": direction, "candidate": name}
            row |= {"seconds": median, "lower_quartile": low, "upper_quartile": high}
            rows.append(row | {"chosen": name == best} | right[name]._asdict())
    first, second = (choices[direction] for direction in DIRECTIONS)
    if first.name != second.name:  # each is right with itself
        pair = f"{first.name} forward with {second.name} backward"
        p, q = right[first.name], right[second.name]
        wrong = judged(judge, call, pair, p, q)
        if wrong:
            dropped[pair] = wrong
            kept = {d: c.static_seconds for d, c in choices.items()}
            choices = {d: Choice(STATIC, None, t, t) for d, t in kept.items()}
    return Tuned(call, choices, dropped, eagerly, rows)


def judged(judge: Judge, call: Call, name: str, p: Plan, q: Plan, end: float = float("inf")) -> str:
    """What speaks against a candidate; empty if nothing does."""
    if name != STATIC and time.monotonic() > end:
        return "not tried: no time was left"
    try:
        return judge.verdict(p, q)
    except Exception as error:  # from Triton, its compiler, the driver: whatever it is
        lost(call, name, error, judge.device)
        return told(error)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def lost(call: Call, name: str, error: Exception, device: torch.device) -> None:
    """Raises: RuntimeError if a GPU no longer computes, as after an invalid access to memory."""
    if not usable(device):
        raise RuntimeError(
            f"this process has lost the GPU at {call}, plan {name!r}: {told(error)}. What was "
            "tuned before is kept; please report this with what `mocapsnet doctor --json` prints"
        )
