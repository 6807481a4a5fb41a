"""Backward of rba "final" on tensor cores, from the couplings that forward has kept.

Loads are a turn ahead of their use, so that a warp does not wait for them.
"""

import triton
import triton.language as tl

from . import dots, fragments, tile


@triton.jit(do_not_specialize=["B", "N", "per_slice", "multiprocessors"])
def kept_backward_dots_kernel(
    W_ptr,
    c_ptr,
    ds_ptr,
    du_ptr,
    B,
    N,
    per_slice,
    multiprocessors,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """du of a tile of the batch and a slice of the input capsules (8, 14), from ds [B, J, D], whose
    rows are BLOCK_J and BLOCK_D long.
    """
    WJ: tl.constexpr = fragments.smaller(WARPS, BLOCK_J // 8)
    batch_tile, part = tile.place(multiprocessors)
    start = batch_tile.to(tl.int64) * BLOCK_B
    row = start + tl.arange(0, BLOCK_B)[:, None].to(tl.int64)
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    k = tl.arange(0, BLOCK_K)[None, :]
    b = row[:, :, None]
    ds = tl.load(ds_ptr + (b * BLOCK_J + j) * BLOCK_D + d, (b < B) & m, 0)
    ds = fragments.operand(ds, WARPS, False)
    ds = tl.reshape(ds, [WARPS, BLOCK_B, BLOCK_D * WJ // WARPS, BLOCK_J // WJ])
    stride_c = tl.cdiv(B, 16).to(tl.int64) * (16 * BLOCK_J)
    c_ptr += start * BLOCK_J
    first = part.to(tl.int64) * per_slice
    end = tl.minimum(first + per_slice, N)
    p_W = W_ptr + first * K * J * D
    c = fragments.couplings(c_ptr + first * stride_c, B - start, BLOCK_B, BLOCK_J, WARPS)
    W = fragments.load_weights(p_W, True, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, J)
    for i in range(first, end):
        n = tl.minimum(i + 1, end - 1)
        p_W = W_ptr + n * K * J * D
        next_c = fragments.couplings(c_ptr + n * stride_c, B - start, BLOCK_B, BLOCK_J, WARPS)
        next_W = fragments.load_weights(p_W, True, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, J)
        g = tl.reshape(c * ds, [WARPS, BLOCK_B, BLOCK_D * BLOCK_J // WARPS])  # d(vote)
        b_W = fragments.weights(W, True, BLOCK_K, BLOCK_J, BLOCK_D, WARPS)
        du = tl.sum(dots.dot(g, b_W.to(ACC), PRECISION), 0)
        p_du = du_ptr + tile.capsule(row, i, N, K, WINDOWS) + k
        tile.store_gradient(p_du, du, (row < B) & (k < K), WINDOWS)
        c, W = next_c, next_W


@triton.jit
def transposed_inputs(
    u_ptr,
    c_ptr,
    i,
    start,
    B,
    N,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WARPS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """u_i and couplings of input capsule i and 16 samples from `start` on, as dW needs them."""
    stride = N.to(tl.int64) * K
    p_u = u_ptr + tile.within(i * K, WINDOWS)
    u = fragments.samples(p_u, start, B - start, stride, K, BLOCK_K, WARPS, WINDOWS)
    p_c = c_ptr + (i * (tl.cdiv(B, 16) * 16) + start) * BLOCK_J
    return u, fragments.transposed_couplings(p_c, BLOCK_J, WARPS)


@triton.jit
def grown(dW, ds, u, c, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """dW of one input capsule, grown by what 16 samples give."""
    g = tl.reshape(c * ds, [ds.shape[0], ds.shape[1] * ds.shape[2], ds.shape[3]])  # d(vote)
    return dots.add(dW, dots.dot(g, u.to(ACC), PRECISION))


@triton.jit(do_not_specialize=["B", "N"])
def kept_weight_gradient_kernel(
    u_ptr,
    c_ptr,
    ds_ptr,
    dW_ptr,
    B,
    N,
    TOGETHER: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """dW of a few input capsules (8, 14), which share the loads of ds, in the order of
    `transposed_place`. TOGETHER is how many; the last program's may be the last input capsule more
    than once.
    """
    i = tl.program_id(0).to(tl.int64) * TOGETHER
    j, d, m = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    k = tl.arange(0, BLOCK_K)[:, None, None]
    ds = fragments.transposed_outputs(ds_ptr, BLOCK_J, BLOCK_D, WARPS)
    dW = ()
    x = ()
    for n in tl.static_range(TOGETHER):
        dW += (tl.zeros([WARPS, BLOCK_J * BLOCK_D // WARPS, BLOCK_K], ACC),)
        p = tl.minimum(i + n, N - 1)
        x += (transposed_inputs(u_ptr, c_ptr, p, 0, B, N, K, BLOCK_K, BLOCK_J, WARPS, WINDOWS),)
    for start in range(0, B, 16):
        after = tl.minimum(start + 16, (B - 1) // 16 * 16).to(tl.int64)
        p_ds = ds_ptr + after * (BLOCK_J * BLOCK_D)
        next_ds = fragments.transposed_outputs(p_ds, BLOCK_J, BLOCK_D, WARPS)
        next_x = ()
        for n in tl.static_range(TOGETHER):
            p = tl.minimum(i + n, N - 1)
            next_x += (
                transposed_inputs(
                    u_ptr, c_ptr, p, after, B, N, K, BLOCK_K, BLOCK_J, WARPS, WINDOWS
                ),
            )
        sums = ()
        for n in tl.static_range(TOGETHER):
            sums += (grown(dW[n], ds, x[n][0], x[n][1], PRECISION, ACC),)
        dW, ds, x = sums, next_ds, next_x
    for n in tl.static_range(TOGETHER):
        p_dW = dW_ptr + (((i + n) * K + k) * J + j) * D + d
        m_dW = (i + n + 0 * k < N) & (k < K) & m  # not of one bool, see `output_gradient_kernel`
        tl.store(p_dW, fragments.weight_tile(dW[n], BLOCK_J, BLOCK_D), m_dW)
