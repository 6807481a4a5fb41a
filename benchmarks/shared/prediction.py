"""The time that compiled code lets expect on a GPU that need not be there, and the least there is.

A launch takes at least as long as each of these limits alone, and is predicted to take the longest:

issue      instructions of all warps; a multiprocessor issues four a clock
fp32       multiply-adds, sums and products in float32, and products of integers
fp64       the same in float64
integer    integers, logic, comparisons
tensor     matrix products on tensor cores
mufu       special functions: exponentials, roots, reciprocals
l1         what goes through the banks of L1 and shared memory, one wavefront a clock: conflicts,
           spilled registers and shuffles included
l2         sectors that L1 does not hold, and all that is written
dram       every byte that is touched, once, but those that are loaded and that L2 still holds
           since an earlier launch of the same operation (`residency`)
latency    a warp alone, its results waiting for each other, for as many programs as run one after
           another on one multiprocessor: what occupancy does not hide
launch     what even an empty kernel takes after another

Instructions are those of the machine code, as often as PTX's loops turn (`schedule`); wavefronts
and sectors come from the addresses that the code computes (`addresses`, `traffic`); rates and their
sources stand in `gpus`. There is no queueing, no limit holds up another, programs on one
multiprocessor share nothing in L1, and L2 holds what a launch uses twice: so the truth will be
slower, more so where two limits are near each other. An operation finds none of its inputs in L2.
The floor counts only the multiply-adds that the equations need, and each input and output once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch

from mocapsnet.kernels.launch import Launch

from . import gpus
from .addresses import REGION, Kernel, sample
from .compiled import Compiled, compiled, kind_of, kinds
from .gpus import GPUS, Gpu
from .residency import L2, Touched
from .schedule import Warp, executions, weights
from .traffic import SECTOR, Traffic, mean, side_by_side, traffic

__all__ = ["GPUS", "L2", "Gpu", "floor", "row_of"]


class Work(NamedTuple):
    """What one launch does, for `limits_of`."""

    programs: int
    resident: int
    """Programs that a multiprocessor holds at a time."""
    warps: int
    """Of a program."""
    executed: Counter[str]
    """Machine instructions of one warp, by name."""
    traffic: Traffic
    """Of one program."""
    memory: float
    """Bytes that device memory reads or writes."""
    chain: float
    """Clocks of one warp alone."""
    shared_read: float = 0
    """Sectors that one program reads from L2 if it shares L1 with those beside it."""

    def through_l2(self, read: float) -> float:
        """Bytes, if each program reads so many sectors."""
        return self.programs * (read + self.traffic.written) * SECTOR


def row_of(launch: Launch, architecture: str, l2: L2) -> dict[str, Any]:
    """One launch: what the compiler made of its kernel, the predicted seconds, what binds it.

    `l2` knows the launches before it. Bytes through L2 are those of the prediction, and those if
    programs share L1, being handed out to the multiprocessors in turn.
    """
    made = compiled(launch, architecture)
    code, loop = made.code, made.code.loop
    gpu = GPUS.get(architecture)
    work = work_of(launch, made, gpu, l2) if gpu else None
    found = limits_of(work, gpu) if work and gpu else None
    return (
        dict(
            kernel=launch.kernel.__name__,
            grid=launch.grid,
            warps=launch.options["num_warps"],
            registers=made.registers,
            spills=made.spills,
            spills_in_loops=made.spills_in_loops,
            shared=made.shared,
            shared_limit=made.shared_limit,
            resident=made.resident,
            wide_loads=made.wide_loads,
            instructions=len(code.names),
            loop=len(loop),
            predicted=max(found.values()) if found else None,
            bound=max(found, key=lambda name: found[name]) if found else None,
            l2_bytes=work.through_l2(work.traffic.read) if work else None,
            l2_bytes_sharing=work.through_l2(work.shared_read) if work else None,
        )
        | {f"limit_{name}": seconds for name, seconds in (found or {}).items()}
        | {f"loop_{kind}": n for kind, n in kinds(loop or code.names).items()}
    )


def limits_of(work: Work, gpu: Gpu) -> dict[str, float]:
    """Seconds that each limit alone asks for."""
    busiest = math.ceil(work.programs / gpu.multiprocessors)  # programs of one multiprocessor
    warps = work.warps * busiest
    count = arithmetic(work.executed)
    spilled = sum(n * size(name) for name, n in work.executed.items() if kind_of(name) == "local")
    cycles = {
        "issue": warps * work.executed.total() / gpus.SCHEDULERS,
        "fp32": warps * 32 * (count["fp32"] / gpu.lanes + count["product"] / gpus.INTEGER),
        "fp64": warps * 32 * count["fp64"] / gpu.double,
        "integer": warps * 32 * count["integer"] / gpus.INTEGER,
        "tensor": warps * sum(n * tensor_clocks(x, gpu) for x, n in work.executed.items()),
        "mufu": warps * 32 * count["mufu"] / gpus.SPECIAL,
        "l1": busiest * (work.traffic.shared + work.traffic.l1)
        + warps * (count["shuffle"] + spilled),
        "latency": math.ceil(work.programs / (gpu.multiprocessors * work.resident)) * work.chain,
    }
    return {name: clocks / gpu.clock for name, clocks in cycles.items()} | {
        "l2": work.through_l2(work.traffic.read) / gpu.l2,
        "dram": work.memory / gpu.bandwidth,
        "launch": gpu.launch,
    }


PIPES = {  # by the first letters of an instruction's name
    "fp32": ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"),
    "product": ("IMAD",),
    "fp64": ("DFMA", "DADD", "DMUL", "DSETP"),
    "mufu": ("MUFU",),
    "shuffle": ("SHFL",),
    "integer": ("IADD", "VIADD", "LOP", "SHF", "LEA", "ISETP", "IMNMX", "VIMNMX", "SEL", "SGXT")
    + ("FSEL", "FSETP", "FMNMX", "PRMT", "PLOP3", "IABS", "BFE", "BMSK", "P2R", "R2P", "FCHK"),
}


def arithmetic(executed: Counter[str]) -> Counter[str]:
    """Instructions by the unit that they need."""
    count: Counter[str] = Counter()
    for name, n in executed.items():
        for pipe, prefixes in PIPES.items():
            if name.startswith(prefixes):
                count[pipe] += n
    return count


def size(name: str) -> int:
    """Registers that an instruction loads or stores."""
    return 4 if ".128" in name else 2 if ".64" in name else 1


def tensor_clocks(name: str, gpu: Gpu) -> float:
    """Clocks that a multiprocessor's tensor cores need for an instruction of one warp."""
    found = re.match(r"(HMMA|DMMA|HGMMA)\.(\d+)(?:x(\d+)x(\d+))?", name)
    if not found:
        return 0
    kind, first, n, k = found.groups()
    shapes = {"1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "884": 8 * 8 * 4}
    products = int(first) * int(n) * int(k) / 4 if n and k else shapes[first]  # 4 warps share wgmma
    rate = {"HMMA": gpu.tensor, "HGMMA": gpu.wgmma, "DMMA": 2 * gpu.double}[kind]
    return products / (rate if kind == "DMMA" or "TF32" in name else 2 * rate)


def work_of(launch: Launch, made: Compiled, gpu: Gpu, l2: L2) -> Work:
    """What one launch does, from what the compiler made of it and the addresses it computes."""
    kernel = Kernel(made.ptx)
    bound = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    arguments = [bound[name] for name in made.parameters]
    values = [address(n, x) if isinstance(x, torch.Tensor) else x for n, x in enumerate(arguments)]
    programs = math.prod(launch.grid)
    counts = [0] * len(kernel.instructions)
    cache = max(gpu.cache - made.resident * (made.shared + 1024), 0)
    some = sample(programs)
    flow = mean(
        [traffic(kernel.run(values, launch.grid, n, counts), cache // made.resident) for n in some]
    )
    times = executions(made.code, kernel, [count / len(some) for count in counts])
    sharing = [
        side_by_side(
            [
                kernel.run(values, launch.grid, n, [0] * len(counts))
                for n in neighbours(one, programs, made.resident, gpu.multiprocessors)
            ],
            cache,
        )
        for one in some
    ]
    executed: Counter[str] = Counter()
    for name, n in zip(made.code.names, weights(made.code, times), strict=True):
        executed[name] += n  # type: ignore[assignment]  # a mean of some programs
    regions = touched(flow, arguments, programs)
    held = l2.follow(by_tensor(regions, arguments))
    loaded = sum(
        size - held.get(tensor_of(region, arguments), 0.0)
        for region, size in regions.items()
        if region in flow.loaded
    )
    memory = loaded + sum(size for region, size in regions.items() if region not in flow.loaded)
    warps = launch.options["num_warps"]
    chain = Warp(made.code, times, latency(flow, loaded, programs, gpu)).run()
    read = sum(sharing) / len(sharing)
    return Work(programs, made.resident, warps, executed, flow, memory, chain, read)


def neighbours(program: int, programs: int, resident: int, multiprocessors: int) -> list[int]:
    """Those that a multiprocessor gets together, if programs are handed out in turn: of the first
    that all of them hold at once, or of those after them."""
    together = resident * multiprocessors
    first = program // together * together + program % multiprocessors
    return list(range(first, min(first + together, programs), multiprocessors))


def address(place: int, x: torch.Tensor) -> int:
    """Where the `place`-th argument lies, aligned as it is."""
    return ((place + 1) << REGION) + int(x.storage_offset()) * x.itemsize % 256


def touched(flow: Traffic, arguments: list[Any], programs: int) -> dict[int, float]:
    """Bytes that a launch touches, by region, from the means of one program.

    Programs may touch the same bytes or others: so as many as all of them would if they touched
    others, but at most the whole tensor, or for one whose address is loaded, the part of it that
    lies between the first and the last that a program touches.
    """
    sizes = {}
    for region, (sectors, span) in flow.touched.items():
        known = region <= len(arguments)
        most = span * SECTOR
        if known:
            x = arguments[region - 1]
            most = x.numel() * x.itemsize
        sizes[region] = min(programs * sectors * SECTOR, most)
    return sizes


def tensor_of(region: int, arguments: list[Any]) -> Hashable:
    """Which tensor the region of an argument is, or part of one: the same in all launches of an
    operation. One whose address is loaded is taken for another in each launch."""
    if region > len(arguments):
        return object()
    x = arguments[region - 1]
    return x.untyped_storage()._cdata, x.storage_offset()


def by_tensor(sizes: Mapping[int, float], arguments: list[Any]) -> Touched:
    """The same by tensor, which may be several arguments."""
    found: dict[Hashable, float] = {}
    for region, size in sizes.items():
        tensor = tensor_of(region, arguments)
        found[tensor] = max(size, found.get(tensor, 0.0))
    return found


def latency(flow: Traffic, loaded: float, programs: int, gpu: Gpu) -> dict[str, float]:
    """Clocks until what is loaded can be used; of global memory, by the share of each cache, if
    `loaded` bytes come from device memory."""
    asked, read = max(flow.asked, 1), max(programs * flow.read * SECTOR, 1)
    missed, far = flow.read / asked, min(loaded / read, 1)
    clocks = gpu.latency
    beyond = (1 - far) * clocks["l2"] + far * clocks["dram"]
    found = {"shared": clocks["shared"], "local": clocks["l1"]}
    return found | {"global": (1 - missed) * clocks["l1"] + missed * beyond}


def floor(sizes: tuple[int, ...], iterations: int, itemsize: int, gpu: Gpu) -> float:
    """Seconds that forward and backward of rba, "final", take at least.

    All multiply-adds are made by the faster of the float32 lanes and the tensor cores, on which a
    product of float32 numbers takes three of TF32.
    """
    B, N, K, J, D = sizes
    forward = K + (iterations - 1) * (K + 2)  # votes; with logit and weighted sum
    backward = 1 + K + 1 + K  # c ds and du; c ds again and dW
    rate = {2: 2 * gpu.tensor, 4: max(gpu.lanes, gpu.tensor / 3), 8: 2 * gpu.double}[itemsize]
    arithmetic = B * N * J * D * (forward + backward) / gpu.multiprocessors / rate / gpu.clock
    values = 2 * (B * N * K + N * K * J * D + B * J * D)
    return max(arithmetic, values * itemsize / gpu.bandwidth)
