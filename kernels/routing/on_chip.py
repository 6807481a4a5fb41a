"""The on-chip form: a program owns a sample and holds all its votes [N, J, D] in registers."""

import triton
import triton.language as tl

from .. import device
from . import tile


@triton.jit
def make_votes(
    p_u,
    m_u,
    p_W,
    m_W,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    SDA: tl.constexpr,
    ACC: tl.constexpr,
):
    """u_hat [N, J, D] of one sample, and of sda f_ij and |u_i|."""
    u_hat = tile.votes(p_u, m_u, p_W, m_W, K, J, D, ACC)
    f = tl.full([u_hat.shape[0], u_hat.shape[1], 1], 1, ACC)
    length = tl.zeros([u_hat.shape[0], 1, 1], ACC)
    if SDA:
        u_hat, f, length = tile.shorten(u_hat, p_u, m_u, K, ACC)
    return u_hat, f, length


@triton.jit
def iterate(
    u_hat,
    bias,
    p_s,
    m_v,
    stride_s,
    j,
    J: tl.constexpr,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
):
    """v [1, J, D] of the last iteration; stores s of every iteration."""
    s = tl.sum(u_hat, 0, keep_dims=True) / J + bias
    tl.store(p_s, s, m_v)
    v = device.squash(s, 2)
    V = tl.zeros_like(v)
    for r in tl.static_range(1, R):
        if SDA:
            V = v
        else:
            V += v
        c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
        s = tl.sum(c * u_hat, 0, keep_dims=True) + bias
        tl.store(p_s + r * stride_s, s, m_v)
        v = device.squash(s, 2)
    return v


@triton.jit
def differentiate(
    u_hat,
    f,
    length,
    dv,
    p_s,
    p_x,
    m_v,
    stride_x,
    p_a,
    m_a,
    stride_a,
    j,
    J: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
):
    """d(vote) [N, J, D] and the radial part of du, from dv [1, J, D]; stores the terms of (15)."""
    ds = device.squash_gradient(tl.load(p_s + (R - 1) * stride_x, m_v, 0), dv, 2)
    dV = tl.zeros_like(ds)
    g = tl.zeros_like(u_hat)  # d(u_hat)
    of_vote = tl.zeros_like(f)
    for n in range(1, R if FULL else min(R, 2)):  # iterations r = R - 1, ..., 1 counted from 0
        V = tile.state(p_s, m_v, stride_x, R - n, ds, SDA)
        c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
        g += c * ds
        tl.store(p_a + (R - n if FULL else 0) * stride_a, f * c, m_a)
        tl.store(p_x + (R - n if FULL else 0) * stride_x, ds, m_v)
        if FULL:
            p = tile.logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
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
            tl.store(p_x + (2 * R - n - 1) * stride_x, V, m_v)
            s = tl.load(p_s + (R - n - 1) * stride_x, m_v, 0)
            ds = device.squash_gradient(s, dV, 2)
    if FULL or R == 1:
        g += ds / J
        tl.store(p_a, f / J, m_a)
        tl.store(p_x, ds, m_v)
    radial = tl.zeros_like(length)
    if SDA:
        g, along = tile.unshorten(g, u_hat, f, length)
        tl.store(p_a + TERMS * stride_a, f * f * (of_vote - along), m_a)
        radial = tl.sum(along, 1, keep_dims=True)
    return g, radial


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
    j, d, m_v = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    o_v = b * J * D + j * D + d
    p_u, m_u = u_ptr + (b * N + i) * K, i < N
    p_W, m_W = W_ptr + i * K * J * D + j * D + d, (i < N) & m_v
    u_hat, _, _ = make_votes(p_u, m_u, p_W, m_W, K, J, D, SDA, ACC)
    bias = tl.zeros([1, BLOCK_J, BLOCK_D], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + j * D + d, m_v, 0).to(ACC)
    v = iterate(u_hat, bias, s_ptr + o_v, m_v, B.to(tl.int64) * J * D, j, J, R, SCALE, SDA)
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
    j, d, m_v = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    o_v = b * J * D + j * D + d
    stride_x = B.to(tl.int64) * J * D
    p_a, m_a = a_ptr + (b * N + i) * J + j, (i < N) & (j < J)
    stride_a = B.to(tl.int64) * N * J
    p_u, m_u = u_ptr + (b * N + i) * K, i < N
    p_W, m_W = W_ptr + i * K * J * D + j * D + d, (i < N) & m_v
    u_hat, f, length = make_votes(p_u, m_u, p_W, m_W, K, J, D, SDA, ACC)
    dv = tl.load(dv_ptr + o_v, m_v, 0).to(ACC)
    p_s, p_x = s_ptr + o_v, x_ptr + o_v
    g, radial = differentiate(
        u_hat, f, length, dv, p_s, p_x, m_v, stride_x, p_a, m_a, stride_a, j,
        J, R, TERMS, SCALE, SDA, FULL,
    )  # fmt: skip
    tile.input_gradient(du_ptr + (b * N + i) * K, p_u, m_u, p_W, m_W, g, radial, K, J, D, SDA, ACC)
