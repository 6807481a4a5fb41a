"""Compiles launches for GPUs that need not be there, and reads what the compiler made of them."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mocapsnet.kernels.launch import Launch, amd_options


class Multiprocessor(NamedTuple):
    """Limits of a multiprocessor, from the CUDA programming guide, section compute capabilities."""

    threads: int
    blocks: int
    shared: int
    """Bytes of shared memory, of which each block takes 1,024 for the system."""
    program_shared: int
    """Bytes of shared memory that one program may use."""


NVIDIA = {  # compute capability
    "80": Multiprocessor(2048, 32, 167_936, 166_912),
    "86": Multiprocessor(1536, 16, 102_400, 101_376),
    "89": Multiprocessor(1536, 24, 102_400, 101_376),
    "90": Multiprocessor(2048, 32, 233_472, 232_448),
    "100": Multiprocessor(2048, 32, 233_472, 232_448),
    "120": Multiprocessor(1536, 24, 102_400, 101_376),
}
NVIDIA_REGISTERS = 65_536
"""Registers of a multiprocessor, on all of them."""

AMD = ("gfx942",)
"""AMD Instinct MI300; limits of its compute units stand in `resident_amd`."""
AMD_SHARED = 65_536

ARCHITECTURES = (*NVIDIA, *AMD)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

KINDS = {  # by the first letters of an instruction's name, in this order; AMD's are in lower case
    "fma": ("FFMA", "DFMA", "HFMA2", "v_fma", "v_pk_fma"),
    "float": ("FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "FCHK", "DADD", "DMUL", "DSETP", "HADD2")
    + ("v_add_f", "v_mul_f", "v_sub_f", "v_max_f", "v_pk_add_f", "v_pk_mul_f", "v_div_f"),
    "matrix": ("HMMA", "DMMA", "HGMMA", "QGMMA", "UTCHMMA", "v_mfma"),
    "special": ("MUFU", "v_exp", "v_rcp", "v_sqrt", "v_rsq"),
    "convert": ("F2F", "I2F", "F2I", "F2FP", "PRMT", "v_cvt"),
    "shuffle": ("SHFL", "ds_bpermute", "ds_swizzle"),
    "barrier": ("BAR", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "SYNCS", "s_barrier"),
    "global": ("LDG", "STG", "LDGSTS", "LD.", "ST.", "global_", "buffer_", "flat_"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ds_"),
    "local": ("LDL", "STL", "scratch_"),
}


class Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        if self.architecture in AMD:
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", int(self.architecture), 32)

    def get_current_device(self) -> str:
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_for(architecture: str) -> None:
    """From here on Triton compiles for this architecture."""
    driver.set_active(Driver(architecture))


class Code(NamedTuple):
    """Machine code in its order."""

    names: list[str]
    operands: list[str]
    """Of each instruction, after its guard if it has one, as "@P0 R1, R2"."""
    loops: list[tuple[int, int]]
    """First instruction of every loop, and the one after its last; outer loops before inner."""

    @property
    def loop(self) -> list[str]:
        """Names of the longest innermost loop."""
        inner = [a for a in self.loops if not any(a != b and within(b, a) for b in self.loops)]
        start, end = max(inner, key=lambda span: span[1] - span[0], default=(0, 0))
        return self.names[start:end]


def within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


class Compiled(NamedTuple):
    """What one launch's kernel became."""

    registers: int
    """Of each thread."""
    spills: int
    """Instructions that store a register to memory for want of registers."""
    shared: int
    shared_limit: int
    """Bytes of shared memory: used, and the most that a program may use."""
    resident: int
    """Programs that a multiprocessor holds at a time."""
    code: Code
    ptx: str
    """Empty on AMD."""
    parameters: list[str]
    """Names of the kernel's arguments that are not compile-time constants."""

    @property
    def spills_in_loops(self) -> int:
        """Instructions in loops that store such a register or load it again."""
        return sum(
            kind_of(name) == "local"
            for n, name in enumerate(self.code.names)
            if any(start <= n < end for start, end in self.code.loops)
        )

    @property
    def wide_loads(self) -> int:
        """Loads of 128 bits by each thread."""
        wide = re.compile(r"LDG\S*\.128|(global|buffer)_load_dwordx4")
        return sum(bool(wide.match(name)) for name in self.code.names)


