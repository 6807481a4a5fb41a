"""Triton kernels of squash, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..launch import accumulation_type, cdiv, launch, padded

ELEMENTS = 2048
"""Elements of one program's tile."""


@triton.jit
def forward_kernel(
    s_ptr,
    v_ptr,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    m = (row < rows) & (d < D)
    b_s = tl.load(s_ptr + row * D + d, m, 0).to(ACC)
    tl.store(v_ptr + row * D + d, device.squash(b_s, 1), m)


@triton.jit
def backward_kernel(
    s_ptr,
    dv_ptr,
    ds_ptr,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    m = (row < rows) & (d < D)
    b_s = tl.load(s_ptr + row * D + d, m, 0).to(ACC)
    b_dv = tl.load(dv_ptr + row * D + d, m, 0).to(ACC)
    tl.store(ds_ptr + row * D + d, device.squash_gradient(b_s, b_dv, 1), m)


def forward(s: Tensor) -> Tensor:
    """squash of s [..., D]."""
    s = s.contiguous()
    v = torch.empty_like(s)
    run(forward_kernel, s, v)
    return v


def backward(s: Tensor, dv: Tensor) -> Tensor:
    """ds [..., D] from s and dv."""
    s, dv = s.contiguous(), dv.contiguous()
    ds = torch.empty_like(s)
    run(backward_kernel, s, dv, ds)
    return ds


def run(kernel: triton.JITFunction, s: Tensor, *others: Tensor) -> None:
    D = s.shape[-1]
    rows = s.numel() // D if D else 0
    block = max(1, ELEMENTS // padded(D))
    if rows:
        launch(
            kernel,
            (cdiv(rows, block),),
            s,
            *others,
            rows,
            D=D,
            BLOCK=block,
            BLOCK_D=padded(D),
            ACC=accumulation_type(s),
            num_warps=4,
        )
