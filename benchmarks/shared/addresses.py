"""The addresses that a compiled kernel reads and writes, found by running what computes them.

Of the PTX only the integers that lead to an address, to the predicate of an access, or to a branch
are run, for all threads of one program at once; floating-point numbers and what memory holds are
not known. So no GPU, no data and no memory are needed. A tensor lies where `Region` says; a pointer
that the kernel loads from memory is taken for a tensor of its own. Branches must be the same for
all threads of a program, and not depend on data: `ValueError` says where one is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]  # int64 or bool, one for each thread

REGION = 40
"""Bits of an address within a tensor that is an argument: the n-th argument lies at n + 1 << 40."""
POINTED = 1 << 60
"""From here on lie the tensors whose addresses are loaded from memory, of at most 256 MB each."""


def region(address: int) -> int:
    """A number for the tensor that an address belongs to."""
    return address >> 28 if address >= POINTED else address >> REGION


class Access(NamedTuple):
    """One instruction that reads or writes memory, as all threads of a program execute it."""

    kind: str
    """"load", "store" (global memory), "shared", "rows" (shared, by rows of a matrix), "copy"
    (global to shared)."""
    addresses: Numbers
    """Of the first byte of each thread [threads]; for rows, of a row."""
    size: int
    """Bytes of each thread; for rows, matrices of 8 x 16 bytes."""
    active: Numbers
    """Which threads do it [threads]."""
    shared: Numbers | None = None
    """Where a copy goes [threads]."""
    writing: Numbers | None = None
    """Which threads of a copy write there [threads]: those that read nothing write zeros."""


class Instruction(NamedTuple):
    name: str
    operands: list[str]
    predicate: str
    """Register, or empty."""
    negated: bool


class Kernel:
    """A decoded kernel of PTX."""

    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
        found = re.search(r"\.reqntid (\d+)", head)
        self.threads = int(found[1]) if found else 32
        self.parameters = re.findall(r"\.param [^,()]*?(\w+)\s*(?=,|\)|$)", head, re.M)
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.decode(body)
        self.undefined = self.find_undefined()
        self.loops = self.find_loops()
        self.needed = self.find_needed()

    def decode(self, body: str) -> None:
        statement = ""
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            while found := re.match(r"([$\w]+):(?!:)\s*", line):
                self.labels[found[1]] = len(self.instructions)
                line = line[found.end() :]
            if re.match(r"\.(loc|pragma|file|section|b\d+)\b", line):
                continue
            *whole, statement = f"{statement} {line}".split(";")
            for text in whole:
                text = text.lstrip("{} \t")
                found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
                if found and not text.startswith("."):
                    negated, predicate, name, operands = found.groups()
                    parts = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,{}\[\]]+", operands)
                    self.instructions.append(
                        Instruction(name, parts, predicate or "", bool(negated))
                    )
            if not statement.strip("{} \t"):
                statement = ""

    def find_undefined(self) -> set[str]:
        """Registers that are read and nowhere written: what they hold reaches no result, as bytes
        that a permutation of bytes has no use for."""
        of = [[registers(x) for x in i.operands] for i in self.instructions]
        written = {register for operands in of if operands for register in operands[0]}
        read = {register for operands in of for x in operands[1:] for register in x}
        return {register for register in read - written if re.fullmatch(r"%[a-z]+\d+", register)}

    def find_loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop, in the order of the first."""
        ends: dict[int, int] = {}
        for place, instruction in enumerate(self.instructions):
            if instruction.name.startswith("bra"):
                start = self.labels.get(instruction.operands[-1], place + 1)
                if start <= place:
                    ends[start] = max(place, ends.get(start, 0))
        return sorted(ends.items())

    def find_needed(self) -> list[bool]:
        """Which instructions lead to an address, a predicate of an access, or a branch."""
        wanted: set[str] = set()
        needed = [False] * len(self.instructions)
        changed = True
        while changed:
            changed = False
            for place, (name, operands, predicate, _) in enumerate(self.instructions):
                if needed[place]:
                    continue
                if is_memory(name):
                    uses = [predicate, *(x for x in operands if x.startswith("["))]
                    uses += operands[3:] if name.startswith("cp.async") else []
                    if name.startswith("ld.global") and wanted & set(registers(operands[0])):
                        pass  # a pointer: its address is wanted anyway
                elif name.startswith(("bra", "ret", "exit")):
                    uses = [predicate]
                elif operands and wanted & set(registers(operands[0])):
                    uses = [predicate, *operands[1:]]
                else:
                    continue
                needed[place] = changed = True
                wanted |= {register for x in uses for register in registers(x)}
        return needed

    def run(
        self, values: Sequence[int], grid: Sequence[int], program: int, counts: list[int]
    ) -> Iterator[Access]:
        """Every access of one program in order.

        `counts` [instructions] is counted up by the times that each is executed.
        """
        run = Run(self, values, grid, program)
        place = 0
        while place < len(self.instructions):
            counts[place] += 1
            instruction = self.instructions[place]
            name = instruction.name
            if not self.needed[place]:
                pass
            elif is_memory(name):
                yield run.access(instruction)
            elif name.startswith("bra"):
                if run.everywhere(instruction):
                    place = self.labels[instruction.operands[-1]]
                    continue
            elif name.startswith(("ret", "exit")):
                if run.everywhere(instruction):
                    return
            else:
                run.compute(instruction)
            place += 1


