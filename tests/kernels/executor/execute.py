"""Executes the PTX that Triton compiles, on the CPU, and checks every access of memory.

`install(architecture)` replaces the launches of all Triton kernels: they run here, on CPU tensors.
Found are: accesses out of bounds or misaligned; shared memory read before it is written; races
between warps of a program since the last barrier, byte by byte; races between the programs of a
launch; asynchronous copies used before they are waited for; threads that part before a barrier;
tensor cores that read shared memory without a fence. Products of TF32 drop 13 bits of their
factors, as tensor cores do; approximate instructions are exact here. What ptxas makes of the PTX,
and time, are not modelled.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .decode import OPS, TYPES, Program, Unsupported

SOURCE = Path(__file__).parent / "core.cpp"
BUILT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mocapsnet-tests"

KINDS = """out of bounds, global|out of bounds, shared|misaligned
shared memory read before written|race of warps, shared|race of warps, global|race of programs
asynchronous copy not waited for|divergence at a synchronisation|deadlock at a barrier
instruction limit or unknown instruction|lanes without convergence, shared
lanes without convergence, global|same value written twice, shared|same value written twice, global
same value written by two programs|asynchronous copy never waited for
tensor cores without a fence|lanes of one store disagree""".replace("\n", "|").split("|")

HARMLESS = {kind for kind in KINDS if kind.startswith(("lanes", "same"))}
HARMLESS |= {"asynchronous copy never waited for"}
"""What cannot change a result: hardware runs lanes in step, and equal values cannot differ."""

BASE = 0x7E00_0000_0000
"""Address of the arena that stands for a GPU's memory."""

GUARD = 1 << 16
"""Bytes between tensors there that nothing may touch."""

LIMIT = 10**9
"""Steps of a launch after which it is taken for endless."""

SPECIAL = ["tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z", "ntid.x"]
SPECIAL += ["laneid"]

LONG = [("addr", "<i8"), ("count", "<i8")]
FAULT = np.dtype(
    [(n, "<i4") for n in "kind ins cta warp lane other".split()]
    + [("addr", "<i8"), ("count", "<i8")]
)


class Job(ctypes.Structure):
    """As in the core."""

    _fields_ = (
        [("ins", ctypes.c_void_p), ("n_ins", ctypes.c_int64), ("pool", ctypes.c_void_p)]
        + [("n_rows", ctypes.c_int64), ("const_rows", ctypes.c_void_p)]
        + [("const_vals", ctypes.c_void_p), ("n_const", ctypes.c_int64)]
        + [(n, ctypes.c_int64) for n in ("threads", "gx", "gy", "gz")]
        + [("arena", ctypes.c_void_p), ("ok", ctypes.c_void_p)]
        + [("arena_size", ctypes.c_uint64), ("base", ctypes.c_uint64)]
        + [("shared", ctypes.c_int64), ("limit", ctypes.c_uint64)]
        + [("special", ctypes.c_void_p), ("out", ctypes.c_void_p), ("max_out", ctypes.c_int64)]
    )


@cache
def core() -> ctypes.CDLL:
    """The core, built once for its source."""
    defines = [f"-DOPS={','.join(OPS)}", f"-DTYPES={','.join(TYPES)}"]
    flags = "-O2 -march=native -ffp-contract=off -std=c++17 -shared -fPIC".split()
    name = hashlib.sha256(repr((SOURCE.read_text(), defines, flags)).encode()).hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    built = BUILT / f"executor.{name}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            made = Path(folder) / "core.so"
            subprocess.run(["g++", *flags, *defines, str(SOURCE), "-o", str(made)], check=True)
            made.rename(built)
    library = ctypes.CDLL(str(built))
    library.run.restype = ctypes.c_int64
    library.run.argtypes = [ctypes.POINTER(Job)]
    return library


