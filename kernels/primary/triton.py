"""Triton kernels of primary capsules, and their launchers.

A program owns BLOCK positions of one channel group of one image: it reads its K channels with the
strides of the convolution's output, contiguous or channels-last, and writes whole capsules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..launch import accumulation_type, cdiv, launch, padded

ELEMENTS = 1024
"""Elements of one program's tile."""


@triton.jit
def offsets(
    G: tl.constexpr,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Offsets of a tile [BLOCK, BLOCK_K] in the features and among the capsules, and its mask.

    LAST: the features are channels-last.
    """
    image = tl.program_id(0).to(tl.int64) // G
    group = tl.program_id(0).to(tl.int64) % G
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if LAST:
        o_features = (image * POSITIONS + p) * G * K + group * K + k
    else:
        o_features = ((image * G + group) * K + k) * POSITIONS + p
    o_capsules = (tl.program_id(0).to(tl.int64) * POSITIONS + p) * K + k
    return o_features, o_capsules, (p < POSITIONS) & (k < K)


@triton.jit
def forward_kernel(
    features_ptr,
    v_ptr,
    G: tl.constexpr,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    o_features, o_capsules, m = offsets(G, K, POSITIONS, LAST, BLOCK, BLOCK_K)
    b_s = tl.load(features_ptr + o_features, m, 0).to(ACC)
    tl.store(v_ptr + o_capsules, device.squash(b_s, 1), m)


@triton.jit
def backward_kernel(
    features_ptr,
    dv_ptr,
    dfeatures_ptr,
    G: tl.constexpr,
    K: tl.constexpr,
    POSITIONS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    o_features, o_capsules, m = offsets(G, K, POSITIONS, LAST, BLOCK, BLOCK_K)
    b_s = tl.load(features_ptr + o_features, m, 0).to(ACC)
    b_dv = tl.load(dv_ptr + o_capsules, m, 0).to(ACC)
    tl.store(dfeatures_ptr + o_features, device.squash_gradient(b_s, b_dv, 1), m)


def forward(features: Tensor, dim: int) -> Tensor:
    """Capsules [B, (C // dim) * H * Wd, dim] of feature maps [B, C, H, Wd], which are contiguous
    or channels-last."""
    B, C, H, Wd = features.shape
    v = features.new_empty(B, C // dim * H * Wd, dim)
    run(forward_kernel, features, dim, features, v)
    return v


def backward(features: Tensor, dv: Tensor, dim: int) -> Tensor:
    """dfeatures [B, C, H, Wd], in the memory format of the features, from dv."""
    dfeatures = torch.empty_like(features)
    run(backward_kernel, features, dim, features, dv.contiguous(), dfeatures)
    return dfeatures


def run(kernel: triton.JITFunction, features: Tensor, dim: int, *tensors: Tensor) -> None:
    B, C, H, Wd = features.shape
    G, positions = C // dim, H * Wd
    if features.numel() == 0:
        return
    block = max(1, min(ELEMENTS // padded(dim), padded(positions)))
    launch(
        kernel,
        (B * G, cdiv(positions, block)),
        *tensors,
        G=G,
        K=dim,
        POSITIONS=positions,
        LAST=not features.is_contiguous(),
        BLOCK=block,
        BLOCK_K=padded(dim),
        ACC=accumulation_type(features),
        num_warps=4,
    )
