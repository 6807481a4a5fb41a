"""Backward of the streamed form on tensor cores: a program owns an input capsule and walks over its
samples; d(vote) is made, gives du and its part of dW, and is dropped."""

import triton
import triton.language as tl

from . import dots, fragments, tile


@triton.jit(do_not_specialize=["B", "N", "per_part"])
def owned_backward_kernel(
    u_ptr,
    W_ptr,
    x_ptr,
    du_ptr,
    dW_ptr,
    B,
    N,
    per_part,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_G: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """du [B, N, K] and dW [parts, N, K, J, D] of one input capsule and one part of the batch.

    x holds ds and states as `output_gradients` leaves them. PRECISION is that of votes, PRECISION_G
    that of products with d(vote), see dots.py. du is made before dW: W is then no longer in
    registers when d(vote) changes lanes for dW. Windows with K of 16 spilled some otherwise.
    """
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    row_x = tl.full([], J * D, tl.int64)
    row_u, stride_x = N.to(tl.int64) * K, B * row_x
    p_W = W_ptr + i * K * J * D
    dW = tl.zeros([WARPS, BLOCK_J * BLOCK_D // WARPS, BLOCK_K], ACC)
    for start in range(part * per_part, tl.minimum(B, (part + 1) * per_part), 16):
        rows = B - start
        row = tl.arange(0, 16)[:, None, None].to(tl.int64)
        p_u = u_ptr + i * K
        p_x = x_ptr + start * row_x
        b_u = fragments.inputs(p_u, start, rows, row_u, K, 16, BLOCK_K, WARPS, WINDOWS).to(ACC)
        W = fragments.whole_weights(p_W, False, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS)
        b_W = W.to(ACC)
        u_hat = fragments.tile(dots.dot(b_u, b_W, PRECISION), BLOCK_J, BLOCK_D)
        if SDA:
            p_rows = fragments.of_samples(p_u, start, row, row_u, WINDOWS)
            u_hat, f, length = tile.shorten(u_hat, p_rows, row < rows, K, ACC)
        g = tl.zeros_like(u_hat)
        for n in range(1, R if FULL else min(R, 2)):  # iterations R - 1, ..., 1 counted from 0
            p_ds = p_x + (R - n if FULL else 0) * stride_x
            p_V = p_x + (2 * R - n - 1 if FULL else 1) * stride_x
            ds = fragments.outputs(p_ds, rows, J, D, BLOCK_J, BLOCK_D, WARPS)
            V = fragments.outputs(p_V, rows, J, D, BLOCK_J, BLOCK_D, WARPS)
            c = tile.couplings(u_hat, V, j < J, J, SCALE, SDA)
            g += c * ds
            if FULL:
                p = tile.logit_gradient(u_hat, c, ds, V, J, SCALE, SDA)
                g += p * (u_hat - V) if SDA else p * V
        if FULL or R == 1:
            g += fragments.outputs(p_x, rows, J, D, BLOCK_J, BLOCK_D, WARPS) / J
        if SDA:
            g, along = tile.unshorten(g, u_hat, f, length)
        W = fragments.whole_weights(p_W, True, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS)
        b_W = W.to(ACC)
        du = tl.sum(dots.dot(fragments.operand(g, WARPS, False), b_W, PRECISION_G), 0)  # [16, K]
        k = tl.arange(0, BLOCK_K)[None, :]
        row = tl.arange(0, 16)[:, None]
        m_u = (row < rows) & (k < K)
        if SDA:
            radial = tl.reshape(tl.sum(along, 1, keep_dims=True), [16, 1])
            p_rows = fragments.of_samples(p_u, start, row, row_u, WINDOWS) + k
            du += radial * tl.load(p_rows, m_u, 0).to(ACC)
        p_du = fragments.of_samples(du_ptr + i * K, start, row, row_u, WINDOWS) + k
        tile.store_gradient(p_du, du, m_u, WINDOWS)
        b_u = fragments.samples(p_u, start, rows, row_u, K, BLOCK_K, WARPS, WINDOWS).to(ACC)
        dW = dots.add(dW, dots.dot(fragments.operand(g, WARPS, True), b_u, PRECISION_G))
    k = tl.arange(0, BLOCK_K)[:, None, None]
    p_dW = dW_ptr + part * (N.to(tl.int64) * K * J * D) + (i * K + k) * J * D + j * D + d
    tl.store(p_dW, fragments.weight_tile(dW, BLOCK_J, BLOCK_D), (k < K) & m)