def registers(operand: str) -> list[str]:
    return re.findall(r"%[\w.]+", operand)


def members(operand: str) -> list[str]:
    """Of a vector, as {%rs1, %rs2}; _ is none that is wanted."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


@cache
def words(name: str) -> list[str]:
    return name.split(".")


@cache
def is_memory(name: str) -> bool:
    if name.startswith(("ld.global", "st.global", "ld.shared", "st.shared", "ldmatrix")):
        return True
    return name.startswith(("stmatrix", "cp.async.c")) and "commit" not in name


@cache
def size_of(name: str) -> int:
    """Bytes that a thread loads or stores."""
    many = re.search(r"\.v(\d)", name)
    return int(many[1] if many else 1) * bits(name.rpartition(".")[2]) // 8


@cache
def bits(kind: str) -> int:
    """Of a type, as s32, f16x2, pred."""
    found = re.match(r"[a-z]+(\d+)(?:x(\d))?", kind)
    return int(found[1]) * int(found[2] or 1) if found else 64


def signed(x: Numbers, width: int) -> Numbers:
    """Of bits that are kept as numbers from zero."""
    half = 1 << (width - 1)
    return x if width == 64 else (x & (2 * half - 1) ^ half) - half


def unsigned(x: Numbers, width: int) -> Numbers:
    return x if width == 64 else x & ((1 << width) - 1)


def divided(a: Numbers, b: Numbers) -> Numbers:
    """Rounded to zero; by zero it does not matter."""
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def field(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    """`c` bits of `a` from the `b`-th on."""
    return (a >> b) & ((np.int64(1) << c) - 1)


def chosen(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    found: Numbers = np.where(c, a, b)
    return found


def shifted_right(a: Numbers, b: Numbers) -> Numbers:
    return a >> np.minimum(b, 63)


def permuted(a: Numbers, b: Numbers, c: Numbers) -> Numbers:
    """Four of the eight bytes of `b` and `a`, or what their signs extend to."""
    result = np.zeros_like(a)
    for n in range(4):
        which = c >> 4 * n & 15
        byte = (b << 32 | a) >> 8 * (which & 7) & 255
        result |= np.where(which & 8, np.where(byte & 128, 255, 0), byte) << 8 * n
    return result


ARITHMETIC: dict[str, Callable[..., Numbers]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": lambda a: abs(a),
    "min": lambda a, b: np.minimum(a, b),
    "max": lambda a, b: np.maximum(a, b),
    "shl": lambda a, b: np.where(b < 64, a << np.minimum(b, 63), 0),
    "shr": shifted_right,
    "div": divided,
    "rem": lambda a, b: a - divided(a, b) * b,
    "bfe": field,
    "prmt": permuted,
    "selp": chosen,
}
COMPARISONS: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


ORDINARY = "0f4086232B"
"""4.19, the upper half of 708.4 as a double, read as a float: below it, exp of float64 takes its
usual path and no other, which is what happens to numbers that come up."""


class Run:
    """Registers of all threads of one program; what is not known is missing."""

    def __init__(self, kernel: Kernel, values: Sequence[int], grid: Sequence[int], program: int):
        self.threads = kernel.threads
        x, y, z = (*grid, 1, 1)[:3]
        place = (program % x, program // x % y, program // (x * y))
        lanes = np.arange(self.threads, dtype=np.int64)
        none = np.zeros_like(lanes)
        self.known: dict[str, Numbers] = {"%tid.x": lanes, "%laneid": lanes % 32}
        self.known |= {"%tid.y": none, "%tid.z": none, "%ntid.x": none + self.threads}
        for axis, index, size in zip("xyz", place, (x, y, z), strict=True):
            self.known |= {f"%ctaid.{axis}": none + index, f"%nctaid.{axis}": none + size}
        self.known["global_smem"] = none
        self.known |= dict.fromkeys(kernel.undefined, none)
        self.values = dict(zip(kernel.parameters, [*values, 0, 0], strict=False))
        self.all = np.ones(self.threads, bool)

    def operand(self, text: str) -> Numbers | None:
        """Value of a register, symbol or number; None if it is not known."""
        if text in self.known:
            return self.known[text]
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            self.known[text] = np.full(self.threads, int(text.rstrip("U"), 0), np.int64)
        return self.known.get(text)

    def active(self, instruction: Instruction) -> Numbers:
        """Which threads execute it; all, if that depends on data."""
        if not instruction.predicate:
            return self.all
        value = self.operand(instruction.predicate)
        if value is None:
            return self.all
        value = value.astype(bool)
        return ~value if instruction.negated else value

    def everywhere(self, instruction: Instruction) -> bool:
        """Whether all threads take a branch."""
        if instruction.predicate and self.operand(instruction.predicate) is None:
            raise ValueError(f"{instruction.name} {instruction.operands}: depends on data")
        taken = self.active(instruction)
        if taken.any() != taken.all():
            raise ValueError(f"{instruction.name} {instruction.operands}: threads part here")
        return bool(taken.all())

    def address(self, operand: str) -> Numbers:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        value = self.operand(base)
        if value is None:
            raise ValueError(f"{operand}: an address that depends on data")
        return value + int(offset or 0)

    def access(self, instruction: Instruction) -> Access:
        name, operands = instruction.name, instruction.operands
        active = self.active(instruction)
        if name.startswith("cp.async"):
            size, writing = int(operands[2], 0), active
            if len(operands) > 3 and (given := self.operand(operands[3])) is not None:
                active = active & (given > 0)
            to, source = map(self.address, operands[:2])
            return Access("copy", source, size, active, to, writing)
        place = next(x for x in operands if x.startswith("["))
        addresses = self.address(place)
        if "matrix" in name:
            found = re.search(r"\.x(\d)", name)
            return Access("rows", addresses, int(found[1]) if found else 1, active)
        if ".shared" in name:
            return Access("shared", addresses, size_of(name), active)
        if name.startswith("st"):
            return Access("store", addresses, size_of(name), active)
        if size_of(name) == 8:  # perhaps a pointer: each lies in a tensor of its own
            entry = (addresses >> REGION << 20) + (addresses >> 3 & 0xFFFFF)
            self.known[registers(operands[0])[0]] = POINTED + (entry << 28)
        return Access("load", addresses, size_of(name), active)

    def compute(self, instruction: Instruction) -> None:
        """Sets the destination of an instruction, or forgets it."""
        to = instruction.operands[0]
        value = self.result(instruction)
        if to.startswith("{"):  # mov takes a register apart
            self.take_apart(instruction, value)
            return
        old = self.operand(to)
        if instruction.predicate and value is not None and old is not None:
            value = np.where(self.active(instruction), value, old)
        if value is None:
            self.known.pop(to, None)
        else:
            self.known[to] = value

    def take_apart(self, instruction: Instruction, value: Numbers | None) -> None:
        """Sets the registers that share the bits of a number, lowest first."""
        into = members(instruction.operands[0])
        width = bits(words(instruction.name)[-1]) // len(into)
        for n, register in enumerate(into):
            if value is None:
                self.known.pop(register, None)
            else:
                self.known[register] = unsigned(value >> n * width, width)

    def put_together(self, instruction: Instruction) -> Numbers | None:
        """The number whose bits registers share, lowest first."""
        of = members(instruction.operands[1])
        width = bits(words(instruction.name)[-1]) // len(of)
        value = np.zeros(self.threads, np.int64)
        for n, register in enumerate(of):
            part = self.operand(register)
            if part is None:
                return None
            value |= unsigned(part, width) << n * width
        return value

    def result(self, instruction: Instruction) -> Numbers | None:
        parts = words(instruction.name)
        base, kind = parts[0], parts[-1]
        if base == "mov" and instruction.operands[1].startswith("{"):
            return self.put_together(instruction)
        if base == "ld":  # ld.param
            number = self.values[instruction.operands[1].strip("[] ")]
            value = np.full(self.threads, number, np.int64)
            return unsigned(value, bits(kind)) if "%rd" not in instruction.operands[0] else value
        if instruction.name == "setp.lt.f32" and instruction.operands[2] == ORDINARY:
            return self.all
        found = [self.operand(x) for x in instruction.operands[1:]]
        values = [x for x in found if x is not None]
        if len(values) < len(found) or kind[0] == "f" and base != "selp":
            return None
        if base == "setp":
            return compared(parts, kind, values)
        if kind == "pred":
            return ~values[0].astype(bool) if base == "not" else ARITHMETIC[base](*values) != 0
        if base == "shfl":
            lanes = values[0].reshape(-1, 32)
            sources = np.arange(32) ^ values[1].reshape(-1, 32) if parts[2] == "bfly" else None
            sources = values[1].reshape(-1, 32) if parts[2] == "idx" else sources
            return None if sources is None else np.take_along_axis(lanes, sources, 1).ravel()
        if base not in ARITHMETIC:
            return None
        width = bits(kind)
        read = signed if kind[0] == "s" else unsigned
        # the rest of the operands is of other kinds
        of_kind = 1 if base in ("shl", "shr", "bfe") else 2
        values = [read(x, width) if n < of_kind else x for n, x in enumerate(values)]
        if base == "mul" and "hi" in parts:
            return high(values, width)
        value = ARITHMETIC[base](*values)
        if base == "bfe" and kind[0] == "s":
            value = np.where(
                value >> (values[2] - 1) & 1, value - (np.int64(1) << values[2]), value
            )
        if base == "cvt":
            width = bits(parts[-2])
        return unsigned(value, 64 if "wide" in parts else width)


def high(values: Sequence[Numbers], width: int) -> Numbers | None:
    """The upper half of a product."""
    if width == 64:
        return None
    a, b = values
    product = a.astype(object) * b.astype(object)
    return ((product >> width) & ((1 << width) - 1)).astype(np.int64)


def compared(parts: Sequence[str], kind: str, values: Sequence[Numbers]) -> Numbers:
    width = bits(kind)
    read = signed if kind[0] == "s" else unsigned
    result = COMPARISONS[parts[1]](read(values[0], width), read(values[1], width))
    if "and" in parts:
        return result & values[2].astype(bool)
    return result | values[2].astype(bool) if "or" in parts else result


def sample(programs: int, most: int = 3) -> list[int]:
    """Programs of a launch that stand for all: from the middle of as many equal parts."""
    count = min(programs, most)
    return [(2 * n + 1) * programs // (2 * count) for n in range(count)]
