"""Triton kernels of routing, and their launchers. Equations: README.md.

Two forms. *On chip*: a program owns a sample, holds all its votes [N, J, D] in registers and runs
every iteration. *Streamed*: a program owns a tile of the batch and a slice of the input capsules,
holds the state [B, J, D], and walks over its input capsules; votes are made, used and dropped.
The tiles of both are written [X, J, D], X being input capsules on chip and samples when streamed,
so that both share the functions at the top. SDA and FULL are the method and the gradient mode.

Between the two launches of backward d(u_hat) is never stored: it is a sum of TERMS products of a
number a [B, N, J] and a vector x [B, J, D], for `sda` also of a number and the vote itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..launch import accumulation_dtype, accumulation_type, dot_precision, launch, padded
from .chunked import KEPT_BYTES
from .reference import distance_scale


@triton.jit
def votes(p_u, m_u, p_W, m_W, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """u_hat [X, J, D] as K rank-one updates (equation 1); p_u and p_W point at component k = 0."""
    u_hat = tl.load(p_u, m_u, 0).to(ACC) * tl.load(p_W, m_W, 0).to(ACC)
    for k in tl.static_range(1, K):
        u_hat += tl.load(p_u + k, m_u, 0).to(ACC) * tl.load(p_W + k * J * D, m_W, 0).to(ACC)
    return u_hat


@triton.jit
def couplings(u_hat, V, valid, J: tl.constexpr, SCALE: tl.constexpr, SDA: tl.constexpr):
    """c_ij [X, J, 1] from the state (equations 3 and 4, or 3 and 6)."""
    if SDA:
        d, m = distances(u_hat, V, J)
        b = tl.where(m > 0, SCALE * d / tl.where(m > 0, m, 1), 0)
    else:
        b = tl.sum(u_hat * V, 2, keep_dims=True)
    return device.softmax(b, valid, 1)


@triton.jit
def shorten(vote, p_u, m_u, K: tl.constexpr, ACC: tl.constexpr):
    """u_hat, f_ij [X, J, 1] and |u_i| [X, 1, 1] (equation 5)."""
    u_k = tl.load(p_u, m_u, 0).to(ACC)
    length = u_k * u_k
    for k in tl.static_range(1, K):
        u_k = tl.load(p_u + k, m_u, 0).to(ACC)
        length += u_k * u_k
    length = tl.sqrt(length)
    vote_length = tl.sqrt(tl.sum(vote * vote, 2, keep_dims=True))
    too_long = vote_length > length
    f = tl.where(too_long, length / tl.where(too_long, vote_length, 1), 1)
    return f * vote, f, length


@triton.jit
def distances(u_hat, v, J: tl.constexpr):
    """d_ij [X, J, 1] and m_i [X, 1, 1] (equation 6); padding has distance 0."""
    d = tl.sqrt(tl.sum((v - u_hat) * (v - u_hat), 2, keep_dims=True))
    return d, tl.sum(d, 1, keep_dims=True) / J


@triton.jit
def state(s_ptr, o_v, m_v, stride_r, r, like, SDA: tl.constexpr):
    """The state of iteration r >= 1, V or v(r - 1), from the sums s of the iterations before it."""
    V = tl.zeros_like(like)
    for q in range(r - 1 if SDA else 0, r):
        V += device.squash(tl.load(s_ptr + q * stride_r + o_v, m_v, 0), 2)
    return V


@triton.jit
def logit_gradient(u_hat, c, ds, V, J: tl.constexpr, SCALE: tl.constexpr, SDA: tl.constexpr):
    """p_ij [X, J, 1]: db_ij for rba (9, 10); dd_ij / d_ij for sda (12), 0 where d_ij is."""
    dc = tl.sum(u_hat * ds, 2, keep_dims=True)
    p = c * (dc - tl.sum(c * dc, 1, keep_dims=True))
    if SDA:
        d, m = distances(u_hat, V, J)
        safe = tl.where(m > 0, m, 1)
        dd = SCALE * (p - tl.sum(p * d, 1, keep_dims=True) / J / safe) / safe
        p = tl.where(d > 0, dd / tl.where(d > 0, d, 1), 0)
    return p


@triton.jit
def unshorten(g, u_hat, f, length):
    """d(vote_ij) from g = d(u_hat_ij), and d|u_i| / |u_i| by each vote [X, J, 1] (equation 13)."""
    safe = tl.where(length > 0, length, 1)
    along = tl.where(f < 1, tl.sum(g * u_hat, 2, keep_dims=True) / safe / safe, 0)
    return f * (g - u_hat * along), along


@triton.jit
def input_gradient(
    p_du,
    p_u,
    m_u,
    p_W,
    m_W,
    g,
    radial,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    SDA: tl.constexpr,
    ACC: tl.constexpr,
):
    """Stores du_i = sum_j W_ij d(vote_ij) + radial_i u_i (13, 14), one component k at a time."""
    for k in tl.static_range(K):
        b_W = tl.load(p_W + k * J * D, m_W, 0).to(ACC)
        by_row = tl.reshape(g * b_W, [g.shape[0], g.shape[1] * g.shape[2], 1])
        b_du = tl.sum(by_row, 1, keep_dims=True)
        if SDA:
            b_du += radial * tl.load(p_u + k, m_u, 0).to(ACC)
        tl.store(p_du + k, b_du, m_u)


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
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """v of one sample, and its s of every iteration."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[:, None, None]
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    p_u, m_u = u_ptr + (b * N + i) * K, i < N
    p_W, m_W = W_ptr + i * K * J * D + j * D + d, (i < N) & m_v
    u_hat = votes(p_u, m_u, p_W, m_W, K, J, D, ACC)  # [N, J, D]
    if SDA:
        u_hat, _, _ = shorten(u_hat, p_u, m_u, K, ACC)
    bias = tl.zeros([1, BLOCK_J, BLOCK_D], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + j * D + d, m_v, 0).to(ACC)
    s = tl.sum(u_hat, 0, keep_dims=True) / J + bias
    tl.store(s_ptr + o_v, s, m_v)
    v = device.squash(s, 2)
    V = tl.zeros_like(v)
    for r in tl.static_range(1, R):
        if SDA:
            V = v
        else:
            V += v
        c = couplings(u_hat, V, j < J, J, SCALE, SDA)
        s = tl.sum(c * u_hat, 0, keep_dims=True) + bias
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
    a_ptr,
    x_ptr,
    B,
    N,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """du of one sample, and its terms of d(u_hat)."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[:, None, None]
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    stride_x = B.to(tl.int64) * J * D
    p_a, m_a = a_ptr + (b * N + i) * J + j, (i < N) & (j < J)
    stride_a = B.to(tl.int64) * N * J
    p_u, m_u = u_ptr + (b * N + i) * K, i < N
    p_W, m_W = W_ptr + i * K * J * D + j * D + d, (i < N) & m_v
    u_hat = votes(p_u, m_u, p_W, m_W, K, J, D, ACC)  # [N, J, D]
    f = tl.full([BLOCK_N, BLOCK_J, 1], 1, ACC)
    if SDA:
        u_hat, f, length = shorten(u_hat, p_u, m_u, K, ACC)
    s = tl.load(s_ptr + (R - 1) * stride_x + o_v, m_v, 0)
    ds = device.squash_gradient(s, tl.load(dv_ptr + o_v, m_v, 0).to(ACC), 2)  # [1, J, D]
    dV = tl.zeros_like(ds)
    g = tl.zeros_like(u_hat)  # d(u_hat)
    of_vote = tl.zeros_like(f)
    for n in range(1, R if FULL else min(R, 2)):  # iterations r = R - 1, ..., 1 counted from 0
        V = state(s_ptr, o_v, m_v, stride_x, R - n, ds, SDA)
        c = couplings(u_hat, V, j < J, J, SCALE, SDA)
        g += c * ds
        tl.store(p_a + (R - n if FULL else 0) * stride_a, f * c, m_a)
        tl.store(x_ptr + (R - n if FULL else 0) * stride_x + o_v, ds, m_v)
        if FULL:
            p = logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
            if SDA:
                e = p * (u_hat - V)
                g += e
                dV = -tl.sum(e, 0, keep_dims=True)
                of_vote += p
                p = -p
            else:
                g += p * V
                dV += tl.sum(p * u_hat, 0, keep_dims=True)
            tl.store(p_a + (2 * R - n - 1) * stride_a, f * p, m_a)
            tl.store(x_ptr + (2 * R - n - 1) * stride_x + o_v, V, m_v)
            s = tl.load(s_ptr + (R - n - 1) * stride_x + o_v, m_v, 0)
            ds = device.squash_gradient(s, dV, 2)
    if FULL or R == 1:
        g += ds / J
        tl.store(p_a, f / J, m_a)
        tl.store(x_ptr + o_v, ds, m_v)
    radial = 0.0
    if SDA:
        g, along = unshorten(g, u_hat, f, length)
        tl.store(p_a + TERMS * stride_a, f * f * (of_vote - along), m_a)
        radial = tl.sum(along, 1, keep_dims=True)
    input_gradient(du_ptr + (b * N + i) * K, p_u, m_u, p_W, m_W, g, radial, K, J, D, SDA, ACC)


@triton.jit(do_not_specialize=["B", "N", "per_slice"])
def streamed_sum_kernel(
    u_ptr,
    W_ptr,
    V_ptr,
    ds_ptr,
    c_ptr,
    partial_ptr,
    B,
    N,
    per_slice,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """s of one iteration, or d(state) if GRADIENT, over a slice each: partial [slices, B, J, D].

    The couplings [B, N, J] are stored if KEEP.
    """
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    first = tl.program_id(1).to(tl.int64) * per_slice
    acc = tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC)
    if not UNIFORM:
        V = tl.load(V_ptr + o_v, m_v, 0)
    if GRADIENT:
        ds = tl.load(ds_ptr + o_v, m_v, 0)
    for i in range(first, tl.minimum(first + per_slice, N)):
        p_u = u_ptr + (b * N + i) * K
        p_W = W_ptr + i * K * J * D + j * D + d
        u_hat = votes(p_u, b < B, p_W, (j < J) & (d < D), K, J, D, ACC)  # [B, J, D]
        if SDA:
            u_hat, _, _ = shorten(u_hat, p_u, b < B, K, ACC)
        if UNIFORM:
            acc += u_hat
        else:
            c = couplings(u_hat, V, j < J, J, SCALE, SDA)
            if GRADIENT:
                p = logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
                if SDA:
                    acc -= p * (u_hat - V)
                else:
                    acc += p * u_hat
            else:
                acc += c * u_hat
            if KEEP:
                tl.store(c_ptr + (b * N + i) * J + j, c, (b < B) & (j < J))
    if UNIFORM:
        acc = acc / J
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * B * J * D + o_v, acc, m_v)


@triton.jit
def sum_of_slices(p_partial, m, stride, slices, BLOCK_S: tl.constexpr):
    """Sum of the slices' parts [1, J, D], BLOCK_S loads at a time, always in the same order."""
    q = tl.arange(0, BLOCK_S)[:, None, None]
    total = tl.sum(tl.load(p_partial + q * stride, m & (q < slices), 0), 0, keep_dims=True)
    for begin in range(BLOCK_S, slices, BLOCK_S):
        part = tl.load(p_partial + (begin + q) * stride, m & (begin + q < slices), 0)
        total += tl.sum(part, 0, keep_dims=True)
    return total


