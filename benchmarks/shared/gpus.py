"""Rates of GPUs that times are predicted for. Where each comes from:

multiprocessors, clock, float32 and float64 lanes, tensor cores, device memory, sizes of caches:
    NVIDIA's datasheets and architecture papers. mma.sync on Hopper reaches 62 % of what wgmma does:
    Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture".
integers, special functions, shuffles:
    CUDA C++ Programming Guide, table of arithmetic throughput: 64, 16 and 32 lanes per clock.
L2 bandwidth, latencies of L1, L2 and device memory, launches one after another:
    gpu-l2-cache, gpu-latency and gpu-small-kernels of the benchmarks RRZE-HPC/gpu-benches on
    GitHub, run there on an A100 SXM 80 GB, an H200 or GH200 (the die of the H100), and an L40.
    Latency is that of the nearer half of L2; the other is about twice as far. gpu-cache there also
    finds that L1 delivers close to 128 bytes per clock.
latency of shared memory:
    Abdelkhalik et al. 2022 (A100), the MT4G tool's report of an H100, Luo et al. (Ada).
latency of arithmetic, special functions, tensor cores and shuffles:
    the first two papers, the least that they report.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One multiprocessor's rates are per clock."""

    name: str
    multiprocessors: int
    clock: float
    """Boost clock in Hz."""
    lanes: int
    """float32 multiply-adds of a multiprocessor."""
    double: int
    """float64 multiply-adds of a multiprocessor; tensor cores do twice as many."""
    tensor: float
    """TF32 multiply-adds by mma.sync of a multiprocessor; of 16-bit numbers twice as many."""
    wgmma: float
    """The same by wgmma; 0 where there is none."""
    cache: int
    """Bytes that L1 and shared memory have together."""
    l2_cache: int
    """Bytes that L2 holds of what all multiprocessors use: half of its size, since two partitions
    each keep what their own multiprocessors use (architecture paper of the A100; the same is taken
    for the others)."""
    l2: float
    """Bytes per second that all multiprocessors read from L2."""
    bandwidth: float
    """Bytes per second of device memory."""
    latency: dict[str, float]
    """Clocks until a result can be used: of "shared", "l1", "l2", "dram"."""
    launch: float
    """Seconds that even an empty kernel takes after another; in a CUDA graph it is about half."""


GPUS = {
    "80": Gpu(
        name="A100 SXM 40 GB",
        multiprocessors=108,
        clock=1.41e9,
        lanes=64,
        double=32,
        tensor=512,
        wgmma=0,
        cache=192 << 10,
        l2_cache=20 << 20,
        l2=5.4e12,
        bandwidth=1.555e12,
        latency={"shared": 23, "l1": 33, "l2": 206, "dram": 536},
        launch=2.6e-6,
    ),
    "89": Gpu(
        name="L40",
        multiprocessors=142,
        clock=2.49e9,
        lanes=128,
        double=2,
        tensor=128,
        wgmma=0,
        cache=128 << 10,
        l2_cache=48 << 20,
        l2=5.2e12,
        bandwidth=0.864e12,
        latency={"shared": 30, "l1": 34, "l2": 274, "dram": 624},
        launch=1.7e-6,
    ),
    "90": Gpu(
        name="H100 SXM 80 GB",
        multiprocessors=132,
        clock=1.98e9,
        lanes=128,
        double=64,
        tensor=0.62 * 1024,
        wgmma=1024,
        cache=256 << 10,
        l2_cache=25 << 20,
        l2=9.8e12,
        bandwidth=3.35e12,
        latency={"shared": 30, "l1": 33, "l2": 280, "dram": 640},
        launch=2.5e-6,
    ),
}

INTEGER, SPECIAL = 64, 16
"""Lanes of a multiprocessor per clock, on all of them."""

SCHEDULERS = 4
"""Instructions that a multiprocessor issues per clock, on all of them."""

ARITHMETIC_LATENCY = {"special": 18, "matrix": 18, "shuffle": 22}
"""Clocks until a result can be used, by kind of instruction; `FIXED_LATENCY` of all others."""
FIXED_LATENCY = 4
