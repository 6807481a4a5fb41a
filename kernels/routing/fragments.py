"""Loads of tiles as tensor cores hold them, as device functions.

Lane l of a warp has t = l % 4 and g = l // 4. It holds rows g and g + 8 and columns 2 t and 2 t + 1
of a product [16, 8], rows g and g + 8 and columns t and t + 4 of its first factor [16, 8], rows t
and t + 4 and column g of its second [8, 8]. A tile loaded by pointers in one row, in the order in
which a row is dealt out (neighbours to a lane, then lanes, then warps, and round again), lies there
without a conversion of layouts, which goes through shared memory. Elsewhere it is converted.

Columns of a product are [J, D], dealt out to WARPS: WJ of them along j in eights, the rest along d.
Those of a warp are ordered (d, j), and JQ is how many eights of j it has.
"""

import triton
import triton.language as tl

from .tile import sample


@triton.jit
def lanes(SIZE: tl.constexpr, V: tl.constexpr, WARPS: tl.constexpr):
    """Of a row of SIZE numbers: which of V neighbours, t, g, warp, and the rest, each [SIZE]."""
    e = tl.arange(0, SIZE)
    return e % V, e // V % 4, e // (4 * V) % 8, e // (32 * V) % WARPS, e // (32 * V * WARPS)


@triton.jit
def outputs(
    p_x,
    rows,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A tile [16, J, D] of x [.., J, D], from its first of `rows` rows on, as a product lies."""
    WJ: tl.constexpr = min(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = min(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    v, t, g, w, e = lanes(16 * BLOCK_J * BLOCK_D, V, WARPS)
    row = e // (2 * JQ * DQ) * 8 + g
    j = (e // DQ % JQ * WJ + w % WJ) * 8 + 2 * t + e // (DQ * JQ) % 2
    d = (w // WJ * DQ + e % DQ) * V + v
    x = tl.load(p_x + (row * J + j) * D + d, (row < rows) & (j < J) & (d < D), 0)
    x = tl.reshape(x, [2, 2, JQ, DQ, WARPS // WJ, WJ, 8, 4, V])
    x = tl.permute(x, (0, 6, 2, 5, 7, 1, 4, 3, 8))
    return tl.reshape(x, [16, BLOCK_J, BLOCK_D])


@triton.jit
def weights(
    p_W,
    TO_INPUTS: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
):
    """W_i [K, J, D] as the second factor of votes [WARPS, K, D J / WARPS], or if TO_INPUTS of du
    [WARPS, D J / WARPS, K]. What is summed over is in the order of `inputs` and `operand`.
    """
    WJ: tl.constexpr = min(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = min(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    v, t, g, w, e = lanes(BLOCK_K * BLOCK_J * BLOCK_D, V, WARPS)
    half = e // (DQ * JQ) % 2
    k = e // (2 * DQ * JQ) * 8 + (g if TO_INPUTS else 2 * t + half)
    j = (e // DQ % JQ * WJ + w % WJ) * 8 + (2 * t + half if TO_INPUTS else g)
    d = (w // WJ * DQ + e % DQ) * V + v
    W = tl.load(p_W + (k * J + j) * D + d, (k < K) & (j < J) & (d < D), 0)
    W = tl.reshape(W, [BLOCK_K // 8, 2, JQ, DQ, WARPS, 8, 4, V])
    if TO_INPUTS:
        W = tl.permute(W, (4, 3, 7, 2, 1, 6, 0, 5))
        y = tl.reshape(W, [WARPS, BLOCK_D * BLOCK_J // WARPS, BLOCK_K])
    else:
        W = tl.permute(W, (4, 0, 1, 6, 3, 7, 2, 5))
        y = tl.reshape(W, [WARPS, BLOCK_K, BLOCK_D * BLOCK_J // WARPS])
    return y


@triton.jit
def of_samples(p_u, first, row, stride, WINDOWS: tl.constexpr):
    """Pointers to rows that are counted from sample `first` on; see `tile.sample`."""
    if WINDOWS is None:
        p = p_u + first * stride + row * stride
    else:
        p = p_u + sample(first + row, stride, WINDOWS)
    return p


@triton.jit
def inputs(
    p_u,
    first,
    rows,
    stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """u_i [WARPS, 16, K] of `rows` samples from the first, the same for all warps, as the first
    factor of votes."""
    v, t, g, w, e = lanes(16 * BLOCK_K * WARPS, 2, WARPS)
    row, k = e % 2 * 8 + g, e // 2 * 8 + 2 * t + v
    p_u = of_samples(p_u, first, row, stride, WINDOWS)
    u = tl.load(p_u + k, (row < rows) & (k < K), 0)
    u = tl.reshape(u, [BLOCK_K // 8, 2, WARPS, 8, 4, 2])
    return tl.reshape(tl.permute(u, (2, 1, 3, 0, 5, 4)), [WARPS, 16, BLOCK_K])


@triton.jit
def samples(
    p_u,
    first,
    rows,
    stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """The same as the second factor of dW."""
    _, t, g, w, e = lanes(16 * BLOCK_K * WARPS, 1, WARPS)
    row, k = e % 4 * 4 + t, e // 4 * 8 + g
    p_u = of_samples(p_u, first, row, stride, WINDOWS)
    u = tl.load(p_u + k, (row < rows) & (k < K), 0)
    u = tl.reshape(u, [BLOCK_K // 8, 4, WARPS, 8, 4])
    return tl.reshape(tl.permute(u, (2, 1, 4, 0, 3)), [WARPS, 16, BLOCK_K])


@triton.jit
def tile(x, J: tl.constexpr, D: tl.constexpr):
    """[16, J, D] of a product [WARPS, 16, D J / WARPS]."""
    WARPS: tl.constexpr = x.shape[0]
    WJ: tl.constexpr = min(WARPS, J // 8)
    x = tl.reshape(x, [WARPS // WJ, WJ, 16, D * WJ // WARPS, J // (8 * WJ), 8])
    return tl.reshape(tl.permute(x, (2, 4, 1, 5, 0, 3)), [16, J, D])


@triton.jit
def operand(x, WARPS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[WARPS, 16, D J / WARPS] of a tile [16, J, D], a first factor; or TRANSPOSED, as for dW, with
    columns in the order of `tile`."""
    J: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    WJ: tl.constexpr = min(WARPS, J // 8)
    x = tl.reshape(x, [16, J // (8 * WJ), WJ, 4, 2, WARPS // WJ, D * WJ // WARPS])
    if TRANSPOSED:
        y = tl.reshape(tl.permute(x, (5, 2, 6, 1, 3, 4, 0)), [WARPS, D * J // WARPS, 16])
    else:
        y = tl.reshape(tl.permute(x, (5, 2, 0, 6, 1, 4, 3)), [WARPS, 16, D * J // WARPS])
    return y


@triton.jit
def weight_tile(dW, J: tl.constexpr, D: tl.constexpr):
    """[K, J, D] of a product [WARPS, D J / WARPS, K]."""
    WARPS: tl.constexpr = dW.shape[0]
    K: tl.constexpr = dW.shape[2]
    WJ: tl.constexpr = min(WARPS, J // 8)
    dW = tl.reshape(dW, [WARPS // WJ, WJ, D * WJ // WARPS, J // (8 * WJ), 8, K])
    return tl.reshape(tl.permute(dW, (5, 3, 1, 4, 0, 2)), [K, J, D])