@triton.jit(do_not_specialize=["slices", "B"])
def output_kernel(
    partial_ptr,
    bias_ptr,
    s_ptr,
    v_ptr,
    V_ptr,
    slices,
    B,
    J: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """s, v and the next state [B, J, D] of one iteration; the state grows by v if ADD."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m = (j < J) & (d < D)
    o = b * J * D + j * D + d
    s = sum_of_slices(partial_ptr + o, m, B.to(tl.int64) * J * D, slices, BLOCK_S)
    if HAS_BIAS:
        s += tl.load(bias_ptr + j * D + d, m, 0).to(ACC)
    v = device.squash(s, 2)
    tl.store(s_ptr + o, s, m)
    tl.store(v_ptr + o, v, m)
    if ADD:
        v += tl.load(V_ptr + o, m, 0)
    tl.store(V_ptr + o, v, m)


@triton.jit(do_not_specialize=["slices", "B", "r"])
def output_gradient_kernel(
    dv_ptr,
    partial_ptr,
    dV_ptr,
    s_ptr,
    ds_ptr,
    V_ptr,
    slices,
    B,
    r,
    J: tl.constexpr,
    D: tl.constexpr,
    SDA: tl.constexpr,
    LAST: tl.constexpr,
    UNIFORM: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """ds and the state of iteration r, from dv if it is the LAST, else from the sums of d(state).

    What iteration r + 1 gave is added to what those after it gave, in dV, if ADD.
    """
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m = (j < J) & (d < D)
    o = b * J * D + j * D + d
    stride = B.to(tl.int64) * J * D
    s = tl.load(s_ptr + r * stride + o, m, 0)
    if LAST:
        dv = tl.load(dv_ptr + o, m, 0).to(ACC)
    else:
        dv = sum_of_slices(partial_ptr + o, m, stride, slices, BLOCK_S)
        if ADD:
            dv += tl.load(dV_ptr + o, m, 0)
        tl.store(dV_ptr + o, dv, m)
    tl.store(ds_ptr + o, device.squash_gradient(s, dv, 2), m)
    if not UNIFORM:
        tl.store(V_ptr + o, state(s_ptr, o, m, stride, r, s, SDA), m)


@triton.jit(do_not_specialize=["B", "N", "begin", "end", "per_slice"])
def streamed_backward_kernel(
    u_ptr,
    W_ptr,
    x_ptr,
    du_ptr,
    a_ptr,
    B,
    N,
    begin,
    end,
    per_slice,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """du, and the terms a [TERMS (+ 1), B, end - begin, J] of d(u_hat), for i from begin to end.

    If KEPT, the one term of rba "final" stands in a already: the couplings that forward kept.
    """
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    p_x = x_ptr + b * J * D + j * D + d
    stride_x = B.to(tl.int64) * J * D
    stride_a = B.to(tl.int64) * (end - begin) * J
    m_a = (b < B) & (j < J)
    first = begin + tl.program_id(1).to(tl.int64) * per_slice
    for i in range(first, tl.minimum(first + per_slice, end)):
        p_u = u_ptr + (b * N + i) * K
        p_W, m_W = W_ptr + i * K * J * D + j * D + d, (j < J) & (d < D)
        p_a = a_ptr + (b * (end - begin) + i - begin) * J + j
        radial = 0.0
        if KEPT:
            g = tl.load(p_a, m_a, 0) * tl.load(p_x, m_v, 0)
        else:
            u_hat = votes(p_u, b < B, p_W, m_W, K, J, D, ACC)  # [B, J, D]
            f = tl.full([BLOCK_B, BLOCK_J, 1], 1, ACC)
            if SDA:
                u_hat, f, length = shorten(u_hat, p_u, b < B, K, ACC)
            g = tl.zeros_like(u_hat)  # d(u_hat)
            of_vote = tl.zeros_like(f)
            for n in tl.static_range(1, R):  # iterations r = R - 1, ..., 1 counted from 0
                if FULL or n == 1:
                    ds = tl.load(p_x + (R - n if FULL else 0) * stride_x, m_v, 0)
                    V = tl.load(p_x + (2 * R - n - 1 if FULL else 1) * stride_x, m_v, 0)
                    c = couplings(u_hat, V, j < J, J, SCALE, SDA)
                    g += c * ds
                    tl.store(p_a + (R - n if FULL else 0) * stride_a, f * c, m_a)
                    if FULL:
                        p = logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
                        if SDA:
                            g += p * (u_hat - V)
                            of_vote += p
                            p = -p
                        else:
                            g += p * V
                        tl.store(p_a + (2 * R - n - 1) * stride_a, f * p, m_a)
            if FULL or R == 1:
                g += tl.load(p_x, m_v, 0) / J
                tl.store(p_a, f / J, m_a)
            if SDA:
                g, along = unshorten(g, u_hat, f, length)
                tl.store(p_a + TERMS * stride_a, f * f * (of_vote - along), m_a)
                radial = tl.sum(along, 1, keep_dims=True)
        input_gradient(du_ptr + (b * N + i) * K, p_u, b < B, p_W, m_W, g, radial, K, J, D, SDA, ACC)


@triton.jit(do_not_specialize=["B", "N", "begin", "end"])
def weight_gradient_kernel(
    u_ptr,
    W_ptr,
    a_ptr,
    x_ptr,
    dW_ptr,
    B,
    N,
    begin,
    end,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    TERMS: tl.constexpr,
    SDA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_i = sum_b u_i (x) d(vote_i) (equation 14) for one i and a tile of j."""
    i = begin + tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    stride_a, stride_x = B.to(tl.int64) * (end - begin) * J, B.to(tl.int64) * J * D
    dW = tl.zeros([BLOCK_K, BLOCK_J * BLOCK_D], ACC)
    for start in range(0, B, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b = row[:, None, None]
        p_a, m_a = a_ptr + (b * (end - begin) + i - begin) * J + j, (b < B) & (j < J)
        p_x, m_x = x_ptr + (b * J + j) * D + d, (b < B) & (j < J) & (d < D)
        g = tl.load(p_a, m_a, 0) * tl.load(p_x, m_x, 0)
        for t in tl.static_range(1, TERMS):
            g += tl.load(p_a + t * stride_a, m_a, 0) * tl.load(p_x + t * stride_x, m_x, 0)
        if SDA:
            p_u, p_W = u_ptr + (b * N + i) * K, W_ptr + i * K * J * D + j * D + d
            vote = votes(p_u, b < B, p_W, (j < J) & (d < D), K, J, D, ACC)
            g += tl.load(p_a + TERMS * stride_a, m_a, 0) * vote
        p_u = u_ptr + (row[None, :] * N + i) * K + k
        b_u = tl.load(p_u, (row[None, :] < B) & (k < K), 0).to(ACC)  # [K, B]
        g = tl.reshape(g, [BLOCK_B, BLOCK_J * BLOCK_D])
        dW = tl.dot(b_u, g, dW, input_precision=PRECISION, out_dtype=ACC)
    column = tl.arange(0, BLOCK_J * BLOCK_D)[None, :]
    w_j, w_d = tl.program_id(1) * BLOCK_J + column // BLOCK_D, column % BLOCK_D
    p_dW = dW_ptr + ((i * K + k) * J + w_j) * D + w_d
    tl.store(p_dW, dW, (k < K) & (w_j < J) & (w_d < D))


ON_CHIP_VOTES = 16384
"""Votes of one sample, sides padded to powers of two, that one program holds in registers."""

STREAM_PROGRAMS = 2112
"""Programs that a streamed pass is cut into: 16 for each multiprocessor of an H100."""

TERMS_BYTES = 64 << 20
"""Numbers a that streamed backward holds at a time."""


class Plan(NamedTuple):
    """How a problem is cut into programs; a pure function of its shapes and dtype."""

    on_chip: bool
    block_b: int
    """Samples of a program."""
    per_slice: int
    """Input capsules of a program."""
    num_warps: int


def plan(B: int, N: int, J: int, D: int, itemsize: int) -> Plan:
    """The plan for a problem whose accumulation dtype has `itemsize` bytes.

    A streamed tile belongs to one warp if that can hold it, 4 KB: then it needs no shared memory
    and no barriers, and Triton lays its rows of D out so that loads are wide and sums short.
    """
    row = padded(J) * padded(D) * itemsize
    if padded(N) * row <= ON_CHIP_VOTES * itemsize:
        return Plan(True, 1, N, num_warps=min(max(padded(N) * row // 2048, 1), 16))
    block_b = max(1, min(16, 4096 // row, padded(B)))
    slices = max(1, min(N, STREAM_PROGRAMS // triton.cdiv(B, block_b)))
    num_warps = min(max(row // 4096, 1), 16)
    return Plan(False, block_b, triton.cdiv(N, slices), num_warps)


def weight_gradient_tile(B: int, N: int, J: int, D: int) -> tuple[int, int]:
    """Output capsules and samples of a tile: 256 columns [J, D] if that makes programs enough."""
    columns = 256
    while columns > 64 and N * triton.cdiv(padded(J) * padded(D), columns) < 264:
        columns //= 2
    block_j = max(1, min(padded(J), columns // padded(D)))
    return block_j, 16 if block_j * padded(D) > 128 else min(32, max(16, padded(B)))


def kept_shape(u: Tensor, W: Tensor, keep: bool) -> tuple[int, ...]:
    """Shape of the couplings [B, N, J] that the streamed forward keeps; (0,) if it keeps none."""
    (B, N, _), (J, D) = u.shape, W.shape[2:]
    itemsize = accumulation_dtype(u, W).itemsize
    on_chip = plan(B, N, J, D, itemsize).on_chip
    return (B, N, J) if keep and not on_chip and B * N * J * itemsize <= KEPT_BYTES else (0,)


def forward(
    u: Tensor, W: Tensor, bias: Tensor | None, iterations: int, method: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, D], s of every iteration [R, B, J, D], and the kept couplings."""
    u, W = u.contiguous(), W.contiguous()
    B, N, K = u.shape
    J, D = W.shape[2:]
    v = u.new_empty(B, J, D, dtype=torch.promote_types(u.dtype, W.dtype))
    s = u.new_empty(iterations, B, J, D, dtype=accumulation_dtype(u, W))
    kept = s.new_empty(kept_shape(u, W, keep))
    if B == 0:
        return v, s, kept
    p = plan(B, N, J, D, s.itemsize)
    sda = method == "sda"
    sizes = dict(J=J, D=D, BLOCK_J=padded(J), BLOCK_D=padded(D), ACC=accumulation_type(u, W))
    routing = dict(K=K, SCALE=distance_scale(J), SDA=sda)
    has_bias = bias is not None
    bias = v if bias is None else bias.contiguous()
    if p.on_chip:
        launch(
            on_chip_forward_kernel,
            (B,),
            *(u, W, bias, v, s, B, N),
            R=iterations,
            HAS_BIAS=has_bias,
            BLOCK_N=padded(N),
            num_warps=p.num_warps,
            **routing,
            **sizes,
        )
        return v, s, kept
    slices = triton.cdiv(N, p.per_slice)
    partial = s.new_empty(slices, B, J, D)
    V = torch.empty_like(s[0])
    for r in range(iterations):
        launch(
            streamed_sum_kernel,
            (triton.cdiv(B, p.block_b), slices),
            *(u, W, V, V, kept, partial, B, N, p.per_slice),
            UNIFORM=r == 0,
            GRADIENT=False,
            KEEP=kept.dim() == 3 and r == iterations - 1,
            BLOCK_B=p.block_b,
            num_warps=p.num_warps,
            **routing,
            **sizes,
        )
        launch(
            output_kernel,
            (B,),
            *(partial, bias, s[r], v, V, slices, B),
            HAS_BIAS=has_bias,
            ADD=r > 0 and not sda,
            BLOCK_S=max(1, 4096 // (padded(J) * padded(D))),
            num_warps=4,
            **sizes,
        )
    return v, s, kept


def backward(
    dv: Tensor,
    u: Tensor,
    W: Tensor,
    s: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, N, K], dW [N, K, J, D] and dbias [J, D] or [0]."""
    u, W, dv = u.contiguous(), W.contiguous(), dv.contiguous()
    B, N, K = u.shape
    R, _, J, D = s.shape
    du, dW = torch.empty_like(u), torch.empty_like(W)
    if B == 0:
        return du, dW.zero_(), s.new_zeros(J, D) if with_bias else s.new_empty(0)
    p = plan(B, N, J, D, s.itemsize)
    sda, full = method == "sda", routing_grad == "full"
    terms = 2 * R - 1 if full else 1
    x = s.new_empty(max(terms, 2), B, J, D)  # ds of each iteration (or the last), then the states
    sizes = dict(J=J, D=D, BLOCK_D=padded(D), ACC=accumulation_type(u, W))
    routing = dict(K=K, R=R, TERMS=terms, SCALE=distance_scale(J), SDA=sda, FULL=full)
    if not p.on_chip:
        output_gradients(dv, u, W, s, x, p, sda, full)
    if p.on_chip or kept.dim() == 3:
        step = N
    else:
        step = max(1, min(N, TERMS_BYTES // ((terms + sda) * B * J * s.itemsize)))
    a = kept if kept.dim() == 3 else s.new_empty((terms + sda) * B * step * J)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        if p.on_chip:
            launch(
                on_chip_backward_kernel,
                (B,),
                *(u, W, s, dv, du, a, x, B, N),
                BLOCK_N=padded(N),
                BLOCK_J=padded(J),
                num_warps=p.num_warps,
                **routing,
                **sizes,
            )
        else:
            # all of sda's gradient at once needs more registers than a whole tile leaves
            block_b = max(1, p.block_b // 2) if sda and full else p.block_b
            launch(
                streamed_backward_kernel,
                (triton.cdiv(B, block_b), triton.cdiv(end - begin, p.per_slice)),
                *(u, W, x, du, a, B, N, begin, end, p.per_slice),
                KEPT=kept.dim() == 3,
                BLOCK_B=block_b,
                BLOCK_J=padded(J),
                num_warps=p.num_warps,
                **routing,
                **sizes,
            )
        block_j, block_b = weight_gradient_tile(B, end - begin, J, D)
        launch(
            weight_gradient_kernel,
            (end - begin, triton.cdiv(J, block_j)),
            *(u, W, a, x, dW, B, N, begin, end),
            K=K,
            TERMS=terms,
            SDA=sda,
            BLOCK_B=block_b,
            BLOCK_K=padded(K),
            BLOCK_J=block_j,
            PRECISION=dot_precision(s),
            num_warps=8 if sda else 4,
            num_stages=2 if terms == 1 else 1,  # else the prefetched terms exceed shared memory
            **sizes,
        )
    return du, dW, x[: R if full else 1].sum((0, 1)) if with_bias else s.new_empty(0)


def output_gradients(
    dv: Tensor, u: Tensor, W: Tensor, s: Tensor, x: Tensor, p: Plan, sda: bool, full: bool
) -> None:
    """Fills x of the streamed form: ds and states, of all iterations if `full`, else of the last.

    Iterations are walked backwards; each but the first needs a pass over the votes for d(state).
    """
    B, N, K = u.shape
    R, _, J, D = s.shape
    sizes = dict(
        J=J, D=D, SDA=sda, BLOCK_J=padded(J), BLOCK_D=padded(D), ACC=accumulation_type(u, W)
    )
    slices = triton.cdiv(N, p.per_slice)
    partial = s.new_empty(slices, B, J, D) if full and R > 1 else x
    dV = torch.empty_like(s[0])
    for r in reversed(range(R)):
        ds, V = (x[r], x[R + r - 1 if r else 0]) if full else (x[0], x[1])
        launch(
            output_gradient_kernel,
            (B,),
            *(dv, partial, dV, s, ds, V, slices, B, r),
            LAST=r == R - 1,
            UNIFORM=r == 0,
            ADD=r < R - 2 and not sda,
            BLOCK_S=max(1, 4096 // (padded(J) * padded(D))),
            num_warps=4,
            **sizes,
        )
        if not full or r == 0:
            return
        launch(
            streamed_sum_kernel,
            (triton.cdiv(B, p.block_b), slices),
            *(u, W, V, ds, ds, partial, B, N, p.per_slice),
            K=K,
            SCALE=distance_scale(J),
            UNIFORM=False,
            GRADIENT=True,
            KEEP=False,
            BLOCK_B=p.block_b,
            num_warps=p.num_warps,
            **sizes,
        )