class Memory:
    """A guarded copy of tensors: a byte is accessible only if an argument covers it."""

    def __init__(self) -> None:
        self.size = GUARD
        self.regions: dict[int, tuple[int, int, int]] = {}
        """Of a storage: its offset here, bytes, and its true address."""
        self.covers: list[tuple[torch.Tensor, int]] = []
        self.tables: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """The address of a tensor in the arena."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or id(tensor)
        if key not in self.regions:
            skew = storage.data_ptr() % 256 if storage.nbytes() else 0
            self.regions[key] = (self.size + skew, storage.nbytes(), storage.data_ptr())
            self.size = -(-(self.size + skew + storage.nbytes()) // 512) * 512 + GUARD
        self.covers.append((tensor, self.regions[key][0]))
        return BASE + self.regions[key][0] + tensor.storage_offset() * tensor.itemsize

    def add_table(self, table: torch.Tensor, pointed: list[torch.Tensor]) -> int:
        """The address of a table of the addresses of other tensors."""
        self.tables.append((table, pointed))
        for x in pointed:
            self.add(x)
        return self.add(table)

    def fill(self) -> None:
        """Copies what the tensors hold."""
        self.bytes = np.zeros(self.size, np.uint8)
        self.ok = np.zeros(self.size, np.uint8)
        for offset, size, address in self.regions.values():
            if size:
                ctypes.memmove(self.bytes.ctypes.data + offset, address, size)
        for tensor, offset in self.covers:
            if tensor.numel():
                n = tensor.itemsize
                mask = torch.zeros(tensor.untyped_storage().nbytes() // n, dtype=torch.bool)
                mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
                covered = mask.numpy().repeat(n)
                self.ok[offset : offset + len(covered)] |= covered
        for table, pointed in self.tables:
            addresses = torch.tensor([self.add(x) for x in pointed])
            assert [x.data_ptr() for x in pointed] == table.tolist()
            at = self.add(table) - BASE
            self.bytes[at : at + 8 * len(pointed)] = addresses.numpy().view(np.uint8)

    def back(self) -> None:
        """Copies to the tensors what was written."""
        tables = {t.untyped_storage().data_ptr() for t, _ in self.tables}
        for offset, size, address in self.regions.values():
            if size and address not in tables:
                ctypes.memmove(address, self.bytes.ctypes.data + offset, size)


class Finding(NamedTuple):
    """A rule that a launch breaks, at one instruction."""

    kind: str
    count: int
    where: str
    """The first time."""
    instruction: str
    other: str
    """The instruction that it met, where one is known."""

    def __str__(self) -> str:
        met = f" after {self.other}" if self.other else ""
        return f"{self.kind} x{self.count}: {self.instruction}{met}, first {self.where}"


def run(
    program: Program, values: list[Any], grid: tuple[int, ...], memory: Memory, shared: int
) -> list[Finding]:
    """Runs a launch; values are of the parameters, as integers or floats."""
    x, y, z = (*grid, 1, 1)[:3]
    constants = dict(program.constants)
    for (ty, name), value in zip(program.params, [*values, 0, 0], strict=False):
        if name in program.rows:
            if isinstance(value, float):
                value = int(np.array(value, np.float32).view(np.uint32))
            if ty not in ("u64", "b64", "u32", "b32", "f32", "s32"):
                raise Unsupported(f"parameter of type {ty}")
            constants[program.rows[name]] = value & ((1 << 64) - 1)
    rows = np.array(list(constants), np.int32)
    contents = np.array(list(constants.values()), np.uint64)
    special = np.array([program.rows.get(f"%{n}", -1) for n in SPECIAL], np.int32)
    pool = np.array(program.pool or [0], np.int32)
    found = np.zeros(512, FAULT)
    job = Job(
        *(program.code.ctypes.data, len(program.code), pool.ctypes.data),
        *(max(program.rows.values()) + 1, rows.ctypes.data, contents.ctypes.data, len(rows)),
        *(program.threads, x, y, z),
        *(memory.bytes.ctypes.data, memory.ok.ctypes.data, memory.size, BASE, shared, LIMIT),
        *(special.ctypes.data, found.ctypes.data, len(found)),
    )
    count = core().run(ctypes.byref(job))
    return [finding(fault, program) for fault in found[:count]]


def finding(fault: Any, program: Program) -> Finding:
    def at(place: int) -> str:
        return f"{program.text[place]} [{program.where[place]}]" if place >= 0 else ""

    where = "program {cta} warp {warp} lane {lane}".format(**{n: fault[n] for n in FAULT.names})
    where += f" address {int(fault['addr']):#x}"
    kind, count = KINDS[fault["kind"]], int(fault["count"])
    return Finding(kind, count, where, at(fault["ins"]), at(fault["other"]))


class Session:
    """All launches since `clear`, and what compiled them."""

    def __init__(self) -> None:
        self.compile: Any = None
        self.ran: list[tuple[str, list[Finding]]] = []
        """Kernels, and what was found."""
        self.count = 0
        self.programs: dict[str, Program] = {}
        self.tables: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        """Tensors that hold addresses, by their own, with what they point to."""

    def clear(self) -> None:
        self.ran = []

    def launch(
        self, function: Any, args: tuple[Any, ...], grid: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        made = self.compile(function, *args, grid=grid, warmup=True, **options)
        ptx = made.asm["ptx"]
        if ptx not in self.programs:
            self.programs[ptx] = Program(ptx)
        program = self.programs[ptx]
        bound = dict(zip(function.arg_names, args, strict=False)) | options
        memory, values = Memory(), []
        for name in function.arg_names:
            if made.src.signature[name] == "constexpr":
                continue
            value = bound[name]
            if isinstance(value, torch.Tensor):
                known = self.tables.get(value.data_ptr()) if value.dtype == torch.int64 else None
                value = memory.add_table(value, known[1]) if known else memory.add(value)
            values.append(value)
        if len(values) + 2 != len(program.params):
            raise Unsupported(f"{len(values)} arguments, {len(program.params)} parameters")
        memory.fill()
        findings = run(program, values, grid, memory, made.metadata.shared)
        memory.back()
        self.ran.append((function.__name__, findings))
        self.count += 1


def install(architecture: int) -> Session:
    """From here on launches of Triton kernels are executed by this module, on CPU tensors.

    Nothing is assembled: the stage after PTX is left out. So what is compiled is of no use to a
    GPU: TRITON_CACHE_DIR must be a folder of its own.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    session = Session()
    session.compile = JITFunction.run
    driver.set_active(Driver())

    def launch(
        self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> object:
        if warmup:
            return session.compile(self, *args, grid=grid, warmup=True, **options)
        return session.launch(self, args, grid, options)

    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: b""
    JITFunction.run = launch
    return session
