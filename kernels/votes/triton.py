"""The Triton kernel of votes and their gradients, and its launchers.

Votes, du and dW are one operation, a matrix product per input capsule:

    u_hat_i [B, J D] = u_i [B, K] @ W_i [K, J D]
    du_i    [B, K]   = d(u_hat_i) [B, J D] @ W_i^T
    dW_i    [K, J D] = u_i^T @ d(u_hat_i)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import accumulation_type, cdiv, dot_precision, launch, padded


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_ai,
    stride_am,
    stride_ak,
    stride_bi,
    stride_bk,
    stride_bn,
    stride_ci,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c_i [M, N] = a_i [M, K] @ b_i [K, N]; program (i, tile of M, tile of N)."""
    i = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k in range(0, K, BLOCK_K):
        a_k = k + tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
        b_k = k + tl.arange(0, BLOCK_K)[:, None].to(tl.int64)
        p_a = a_ptr + i * stride_ai + o_m * stride_am + a_k * stride_ak
        p_b = b_ptr + i * stride_bi + b_k * stride_bk + o_n * stride_bn
        b_a = tl.load(p_a, (o_m < M) & (a_k < K), 0).to(ACC)
        b_b = tl.load(p_b, (b_k < K) & (o_n < N), 0).to(ACC)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION, out_dtype=ACC)
    p_c = c_ptr + i * stride_ci + o_m * stride_cm + o_n * stride_cn
    tl.store(p_c, acc, (o_m < M) & (o_n < N))


def forward(u: Tensor, W: Tensor) -> Tensor:
    """u_hat [B, N, J, D] from u [B, N, K] and W [N, K, J, D]."""
    B, N = u.shape[:2]
    J, D = W.shape[2:]
    u_hat = u.new_empty(B, N, J, D, dtype=torch.promote_types(u.dtype, W.dtype))
    matmul(u.transpose(0, 1), W.flatten(2), u_hat.flatten(2).transpose(0, 1))
    return u_hat


def backward(grad: Tensor, u: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """du [B, N, K] and dW [N, K, J, D] from the votes' gradient [B, N, J, D]."""
    grad = grad.contiguous().flatten(2).transpose(0, 1)  # [N, B, J * D]
    du, dW = u.new_empty(u.shape), W.new_empty(W.shape)
    matmul(grad, W.flatten(2).mT, du.transpose(0, 1))
    matmul(u.permute(1, 2, 0), grad, dW.flatten(2))
    return du, dW


def matmul(a: Tensor, b: Tensor, c: Tensor) -> None:
    """c_i [M, N] = a_i [M, K] @ b_i [K, N] for every input capsule i, any strides."""
    (capsules, M, K), N = a.shape, b.shape[2]
    if c.numel() == 0:
        return
    block_m, block_n = (min(64, max(16, padded(size))) for size in (M, N))
    launch(
        matmul_kernel,
        (capsules, cdiv(M, block_m), cdiv(N, block_n)),
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(32, max(16, padded(K))),
        ACC=accumulation_type(a, b),
        PRECISION=dot_precision(a, b),
        num_warps=4,
    )
