"""The streamed form's sums on tensor cores: a program owns a tile of the batch and a slice of the
input capsules, holds the state [B, J, D], and walks over its input capsules."""

import triton
import triton.language as tl

from . import dots, fragments, tile


@triton.jit(do_not_specialize=["B", "N", "per_slice"])
def first_sum_kernel(
    u_ptr,
    W_ptr,
    partial_ptr,
    B,
    N,
    per_slice,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_NK: tl.constexpr,
    BLOCK_JD: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """s of the first iteration of rba over a slice each, one matrix product / J, on tensor cores:
    partial [slices, B, J, D].
    """
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]).to(tl.int64)
    column = tl.program_id(2) * BLOCK_JD + tl.arange(0, BLOCK_JD)[None, :]
    first = tl.program_id(1).to(tl.int64) * per_slice
    end = tl.minimum(first + per_slice, N) * K
    acc = tl.zeros([BLOCK_B, BLOCK_JD], ACC)
    for begin in range(first * K, end, BLOCK_NK):
        k = begin + tl.arange(0, BLOCK_NK)
        m_u = (b < B) & (k[None, :] < end)
        o_u = tile.sample(b, N.to(tl.int64) * K, WINDOWS) + tile.within(k[None, :], WINDOWS)
        b_u = tl.load(u_ptr + o_u, m_u, 0).to(ACC)
        m_W = (k[:, None] < end) & (column < J * D)
        b_W = tl.load(W_ptr + k[:, None] * (J * D) + column, m_W, 0).to(ACC)
        acc = dots.add(acc, dots.dot(b_u, b_W, PRECISION))
    p = partial_ptr + (tl.program_id(1).to(tl.int64) * B + b) * (J * D) + column
    tl.store(p, acc / J, (b < B) & (column < J * D))


@triton.jit(do_not_specialize=["B", "N", "per_slice", "multiprocessors"])
def dot_sum_kernel(
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
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """What `streamed_sum_kernel` makes, votes being made on tensor cores, see dots.py.

    u and W are loaded a turn ahead of their use, so that a warp does not wait for them, if they
    leave registers for it.
    """
    AHEAD: tl.constexpr = BLOCK_K <= (8 if SDA and UNIFORM else 16)
    batch_tile, part = tile.place(multiprocessors)
    start = batch_tile.to(tl.int64) * BLOCK_B
    rows = B - start
    row = tl.arange(0, BLOCK_B)[:, None, None].to(tl.int64)
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    o_v, m_v = (start + row) * J * D + j * D + d, (row < rows) & m
    stride = N.to(tl.int64) * K
    acc = tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC)
    if not UNIFORM:
        V = tl.load(V_ptr + o_v, m_v, 0)
    if GRADIENT:
        ds = tl.load(ds_ptr + o_v, m_v, 0)
    first = part.to(tl.int64) * per_slice
    end = tl.minimum(first + per_slice, N)
    p_W = W_ptr + first * K * J * D
    u = fragments.inputs(
        u_ptr + tile.within(first * K, WINDOWS),
        start,
        rows,
        stride,
        K,
        BLOCK_B,
        BLOCK_K,
        WARPS,
        WINDOWS,
    )
    W = fragments.load_weights(p_W, False, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, J)
    for i in range(first, end):
        n = tl.minimum(i + 1, end - 1) if AHEAD else i
        p_W = W_ptr + n * K * J * D
        next_u = fragments.inputs(
            u_ptr + tile.within(n * K, WINDOWS),
            start,
            rows,
            stride,
            K,
            BLOCK_B,
            BLOCK_K,
            WARPS,
            WINDOWS,
        )
        next_W = fragments.load_weights(p_W, False, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, J)
        if not AHEAD:
            u, W = next_u, next_W
        b_W = fragments.weights(W, False, BLOCK_K, BLOCK_J, BLOCK_D, WARPS)
        u_hat = dots.dot(u.to(ACC), b_W.to(ACC), PRECISION)
        u_hat = fragments.tile(u_hat, BLOCK_J, BLOCK_D)  # [B, J, D]
        if SDA:
            p_u = fragments.of_samples(u_ptr, start, row, stride, WINDOWS)
            p_u += tile.within(i * K, WINDOWS)
            u_hat, _, _ = tile.shorten(u_hat, p_u, row < rows, K, ACC)
        if UNIFORM:
            acc += u_hat
        else:
            c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
            if GRADIENT:
                p = tile.logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
                acc += -p * (u_hat - V) if SDA else p * u_hat
            else:
                acc += c * u_hat
            if KEEP and FRAGMENTS:
                p_c = c_ptr + (i * (tl.cdiv(B, 16) * 16) + start) * BLOCK_J
                fragments.store_couplings(p_c, c, rows)
            elif KEEP:
                b = start + row
                tl.store(c_ptr + (i * J + j) * B + b, c, (row < rows) & (j < J))
        u, W = next_u, next_W
    if UNIFORM:
        acc = acc / J
    tl.store(partial_ptr + part.to(tl.int64) * B * J * D + o_v, acc, m_v)
