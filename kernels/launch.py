"""Which implementation runs, and how a Triton kernel is launched."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import checks


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors; read by Triton when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def implementation(x: Tensor, backend: str | None, eager: str) -> str:
    """The implementation that a call with tensor `x` and argument `backend` uses.

    None means "triton" on a CUDA device if Triton is installed, and `eager` otherwise.
    """
    choices = dict.fromkeys([None, "reference", eager, "triton"])
    checks.choice("backend", backend, list(choices))
    if backend is None:
        return "triton" if x.device.type == "cuda" and triton_installed() else eager
    if backend == "triton":
        if not triton_installed():
            raise ValueError('backend="triton" needs the package triton: pip install triton')
        if x.device.type != "cuda" and not interpreting():
            raise ValueError(
                f'backend="triton" needs tensors on a GPU; got one on {x.device}: move it with '
                ".cuda(), use backend=None, or set TRITON_INTERPRET=1 before starting Python to "
                "run the kernels slowly on the CPU"
            )
    return backend


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` current, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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
    return "ieee" if torch.get_float32_matmul_precision() == "highest" and not low else "tf32"
