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


@triton.constexpr_function
def smaller(a, b):
    """Of two constants; by min, Triton before 3.6 makes tensors of them."""
    return min(a, b)


@triton.constexpr_function
def larger(a, b):
    return max(a, b)


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
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
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
def half_of_weights(
    p_W,
    HALF: tl.constexpr,
    TO_INPUTS: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    left,
):
    """Half of W_i in one row.

    Lanes whose rows of W lie in the same banks load one the first part, another the second part
    of what both need: half as many conflicts.
    """
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    ALONG_D: tl.constexpr = not TO_INPUTS and DQ > 1
    DH: tl.constexpr = DQ // 2 if ALONG_D else DQ
    v, t, g, w, e = lanes(BLOCK_K * BLOCK_J * BLOCK_D // 2, V, WARPS)
    d, rest = e % DH, e // (DH * JQ)
    j = (e // DH % JQ * WJ + w % WJ) * 8
    if TO_INPUTS:
        k = rest * 8 + g
        j += 2 * t + ((g & 1) ^ HALF)
    elif ALONG_D:
        d = 2 * d + ((t & 1) ^ HALF)
        k = rest // 2 * 8 + 2 * t + rest % 2
        j += g
    else:
        k = rest * 8 + 2 * t + HALF
        j += g
    d = (w // WJ * DQ + d) * V + v
    return tl.load(p_W + (k * J + j) * D + d, (k < K) & (j < left) & (d < D), 0)


@triton.jit
def load_weights(
    p_W,
    TO_INPUTS: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    left,
):
    """Both halves of W_i [K, J, D], for `weights`; there are `left` output capsules from p_W on."""
    return (
        half_of_weights(p_W, 0, TO_INPUTS, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, left),
        half_of_weights(p_W, 1, TO_INPUTS, K, J, D, BLOCK_K, BLOCK_J, BLOCK_D, WARPS, left),
    )


@triton.jit
def weights(
    halves,
    TO_INPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
):
    """W_i as the second factor of votes [WARPS, K, D J / WARPS], or if TO_INPUTS of du
    [WARPS, D J / WARPS, K]. What is summed over is in the order of `inputs` and `operand`.
    """
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    ALONG_D: tl.constexpr = not TO_INPUTS and DQ > 1
    first, second = halves
    if TO_INPUTS or ALONG_D:
        _, t, g, _, _ = lanes(BLOCK_K * BLOCK_J * BLOCK_D // 2, V, WARPS)
        swapped = (g if TO_INPUTS else t) % 2 == 1
        W = tl.join(tl.where(swapped, second, first), tl.where(swapped, first, second))
    else:
        W = tl.join(first, second)
    if ALONG_D:
        W = tl.reshape(W, [BLOCK_K // 8, 2, JQ, DQ // 2, WARPS, 8, 4, V, 2])
        W = tl.permute(W, (4, 0, 1, 6, 3, 8, 7, 2, 5))
    else:
        W = tl.reshape(W, [BLOCK_K // 8, JQ, DQ, WARPS, 8, 4, V, 2])
        if TO_INPUTS:
            W = tl.permute(W, (3, 2, 6, 1, 7, 5, 0, 4))
        else:
            W = tl.permute(W, (3, 0, 7, 5, 2, 6, 1, 4))
    if TO_INPUTS:
        y = tl.reshape(W, [WARPS, BLOCK_D * BLOCK_J // WARPS, BLOCK_K])
    else:
        y = tl.reshape(W, [WARPS, BLOCK_K, BLOCK_D * BLOCK_J // WARPS])
    return y


@triton.jit
def whole_weights(
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
    """What `weights` makes, by one load in place, which takes fewer registers."""
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
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
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """u_i [WARPS, B, K] of `rows` samples from the first, the same for all warps, as the first
    factor of votes."""
    EIGHTS: tl.constexpr = BLOCK_B // 8
    v, t, g, w, e = lanes(BLOCK_B * BLOCK_K * WARPS, 2, WARPS)
    row, k = e % EIGHTS * 8 + g, e // EIGHTS * 8 + 2 * t + v
    p_u = of_samples(p_u, first, row, stride, WINDOWS)
    u = tl.load(p_u + k, (row < rows) & (k < K), 0)
    u = tl.reshape(u, [BLOCK_K // 8, EIGHTS, WARPS, 8, 4, 2])
    return tl.reshape(tl.permute(u, (2, 1, 3, 0, 5, 4)), [WARPS, BLOCK_B, BLOCK_K])


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
    """u_i [WARPS, 16, K] as the second factor of dW."""
    _, t, g, w, e = lanes(16 * BLOCK_K * WARPS, 1, WARPS)
    row, k = e % 4 * 4 + t, e // 4 * 8 + g
    p_u = of_samples(p_u, first, row, stride, WINDOWS)
    u = tl.load(p_u + k, (row < rows) & (k < K), 0)
    u = tl.reshape(u, [BLOCK_K // 8, 4, WARPS, 8, 4])
    return tl.reshape(tl.permute(u, (2, 1, 4, 0, 3)), [WARPS, 16, BLOCK_K])


@triton.jit
def tile(x, J: tl.constexpr, D: tl.constexpr):
    """[B, J, D] of a product [WARPS, B, D J / WARPS]."""
    WARPS: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    WJ: tl.constexpr = smaller(WARPS, J // 8)
    x = tl.reshape(x, [WARPS // WJ, WJ, B, D * WJ // WARPS, J // (8 * WJ), 8])
    return tl.reshape(tl.permute(x, (2, 4, 1, 5, 0, 3)), [B, J, D])


@triton.jit
def operand(x, WARPS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[WARPS, B, D J / WARPS] of a tile [B, J, D], a first factor; or TRANSPOSED, as for dW, with
    columns in the order of `tile`."""
    B: tl.constexpr = x.shape[0]
    J: tl.constexpr = x.shape[1]
    D: tl.constexpr = x.shape[2]
    WJ: tl.constexpr = smaller(WARPS, J // 8)
    x = tl.reshape(x, [B, J // (8 * WJ), WJ, 4, 2, WARPS // WJ, D * WJ // WARPS])
    if TRANSPOSED:
        y = tl.reshape(tl.permute(x, (5, 2, 6, 1, 3, 4, 0)), [WARPS, D * J // WARPS, B])
    else:
        y = tl.reshape(tl.permute(x, (5, 2, 0, 6, 1, 4, 3)), [WARPS, B, D * J // WARPS])
    return y


@triton.jit
def weight_tile(dW, J: tl.constexpr, D: tl.constexpr):
    """[K, J, D] of a product [WARPS, D J / WARPS, K]."""
    WARPS: tl.constexpr = dW.shape[0]
    K: tl.constexpr = dW.shape[2]
    WJ: tl.constexpr = smaller(WARPS, J // 8)
    dW = tl.reshape(dW, [WARPS // WJ, WJ, D * WJ // WARPS, J // (8 * WJ), 8, K])
    return tl.reshape(tl.permute(dW, (5, 3, 1, 4, 0, 2)), [K, J, D])


@triton.jit
def coupling_place(b, j, BLOCK_J: tl.constexpr):
    """Where a coupling of one input capsule is kept: a tile of 16 samples after another, and in it
    eight output capsules after another, in the order in which lanes hold them as a product."""
    tile = (b // 16 * (BLOCK_J // 8) + j // 8) * 128
    return tile + b % 8 * 16 + j % 8 // 2 * 4 + b // 8 % 2 * 2 + j % 2


@triton.jit
def place_of_coupling(c_ptr, i, b, j, B, J: tl.constexpr, FRAGMENTS: tl.constexpr):
    """Pointers to couplings as [N, J, B], or if FRAGMENTS, in the order of `coupling_place`."""
    BLOCK_J: tl.constexpr = larger(triton.next_power_of_2(J), 8)
    if FRAGMENTS:
        p = c_ptr + i * (tl.cdiv(B, 16) * 16).to(tl.int64) * BLOCK_J + coupling_place(b, j, BLOCK_J)
    else:
        p = c_ptr + (i * J + j) * B + b
    return p


@triton.jit
def store_couplings(p_c, c, samples):
    """Stores c [B, J, 1] in the order of `coupling_place`, whole tiles with one of the samples."""
    B: tl.constexpr = c.shape[0]
    J: tl.constexpr = c.shape[1]
    c = tl.reshape(c, [B // 16, 2, 8, J // 8, 4, 2])
    # in two dimensions, else Triton deals out a row of u of the same size like this one
    c = tl.reshape(tl.permute(c, (0, 3, 2, 4, 1, 5)), [B * J // 4, 4])
    place = 4 * tl.arange(0, B * J // 4)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(p_c + place, c, place // (16 * J) * 16 < samples)


@triton.jit
def couplings(p_c, samples, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, WARPS: tl.constexpr):
    """Kept couplings [WARPS, B, 1, J WARPS / WARPS_J] of some samples, for products with d(vote) as
    the first factor of du: J as in `operand`."""
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    v, t, g, w, e = lanes(BLOCK_B * BLOCK_J * WARPS // WJ, 4, WARPS)
    place = ((e * WJ + w % WJ) * 32 + g * 4 + t) * 4 + v
    c = tl.load(p_c + place, e // JQ * 16 < samples, 0)
    c = tl.reshape(c, [BLOCK_B // 16, JQ, WARPS // WJ, WJ, 8, 4, 2, 2])
    return tl.reshape(tl.permute(c, (2, 3, 0, 6, 4, 1, 7, 5)), [WARPS, BLOCK_B, 1, JQ * 8])


@triton.jit
def transposed_couplings(p_c, BLOCK_J: tl.constexpr, WARPS: tl.constexpr):
    """Kept couplings [WARPS, 1, J WARPS / WARPS_J, 16] of 16 samples, as the first factor of dW."""
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    _, t, g, w, e = lanes(16 * BLOCK_J * WARPS // WJ, 1, WARPS)
    j = (e // 4 * WJ + w % WJ) * 8 + g
    c = tl.load(p_c + coupling_place(e % 4 * 4 + t, j, BLOCK_J))
    c = tl.reshape(c, [JQ, 4, WARPS // WJ, WJ, 8, 4])
    return tl.reshape(tl.permute(c, (2, 3, 0, 4, 1, 5)), [WARPS, 1, JQ * 8, 16])


@triton.jit
def transposed_place(b, j, d, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr):
    """Where ds of a sample lies for `transposed_outputs`: 16 samples after another."""
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    w = d // (DQ * V) * WJ + j // 8 % WJ
    e = d // V % DQ + DQ * (j // (8 * WJ) + JQ * (b % 16 // 4))
    place = (((e * WARPS + w) * 8 + j % 8) * 4 + b % 4) * V + d % V
    return b // 16 * (16 * BLOCK_J * BLOCK_D) + place


@triton.jit
def transposed_outputs(p_x, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr):
    """ds of 16 samples [WARPS, D WARPS_J / WARPS, J / WARPS_J, 16], as the first factor of dW."""
    WJ: tl.constexpr = smaller(WARPS, BLOCK_J // 8)
    JQ: tl.constexpr = BLOCK_J // (8 * WJ)
    V: tl.constexpr = smaller(4, BLOCK_D * WJ // WARPS)
    DQ: tl.constexpr = BLOCK_D * WJ // (WARPS * V)
    x = tl.load(p_x + tl.arange(0, 16 * BLOCK_J * BLOCK_D))
    x = tl.reshape(x, [4, JQ, DQ, WARPS // WJ, WJ, 8, 4, V])
    x = tl.permute(x, (3, 4, 2, 7, 1, 5, 0, 6))
    return tl.reshape(x, [WARPS, DQ * V, JQ * 8, 16])
