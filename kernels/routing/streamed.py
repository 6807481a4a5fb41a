"""The streamed form: a program owns a tile of the batch and a slice of the input capsules, holds
the state [B, J, D], and walks over its input capsules; votes are made, used and dropped."""

import triton
import triton.language as tl

from .. import device
from . import fragments, tile


@triton.jit(do_not_specialize=["B", "N", "per_slice", "multiprocessors"])
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
    multiprocessors,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    UNIFORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    KEEP: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """s of one iteration, or d(state) if GRADIENT, over a slice each: partial [slices, B, J, D].

    The couplings are stored if KEEP, as [N, J, B], or if FRAGMENTS, as tensor cores take them.
    """
    batch_tile, part = tile.place(multiprocessors)
    b = (batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    o_v = b * J * D + j * D + d
    first = part.to(tl.int64) * per_slice
    acc = tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC)
    if not UNIFORM:
        V = tl.load(V_ptr + o_v, m_v, 0)
    if GRADIENT:
        ds = tl.load(ds_ptr + o_v, m_v, 0)
    for i in range(first, tl.minimum(first + per_slice, N)):
        p_u = u_ptr + tile.capsule(b, i, N, K, WINDOWS)
        p_W = W_ptr + i * K * J * D + j * D + d
        m_W = (j < J) & (d < D)
        if UNIFORM and not SDA:
            acc = tile.add_votes(acc, p_u, b < B, p_W, m_W, K, J, D, ACC)
        else:
            u_hat = tile.votes(p_u, b < B, p_W, m_W, K, J, D, ACC)  # [B, J, D]
            if SDA:
                u_hat, _, _ = tile.shorten(u_hat, p_u, b < B, K, ACC)
            if UNIFORM:
                acc += u_hat
            else:
                c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
                if GRADIENT:
                    p = tile.logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
                    if SDA:
                        acc -= p * (u_hat - V)
                    else:
                        acc += p * u_hat
                else:
                    acc += c * u_hat
                if KEEP:
                    p_c = fragments.place_of_coupling(c_ptr, i, b, j, B, J, FRAGMENTS)
                    tl.store(p_c, c, (b < B) & (j < J))
    if UNIFORM:
        acc = acc / J
    tl.store(partial_ptr + part.to(tl.int64) * B * J * D + o_v, acc, m_v)


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
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
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
    KEPT: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """ds and the state of iteration r, from dv if it is the LAST, else from the sums of d(state).

    What iteration r + 1 gave is added to what those after it gave, in dV, if ADD. If KEPT, V takes
    not the state but ds once more, as [J, B, D], or if there are WARPS of tensor cores for it, as
    they take it, with zeros up to a multiple of 16 samples; and ds is stored in rows of BLOCK_J and
    BLOCK_D.
    """
    b = tl.program_id(0).to(tl.int64)
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    m = m & (b + 0 * j < B)  # not of one bool, which the interpreter of Triton 3.9 would refuse
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
    ds = device.squash_gradient(s, dv, 2)
    if WARPS is not None:
        tl.store(ds_ptr + (b * BLOCK_J + j) * BLOCK_D + d, ds)
        tl.store(V_ptr + fragments.transposed_place(b, j, d, BLOCK_J, BLOCK_D, WARPS), ds)
    else:
        tl.store(ds_ptr + o, ds, m)
    if KEPT and WARPS is None:
        tl.store(V_ptr + (j * B + b) * D + d, ds, m)
    elif not UNIFORM and not KEPT:
        tl.store(V_ptr + o, tile.state(s_ptr + o, m, stride, r, s, SDA), m)


@triton.jit(do_not_specialize=["B", "N", "begin", "end", "per_slice", "multiprocessors"])
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
    multiprocessors,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """du, and the terms a [TERMS (+ 1), B, end - begin, J] of d(u_hat), for i from begin to end."""
    batch_tile, part = tile.place(multiprocessors)
    b = (batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    m_v = (b < B) & (j < J) & (d < D)
    p_x = x_ptr + b * J * D + j * D + d
    stride_x = B.to(tl.int64) * J * D
    stride_a = B.to(tl.int64) * (end - begin) * J
    m_a = (b < B) & (j < J)
    first = begin + part.to(tl.int64) * per_slice
    for i in range(first, tl.minimum(first + per_slice, end)):
        o_u = tile.capsule(b, i, N, K, WINDOWS)
        p_u = u_ptr + o_u
        p_W, m_W = W_ptr + i * K * J * D + j * D + d, (j < J) & (d < D)
        p_a = a_ptr + (b * (end - begin) + i - begin) * J + j
        radial = 0.0
        u_hat = tile.votes(p_u, b < B, p_W, m_W, K, J, D, ACC)  # [B, J, D]
        f = tl.full([BLOCK_B, BLOCK_J, 1], 1, ACC)
        if SDA:
            u_hat, f, length = tile.shorten(u_hat, p_u, b < B, K, ACC)
        g = tl.zeros_like(u_hat)  # d(u_hat)
        of_vote = tl.zeros_like(f)
        for n in tl.static_range(1, R):  # iterations r = R - 1, ..., 1 counted from 0
            if FULL or n == 1:
                ds = tl.load(p_x + (R - n if FULL else 0) * stride_x, m_v, 0)
                V = tl.load(p_x + (2 * R - n - 1 if FULL else 1) * stride_x, m_v, 0)
                c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
                g += c * ds
                tl.store(p_a + (R - n if FULL else 0) * stride_a, f * c, m_a)
                if FULL:
                    p = tile.logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
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
            g, along = tile.unshorten(g, u_hat, f, length)
            tl.store(p_a + TERMS * stride_a, f * f * (of_vote - along), m_a)
            radial = tl.sum(along, 1, keep_dims=True)
        tile.input_gradient(
            du_ptr + o_u, p_u, b < B, p_W, m_W, g, radial, K, J, D, SDA, ACC, WINDOWS
        )


@triton.jit(do_not_specialize=["B", "N"])
def kept_backward_kernel(
    W_ptr,
    c_ptr,
    ds_ptr,
    du_ptr,
    B,
    N,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """du of one input capsule (8, 14), rba "final", from the couplings c [N, J, B] of forward.

    ds is [J, B, D]. Each component of du has a sum [B, BLOCK_J, D] of its own, so that output
    capsules add up in place, BLOCK_J at a time, and only the last sum, over what is left of them
    and d, crosses lanes.
    """
    tiles = tl.cdiv(B, BLOCK_B)
    i = (tl.program_id(0) // tiles).to(tl.int64)
    b = (tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B)[:, None, None]).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    du = ()
    for _ in tl.static_range(K):
        du += (tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC),)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)[None, :, None]
        m_W = (j < J) & (d < D)
        c = tl.load(c_ptr + (i * J + j) * B + b, (b < B) & (j < J), 0)
        g = c * tl.load(ds_ptr + (j * B + b) * D + d, (b < B) & m_W, 0)  # d(u_hat)
        p_W = W_ptr + (i * K * J + j) * D + d
        sums = ()
        for k in tl.static_range(K):
            sums += (du[k] + g * tl.load(p_W + k * J * D, m_W, 0).to(ACC),)
        du = sums
    p_du = du_ptr + tile.capsule(b, i, N, K, WINDOWS)
    for k in tl.static_range(K):
        du_k = tl.sum(tl.sum(du[k], 2, keep_dims=True), 1, keep_dims=True)
        tile.store_gradient(p_du + k, du_k, b < B, WINDOWS)
