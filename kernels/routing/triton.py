"""Triton kernels of routing by agreement, and their launchers. Equations: README.md.

Two forms. *On chip*: a program owns a sample, holds all its votes [N, J, D] in registers and runs
every iteration. *Streamed*: a program owns a tile of the batch and a slice of the input capsules,
holds the state [B, J, D], and walks over its input capsules; votes are made, used and dropped.
The tiles of both are written [X, J, D], X being input capsules on chip and samples when streamed,
so that both share the functions at the top.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..launch import accumulation_dtype, accumulation_type, dot_precision, padded


@triton.jit
def votes(p_u, m_u, p_W, m_W, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """u_hat [X, J, D] as K rank-one updates (equation 1); p_u and p_W point at component k = 0."""
    u_hat = tl.load(p_u, m_u, 0).to(ACC) * tl.load(p_W, m_W, 0).to(ACC)
    for k in tl.static_range(1, K):
        u_hat += tl.load(p_u + k, m_u, 0).to(ACC) * tl.load(p_W + k * J * D, m_W, 0).to(ACC)
    return u_hat


@triton.jit
def input_gradient(
    p_du, m_u, p_W, m_W, g, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr
):
    """Stores du_i = sum_j W_ij d(u_hat_ij) (equation 14), one component k after the other."""
    for k in tl.static_range(K):
        b_W = tl.load(p_W + k * J * D, m_W, 0).to(ACC)
        b_du = tl.sum(tl.sum(g * b_W, 2, keep_dims=True), 1, keep_dims=True)
        tl.store(p_du + k, b_du, m_u)


@triton.jit
def couplings(u_hat, V, valid):
    """c_ij = softmax_j(u_hat_ij . V_j) [X, J, 1] (equations 3 and 4)."""
    return device.softmax(tl.sum(u_hat * V, 2, keep_dims=True), valid, 1)


@triton.jit
def state(s_ptr, o_v, m_v, stride_r, r, like):
    """V_j of iteration r (equation 4), from the sums s of the iterations before it."""
    V = tl.zeros_like(like)
    for q in range(0, r):
        V += device.squash(tl.load(s_ptr + q * stride_r + o_v, m_v, 0), 2)
    return V


@triton.jit(do_not_specialize=["B", "N"])
def on_chip_forward_kernel(
    u_ptr,
    W_ptr,
    bias_ptr,
    v_ptr,
    s_ptr,
    B,
    N,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[:, None, None]
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    u_hat = votes(
        u_ptr + (b * N + i) * K,
        i < N,
        W_ptr + i * K * J * D + j * D + d,
        (i < N) & m_v,
        K,
        J,
        D,
        ACC,
    )  # [N, J, D]
    bias = tl.zeros([1, BLOCK_J, BLOCK_D], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + j * D + d, m_v, 0).to(ACC)
    s = tl.sum(u_hat, 0, keep_dims=True) / J + bias
    tl.store(s_ptr + o_v, s, m_v)
    v = device.squash(s, 2)
    V = tl.zeros_like(v)
    for r in tl.static_range(1, R):
        V += v
        s = tl.sum(couplings(u_hat, V, j < J) * u_hat, 0, keep_dims=True) + bias
        tl.store(s_ptr + r * B.to(tl.int64) * J * D + o_v, s, m_v)
        v = device.squash(s, 2)
    tl.store(v_ptr + o_v, v, m_v)


@triton.jit(do_not_specialize=["B", "N"])
def on_chip_backward_kernel(
    u_ptr,
    W_ptr,
    s_ptr,
    dv_ptr,
    du_ptr,
    c_ptr,
    ds_ptr,
    B,
    N,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[:, None, None]
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    p_W, m_W = W_ptr + i * K * J * D + j * D + d, (i < N) & m_v
    o_u = (b * N + i) * K
    u_hat = votes(u_ptr + o_u, i < N, p_W, m_W, K, J, D, ACC)  # [N, J, D]
    stride_r = B.to(tl.int64) * J * D
    b_s = tl.load(s_ptr + (R - 1) * stride_r + o_v, m_v, 0)
    ds = device.squash_gradient(b_s, tl.load(dv_ptr + o_v, m_v, 0).to(ACC), 2)  # [1, J, D]
    V = state(s_ptr, o_v, m_v, stride_r, R - 1, ds)
    c = couplings(u_hat, V, j < J)  # [N, J, 1]
    input_gradient(du_ptr + o_u, i < N, p_W, m_W, c * ds, K, J, D, ACC)
    tl.store(c_ptr + (b * N + i) * J + j, c, (i < N) & (j < J))
    tl.store(ds_ptr + o_v, ds, m_v)


@triton.jit(do_not_specialize=["B", "N", "per_slice", "r"])
def streamed_forward_kernel(
    u_ptr,
    W_ptr,
    s_ptr,
    partial_ptr,
    B,
    N,
    per_slice,
    r,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """s of iteration r over one slice of the input capsules each, partial [slices, B, J, D]."""
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    first = tl.program_id(1).to(tl.int64) * per_slice
    acc = tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC)
    V = state(s_ptr, o_v, m_v, B.to(tl.int64) * J * D, r, acc)
    for i in range(first, tl.minimum(first + per_slice, N)):
        p_W = W_ptr + i * K * J * D + j * D + d
        u_hat = votes(
            u_ptr + (b * N + i) * K, b < B, p_W, (j < J) & (d < D), K, J, D, ACC
        )  # [B, J, D]
        if UNIFORM:
            acc += u_hat
        else:
            acc += couplings(u_hat, V, j < J) * u_hat
    if UNIFORM:
        acc = acc / J
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * B * J * D + o_v, acc, m_v)


@triton.jit(do_not_specialize=["slices", "B"])
def finish_kernel(
    partial_ptr,
    bias_ptr,
    s_ptr,
    v_ptr,
    slices,
    B,
    J: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """s and v [B, J, D] of one iteration: the slices' sums in fixed order, the bias, squash."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    m = (j < J) & (d < D)
    o = b * J * D + j * D + d
    s = tl.zeros([BLOCK_J, BLOCK_D], ACC)
    p_partial = partial_ptr + o
    for _ in range(slices):
        s += tl.load(p_partial, m, 0)
        p_partial += B.to(tl.int64) * J * D
    if HAS_BIAS:
        s += tl.load(bias_ptr + j * D + d, m, 0).to(ACC)
    tl.store(s_ptr + o, s, m)
    tl.store(v_ptr + o, device.squash(s, 1), m)


