"""Which implementation runs, and how a Triton kernel is launched."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .library import plain_only
from .verification import trusted

_TRITON = importlib.util.find_spec("triton") is not None  # not asked later: some compilers cannot


def triton_installed() -> bool:
    return _TRITON


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors; read by Triton when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def implementation(x: Tensor, backend: str | None, eager: str, family: str | None = None) -> str:
    """The implementation that a call with tensor `x` and argument `backend` uses.

    None means "triton" on a CUDA device if Triton is installed and the kernels of `family`, one of
    `verification.FAMILIES`, pass their verification on that device; else `eager`, but "reference"
    where nothing else can go, see `plain_only`. Without a family there are no kernels.
    """
    choices = dict.fromkeys([None, "reference", eager, "triton"])
    checks.choice("backend", backend, list(choices))
    if backend != "reference":
        taker = plain_only()
        if taker and backend is not None:
            raise ValueError(
                f'{taker} takes PyTorch\'s own operations only: use backend="reference" or None; '
                f'got "{backend}"'
            )
        if taker:
            return "reference"
    if backend is None:
        fused = family and on_gpu(x) and triton_installed() and trusted(family, x.device)
        return "triton" if fused else eager
    if backend == "triton":
        if not triton_installed():
            raise ValueError('backend="triton" needs the package triton: pip install triton')
        if not on_gpu(x) and not interpreting():
            raise ValueError(
                f'backend="triton" needs tensors on a GPU; got one on {x.device}: move it with '
                ".cuda(), use backend=None, or set TRITON_INTERPRET=1 before starting Python to "
                "run the kernels slowly on the CPU"
            )
    return backend


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time parameters, and the number of warps."""

    def __str__(self) -> str:
        grid = " x ".join(map(str, self.grid))
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel.__name__} [{grid}] {options}"


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)

_matmul_precision: ContextVar[str | None] = ContextVar("matmul_precision", default=None)


@contextmanager
def _here(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Sets a variable; backward passes made inside see it too, for they are made in this thread,
    not in one of the GPU's."""
    token = variable.set(value)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        variable.reset(token)


def at_precision(precision: str) -> AbstractContextManager[None]:
    """Launches inside take this for torch.get_float32_matmul_precision(), which is the whole
    process's."""
    return _here(_matmul_precision, precision)


def highest_precision() -> bool:
    """Whether products of float32 numbers shall be as exact as float32 is."""
    return (_matmul_precision.get() or torch.get_float32_matmul_precision()) == "highest"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs kernel[grid](*args, **options); inside `recording` only notes it down.

    Fused multiply-adds are asked for, unless the options say no: Triton 3.10 no longer makes them
    unasked.
    """
    options.setdefault("enable_fp_fusion", True)
    if torch.version.hip:
        options = amd_options(options)
    recorded = _recorded.get()
    if recorded is None:
        kernel[grid](*args, **options)
    else:
        recorded.append(Launch(kernel, grid, args, options))


def amd_options(options: dict[str, Any]) -> dict[str, Any]:
    """Launch options without what Triton knows for NVIDIA GPUs alone; AMD's matrix units multiply
    float32 as it is."""
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    for name in ("PRECISION", "PRECISION_G"):
        if options.get(name) in ("split", "rounded", "exact"):
            options[name] = "ieee"
    return options


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside instead of making them."""
    launches: list[Launch] = []
    with _here(_recorded, launches):
        yield launches


def compile_ahead(launches: Iterable[Launch], device: torch.device) -> None:
    """Compiles kernels for recorded launches on a GPU, many at a time; one that does not compile
    says why when it is launched."""
    different = {}
    for one in launches:
        args = [x.dtype if isinstance(x, Tensor) else x for x in one.args]
        different[one.kernel, f"{args} {sorted(one.options.items())}"] = one

    def compile_one(one: Launch) -> None:
        with torch.cuda.device(device), suppress(Exception):
            one.kernel.warmup(*one.args, grid=one.grid, **one.options)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, different.values()))


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` current, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside; meta tensors have none, and where it is off this costs less than it."""
    kind = x.device.type
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes ten times as long on the host."""
    return -(-a // b)


def padded(size: int) -> int:
    """The next power of two, which is what a tile's side must be."""
    return 1 << max(size - 1, 0).bit_length()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def accumulation_type(*tensors: Tensor) -> Any:
    """The same for a kernel's argument."""
    import triton.language as tl

    return tl.float64 if accumulation_dtype(*tensors) == torch.float64 else tl.float32


def dot_precision(*tensors: Tensor) -> str:
    """input_precision of tl.dot; torch.set_float32_matmul_precision decides for float32.

    bfloat16 and float16 inputs are exact in tf32.
    """
    if accumulation_dtype(*tensors) == torch.float64:
        return "ieee"
    low = all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    return "ieee" if highest_precision() and not low else "tf32"


def split_precision(*tensors: Tensor) -> str:
    """PRECISION of `routing/dots.py` for a product of float32 numbers with these inputs.

    torch.set_float32_matmul_precision decides for float32; "exact" is for operands that are all
    bfloat16 or float16.
    """
    if accumulation_dtype(*tensors) == torch.float64:
        return "ieee"
    if all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors):
        return "exact"
    return "split" if highest_precision() else "rounded"
