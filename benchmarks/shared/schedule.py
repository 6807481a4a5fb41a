"""How often a warp executes each machine instruction, and how long it takes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .addresses import Kernel, is_memory
from .compiled import Code, kind_of, within
from .gpus import ARITHMETIC_LATENCY, FIXED_LATENCY

Span = tuple[int, int]
MEMORY = ("global", "shared")


def executions(code: Code, kernel: Kernel, counts: Sequence[float]) -> dict[Span, float]:
    """How often each loop of the machine code runs, by how often PTX instructions are executed.

    Loops correspond in their order. If their numbers differ, only the longest innermost one is
    counted. A loop of machine code that holds as many accesses of memory as some turns of that of
    PTX is taken for unrolled by that number.
    """
    matched = dict(zip(code.loops, kernel.loops, strict=False))
    if len(code.loops) != len(kernel.loops):
        matched = {}
        if code.loops and kernel.loops:
            matched[innermost(code.loops)] = innermost(kernel.loops)
    times = dict.fromkeys(code.loops, 1.0)
    for (start, end), (first, last) in matched.items():
        theirs = sum(is_memory(x.name) for x in kernel.instructions[first : last + 1])
        ours = sum(kind_of(name) in MEMORY for name in code.names[start:end])
        unrolled = max(1, round(ours / theirs)) if theirs else 1
        times[start, end] = counts[first] / unrolled
    return times


def innermost(loops: Sequence[Span]) -> Span:
    """The longest of the loops that hold no other."""
    inner = [a for a in loops if not any(a != b and within(b, a) for b in loops)]
    return max(inner, key=lambda span: span[1] - span[0])


def weights(code: Code, times: Mapping[Span, float]) -> list[float]:
    """Executions of each instruction by a warp."""
    found = [1.0] * len(code.names)
    for span in code.loops:  # inner loops come after outer ones
        for place in range(*span):
            found[place] = times[span]
    return found


class Warp:
    """One warp, alone: it issues an instruction a clock, in order, once its operands are there."""

    def __init__(self, code: Code, times: Mapping[Span, float], latency: Mapping[str, float]):
        self.code, self.times, self.latency = code, times, latency
        self.clock = 0.0
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []
        """When asynchronous copies end: of every group, and of those since the last."""
        self.copying = 0.0
        self.registers = [named(*x) for x in zip(code.names, code.operands, strict=True)]

    def run(self) -> float:
        """Clocks until its last result is there."""
        self.walk(0, len(self.code.names), 1.0)
        return max([self.clock, *self.ready.values()])

    def walk(self, start: int, end: int, entered: float) -> None:
        """Runs instructions from start to end; what holds them is entered so often."""
        place = start
        loops = [x for x in self.code.loops if start <= x[0] and x[1] <= end and x != (start, end)]
        while place < end:
            span = next((x for x in loops if x[0] == place), None)
            if span is None:
                self.issue(place)
                place += 1
                continue
            times = self.times[span]
            self.turns(span, times / entered if entered else 0, times)
            place = span[1]

    def turns(self, span: Span, turns: float, entered: float) -> None:
        """A loop: two turns, and the others like the second."""
        if turns >= 1:
            self.walk(*span, entered)
        if turns > 1:
            before = self.clock
            self.walk(*span, entered)
            more = (turns - 2) * (self.clock - before)
            self.clock += more
            self.ready = {name: at + more for name, at in self.ready.items()}

    def issue(self, place: int) -> None:
        name = self.code.names[place]
        kind = kind_of(name)
        results, uses = self.registers[place]
        self.clock = max([self.clock + 1, *(self.ready.get(x, 0.0) for x in uses)])
        if name.startswith("LDGSTS"):
            self.copying = max(self.copying, self.clock + self.latency["global"])
        elif name == "LDGDEPBAR":
            self.copies.append(self.copying)
        elif name.startswith("DEPBAR"):
            left = int((re.findall(r"0x[0-9a-f]+", self.code.operands[place]) or ["0"])[-1], 16)
            ended = self.copies[: max(len(self.copies) - left, 0)]
            self.clock = max([self.clock, *ended])
        takes = self.latency.get(kind, ARITHMETIC_LATENCY.get(kind, FIXED_LATENCY))
        for register in results:
            self.ready[register] = self.clock + takes


NO_RESULT = re.compile(
    r"ST|RED|LDGSTS|LDGDEPBAR|DEPBAR|BAR|BRA|EXIT|NOP|BSYNC|BSSY|WARPSYNC|CCTL|FENCE"
)
TWO_RESULTS = re.compile(r"[IFDHU]*SETP|U?PLOP3|SHFL")


def named(name: str, operands: str) -> tuple[list[str], list[str]]:
    """Registers that an instruction writes, and those that it reads at least."""
    guard = re.match(r"@!?(U?P\w+)\s*", operands)
    parts = re.split(r",\s*", operands[guard.end() :] if guard else operands)
    written = 0 if NO_RESULT.match(name) else 2 if TWO_RESULTS.match(name) else 1
    results = [r for part in parts[:written] for r in registers(part)]
    uses = [guard[1]] if guard else []
    for part in parts[written:]:
        stored = name.startswith("ST") and part == parts[-1]
        count = 2 if ".64" in part else width(name) if stored else 1
        uses += [x for r in registers(part) for x in following(r, count)]
    accumulates = name.startswith(("HMMA", "DMMA"))
    if accumulates and parts[-1].startswith("R"):
        uses += [x for r in registers(parts[-1]) for x in following(r, 4)]
    many = 4 if accumulates else width(name)
    return [x for r in results for x in following(r, many)], uses


def registers(operand: str) -> list[str]:
    return re.findall(r"\bU?[RP]\d+\b", operand)


def following(register: str, count: int) -> list[str]:
    """A register and those after it that belong to one value."""
    letters, number = re.fullmatch(r"(U?[RP])(\d+)", register).groups()  # type: ignore[union-attr]
    return [f"{letters}{int(number) + n}" for n in range(1 if "P" in letters else count)]


def width(name: str) -> int:
    """Registers of one value that an instruction loads, stores or makes."""
    if ".128" in name or re.search(r"LDSM.*\.4|STSM.*\.4", name):
        return 4
    wide = ".64" in name or ".WIDE" in name or name.startswith(("CS2R", "D"))
    return 2 if wide or re.search(r"LDSM.*\.2", name) else 1