def compiled(launch: Launch, architecture: str) -> Compiled:
    """Compiles the kernel of a launch; `compile_for` the architecture comes first."""
    options = amd_options(launch.options) if architecture in AMD else launch.options
    binary = launch.kernel.warmup(*launch.args, grid=launch.grid, **options)
    shared, warps = binary.metadata.shared, options["num_warps"]
    kinds_of = binary.src.signature
    parameters = [name for name in launch.kernel.arg_names if kinds_of[name] != "constexpr"]
    if architecture in AMD:
        text = binary.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        fits = resident_amd(registers, warps, shared)
        code = parse_amd(text)
        return Compiled(registers, spills, shared, AMD_SHARED, fits, code, "", parameters)
    registers, code = machine_code(binary.asm["cubin"])
    spills = sum(name.startswith("STL") for name in code.names)
    limits = NVIDIA[architecture]
    fits = resident_nvidia(limits, registers, warps, shared)
    most, ptx = limits.program_shared, binary.asm["ptx"]
    return Compiled(registers, spills, shared, most, fits, code, ptx, parameters)


@lru_cache(256)
def machine_code(cubin: bytes) -> tuple[int, Code]:
    """Registers of a thread, and the code; a launcher makes some launches more than once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = inspect(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = parse_nvidia(inspect(TOOLS / "nvdisasm", "-c", "-ndf", file.name))
    return int(re.findall(r"REG:(\d+)", usage)[0]), code


def inspect(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resident_nvidia(limits: Multiprocessor, registers: int, warps: int, shared: int) -> int:
    per_warp = math.ceil(registers / 8) * 8 * 32
    return min(
        NVIDIA_REGISTERS // (per_warp * warps),
        limits.threads // (32 * warps),
        limits.blocks,
        limits.shared // (shared + 1024),
    )


def resident_amd(registers: int, waves: int, shared: int) -> int:
    """Of a compute unit of gfx942: 4 SIMDs of 512 registers a lane and at most 8 waves each."""
    at_a_time = 4 * min(8, 512 // (math.ceil(max(registers, 1) / 8) * 8))
    return min(at_a_time // waves, AMD_SHARED // max(shared, 1))


def parse_nvidia(code: str) -> Code:
    return parse(
        code,
        label=re.compile(r"\s*(\.L_x_\d+):"),
        instruction=re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)"),
        branch="BRA",
        target=re.compile(r"\(?(\.L_x_\d+)\)?"),
    )


def parse_amd(code: str) -> Code:
    return parse(
        code,
        label=re.compile(r"(\.LBB\d+_\d+):"),
        instruction=re.compile(r"\t()([a-z]\w+)(.*)"),
        branch="s_cbranch",
        target=re.compile(r"(\.LBB\d+_\d+)"),
    )


def parse(
    code: str,
    *,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    branch: str,
    target: re.Pattern[str],
) -> Code:
    """What a disassembly holds."""
    names: list[str] = []
    operands: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(names)
        elif found := instruction.match(line):
            guard, name, rest = found.groups()
            names.append(name)
            operands.append((guard or "") + rest.split(";")[0].strip())
            to = target.search(rest)
            if name.startswith(branch) and to and to[1] in labels:
                if len(names) - labels[to[1]] > 2:  # not the endless loop after the end
                    loops.append((labels[to[1]], len(names)))
    while names and names[-1] == "NOP":  # fills the last line of the instruction cache
        names.pop(), operands.pop()
    return Code(names, operands, sorted(loops, key=lambda span: (span[0], -span[1])))


@cache
def kind_of(name: str) -> str:
    """Kind of an instruction; what is not arithmetic or memory is "other"."""
    return next((k for k, prefixes in KINDS.items() if name.startswith(prefixes)), "other")


def kinds(instructions: list[str]) -> Counter[str]:
    """How many instructions are of each kind."""
    return Counter(map(kind_of, instructions))