@triton.jit(do_not_specialize=["B", "N", "begin", "end", "per_slice", "R"])
def streamed_backward_kernel(
    u_ptr,
    W_ptr,
    s_ptr,
    dv_ptr,
    du_ptr,
    c_ptr,
    ds_ptr,
    B,
    N,
    begin,
    end,
    per_slice,
    R,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """du, and the couplings [B, end - begin, J] and ds that dW needs, for i from begin to end."""
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    m_W = (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    stride_r = B.to(tl.int64) * J * D
    first = begin + tl.program_id(1).to(tl.int64) * per_slice
    b_s = tl.load(s_ptr + (R - 1) * stride_r + o_v, m_v, 0)
    ds = device.squash_gradient(b_s, tl.load(dv_ptr + o_v, m_v, 0).to(ACC), 2)  # [B, J, D]
    if tl.program_id(1) == 0:
        tl.store(ds_ptr + o_v, ds, m_v)
    V = state(s_ptr, o_v, m_v, stride_r, R - 1, ds)
    for i in range(first, tl.minimum(first + per_slice, end)):
        p_W = W_ptr + i * K * J * D + j * D + d
        o_u = (b * N + i) * K
        u_hat = votes(u_ptr + o_u, b < B, p_W, m_W, K, J, D, ACC)  # [B, J, D]
        c = couplings(u_hat, V, j < J)
        input_gradient(du_ptr + o_u, b < B, p_W, m_W, c * ds, K, J, D, ACC)
        tl.store(c_ptr + (b * (end - begin) + i - begin) * J + j, c, (b < B) & (j < J))


@triton.jit(do_not_specialize=["B", "N", "begin", "end"])
def weight_gradient_kernel(
    u_ptr,
    c_ptr,
    ds_ptr,
    dW_ptr,
    B,
    N,
    begin,
    end,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_i = sum_b u_i (x) c_ij ds_j (equations 8 and 14) for one i and a tile of j."""
    i = begin + tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    dW = tl.zeros([BLOCK_K, BLOCK_J * BLOCK_D], ACC)
    for start in range(0, B, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b = row[:, None, None]
        p_c = c_ptr + (b * (end - begin) + i - begin) * J + j
        b_c = tl.load(p_c, (b < B) & (j < J), 0)
        b_ds = tl.load(ds_ptr + (b * J + j) * D + d, (b < B) & (j < J) & (d < D), 0)
        g = tl.reshape(b_c * b_ds, [BLOCK_B, BLOCK_J * BLOCK_D])
        p_u = u_ptr + (row[None, :] * N + i) * K + k
        b_u = tl.load(p_u, (row[None, :] < B) & (k < K), 0).to(ACC)  # [K, B]
        dW = tl.dot(b_u, g, dW, input_precision=PRECISION, out_dtype=ACC)
    column = tl.arange(0, BLOCK_J * BLOCK_D)[None, :]
    w_j, w_d = tl.program_id(1) * BLOCK_J + column // BLOCK_D, column % BLOCK_D
    p_dW = dW_ptr + ((i * K + k) * J + w_j) * D + w_d
    tl.store(p_dW, dW, (k < K) & (w_j < J) & (w_d < D))


ON_CHIP_VOTES = 16384
"""Votes of one sample, sides padded to powers of two, that registers hold at eight warps."""

STREAM_TILE = 2048
"""Elements of a streamed tile [BLOCK_B, J, D]."""

STREAM_PROGRAMS = 264
"""Programs that a streamed pass is cut into: two for each multiprocessor of an H100."""

COUPLINGS_BYTES = 64 << 20
"""Couplings that streamed backward holds at a time."""


def on_chip(W: Tensor) -> bool:
    """Whether all votes of a sample fit into one program."""
    N, _, J, D = W.shape
    return padded(N) * padded(J) * padded(D) <= ON_CHIP_VOTES


def forward(u: Tensor, W: Tensor, bias: Tensor | None, iterations: int) -> tuple[Tensor, Tensor]:
    """v [B, J, D], and s of every iteration [R, B, J, D]."""
    u, W = u.contiguous(), W.contiguous()
    B, N, K = u.shape
    J, D = W.shape[2:]
    acc = accumulation_dtype(u, W)
    v = u.new_empty(B, J, D, dtype=torch.promote_types(u.dtype, W.dtype))
    s = u.new_empty(iterations, B, J, D, dtype=acc)
    if B == 0:
        return v, s
    sizes = dict(J=J, D=D, BLOCK_J=padded(J), BLOCK_D=padded(D), ACC=accumulation_type(u, W))
    bias_options = dict(HAS_BIAS=bias is not None)
    bias = v if bias is None else bias.contiguous()
    if on_chip(W):
        on_chip_forward_kernel[(B,)](
            u,
            W,
            bias,
            v,
            s,
            B,
            N,
            K=K,
            R=iterations,
            BLOCK_N=padded(N),
            **bias_options,
            **sizes,
            num_warps=8,
        )
        return v, s
    block_b, slices, per_slice = streamed_grid(B, N, J, D)
    partial = s.new_empty(slices, B, J, D)
    for r in range(iterations):
        streamed_forward_kernel[(triton.cdiv(B, block_b), slices)](
            u,
            W,
            s,
            partial,
            B,
            N,
            per_slice,
            r,
            K=K,
            UNIFORM=r == 0,
            BLOCK_B=block_b,
            **sizes,
            num_warps=4,
        )
        finish_kernel[(B,)](partial, bias, s[r], v, slices, B, **bias_options, **sizes, num_warps=4)
    return v, s


def backward(dv: Tensor, u: Tensor, W: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, N, K], dW [N, K, J, D] and dbias [J, D], couplings constant."""
    u, W, dv = u.contiguous(), W.contiguous(), dv.contiguous()
    B, N, K = u.shape
    J, D = W.shape[2:]
    R = len(s)
    du, dW = torch.empty_like(u), torch.empty_like(W)
    ds = torch.empty_like(s[0])
    if B == 0:
        return du, dW.zero_(), ds.sum(0)
    sizes = dict(K=K, J=J, D=D, BLOCK_D=padded(D), ACC=accumulation_type(u, W))
    if on_chip(W):
        block_b, slices, per_slice, step = 1, 1, N, N
    else:
        block_b, slices, per_slice = streamed_grid(B, N, J, D)
        step = max(1, min(N, COUPLINGS_BYTES // (B * J * s.itemsize)))
    c = s.new_empty(B, step, J)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        if on_chip(W):
            on_chip_backward_kernel[(B,)](
                u,
                W,
                s,
                dv,
                du,
                c,
                ds,
                B,
                N,
                R=R,
                BLOCK_N=padded(N),
                BLOCK_J=padded(J),
                **sizes,
                num_warps=8,
            )
        else:
            slices = min(slices, end - begin)
            per_slice = triton.cdiv(end - begin, slices)
            streamed_backward_kernel[(triton.cdiv(B, block_b), slices)](
                u,
                W,
                s,
                dv,
                du,
                c,
                ds,
                B,
                N,
                begin,
                end,
                per_slice,
                R,
                BLOCK_B=block_b,
                BLOCK_J=padded(J),
                **sizes,
                num_warps=4,
            )
        block_j = max(1, min(padded(J), 64 // padded(D)))
        weight_gradient_kernel[(end - begin, triton.cdiv(J, block_j))](
            u,
            c,
            ds,
            dW,
            B,
            N,
            begin,
            end,
            BLOCK_B=min(32, max(16, padded(B))),
            BLOCK_K=max(16, padded(K)),
            BLOCK_J=block_j,
            PRECISION=dot_precision(c),
            **sizes,
            num_warps=4,
        )
    return du, dW, ds.sum(0)


def streamed_grid(B: int, N: int, J: int, D: int) -> tuple[int, int, int]:
    """Samples per program, slices of the input capsules, and input capsules per slice."""
    block_b = max(1, min(16, STREAM_TILE // (padded(J) * padded(D)), padded(B)))
    slices = max(1, min(N, STREAM_PROGRAMS // triton.cdiv(B, block_b)))
    return block_b, slices, triton.cdiv(N, slices)
