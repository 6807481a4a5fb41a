"""What the accesses of a program cost: wavefronts of L1 and shared memory, sectors of L2.

A wavefront is what the 32 banks of 4 bytes of a multiprocessor deliver in one clock. Two words of
one bank take two. Threads that read the same word share it. Accesses of 8 bytes a thread are made
by half warps, those of 16 bytes by quarter warps: so none of them shares a wavefront with another
half or quarter. What global memory reads through L1 is taken to be stored in the same banks.

L1 keeps the sectors (32 bytes) that the program read last, as many as its share of L1 holds;
writes go to L2. Programs on one multiprocessor are taken to share nothing, but by `side_by_side`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from .addresses import Access, Numbers, region

BANKS, WORD, SECTOR, LINE = 32, 4, 32, 128


class Traffic(NamedTuple):
    """Of one program, or the mean of several."""

    shared: float = 0
    """Wavefronts of shared memory."""
    l1: float = 0
    """Wavefronts of global memory, reads and writes."""
    asked: float = 0
    """Sectors that loads asked L1 for."""
    read: float = 0
    """Sectors that L1 did not hold, so that they came from L2."""
    written: float = 0
    """Sectors written to L2."""
    touched: dict[int, tuple[float, int]] = {}
    """By region (see `addresses`): sectors that were touched, and those from first to last."""
    loaded: frozenset[int] = frozenset()
    """Regions of which something was loaded."""


def counted(addresses: Numbers, size: int, active: Numbers) -> tuple[int, Numbers]:
    """`wavefronts` and `sectors` of one instruction.

    Loops repeat themselves, moved by some lines: this changes the numbers of the sectors alone.
    """
    if not active.any():
        return 0, np.empty(0, np.int64)
    base = int(addresses.min()) // LINE * LINE
    waves, some = of_bytes((addresses - base).tobytes(), size, active.tobytes())
    return waves, some + base // SECTOR


@lru_cache(4096)
def of_bytes(addresses: bytes, size: int, active: bytes) -> tuple[int, Numbers]:
    """The same for arrays as bytes, which can be looked up."""
    arrays = np.frombuffer(addresses, np.int64), size, np.frombuffer(active, bool)
    return wavefronts(*arrays), sectors(*arrays)


def wavefronts(addresses: Numbers, size: int, active: Numbers) -> int:
    """Of one instruction of all warps; `addresses` and `active` [threads], `size` bytes each."""
    words = max(size // WORD, 1)
    group = 32 // words  # threads that are served together
    together = -len(addresses) % group
    addresses = np.pad(addresses, (0, together)).reshape(-1, group, 1)
    active = np.pad(active, (0, together)).reshape(-1, group, 1)
    place = addresses // WORD + np.arange(words)
    place = np.where(active, place, -1).reshape(len(addresses), -1)
    place.sort(axis=1)
    new = place >= 0
    new[:, 1:] &= place[:, 1:] != place[:, :-1]
    row, column = np.nonzero(new)
    bank = row * BANKS + place[row, column] % BANKS
    load = np.bincount(bank, minlength=len(place) * BANKS).reshape(-1, BANKS)
    return int(load.max(axis=1).sum())


def sectors(addresses: Numbers, size: int, active: Numbers) -> Numbers:
    """Numbers of the sectors of each warp, one warp after another."""
    found = []
    for start in range(0, len(addresses), 32):
        some = addresses[start : start + 32][active[start : start + 32]]
        found.append(np.unique(np.concatenate([some, some + size - 1]) // SECTOR))
    return np.concatenate(found)


class Cache:
    """The sectors that were used last."""

    def __init__(self, size: int):
        self.size = size // SECTOR
        self.held: OrderedDict[int, None] = OrderedDict()

    def misses(self, wanted: Iterable[int]) -> int:
        """How many of them were not held; now they are."""
        missed = 0
        for sector in wanted:
            if sector in self.held:
                self.held.move_to_end(sector)
            else:
                missed += 1
                self.held[sector] = None
                if len(self.held) > self.size:
                    self.held.popitem(last=False)
        return missed


def traffic(accesses: Iterable[Access], cache: int) -> Traffic:
    """Of one program whose share of L1 is `cache` bytes."""
    counts: Counter[str] = Counter()
    touched: dict[int, set[int]] = defaultdict(set)
    loaded = set()
    l1 = Cache(cache)
    for kind, addresses, size, active, shared, writing in accesses:
        if kind == "rows":  # 8 rows of a matrix lie with 8 threads
            rows = np.arange(len(addresses)) % 32 < 8 * size
            counts["shared"] += counted(addresses, 16, active & rows)[0]
            continue
        waves, wanted = counted(addresses, size, active)
        if kind == "shared":
            counts["shared"] += waves
            continue
        if shared is not None and writing is not None:
            counts["shared"] += counted(shared, size, writing)[0]
        else:
            counts["l1"] += waves
        if not len(wanted):
            continue
        which = region(int(wanted[0]) * SECTOR)
        touched[which].update(wanted.tolist())
        if kind == "store":
            counts["written"] += len(wanted)
        else:
            loaded.add(which)
            counts["asked"] += len(wanted)
            counts["read"] += l1.misses(wanted.tolist())
    spans = {
        which: (float(len(some)), max(some) - min(some) + 1) for which, some in touched.items()
    }
    return Traffic(**counts, touched=spans, loaded=frozenset(loaded))


def side_by_side(programs: list[Iterable[Access]], cache: int) -> float:
    """Sectors that each of some programs reads from L2, in the mean, if they make their accesses in
    step and have an L1 of `cache` bytes together."""
    l1, read = Cache(cache), 0
    for accesses in zip_longest(*programs):
        for kind, addresses, size, active, *_ in filter(None, accesses):
            if kind in ("load", "copy"):
                read += l1.misses(counted(addresses, size, active)[1].tolist())
    return read / len(programs)


def mean(several: list[Traffic]) -> Traffic:
    """The mean of some programs."""
    count = len(several)
    touched = {}
    for which in {which for one in several for which in one.touched}:
        found = [one.touched.get(which, (0.0, 0)) for one in several]
        touched[which] = (sum(n for n, _ in found) / count, max(span for _, span in found))
    sums = {
        name: sum(getattr(one, name) for one in several) / count for name in Traffic._fields[:5]
    }
    loaded = frozenset().union(*(one.loaded for one in several))
    return Traffic(**sums, touched=touched, loaded=loaded)
