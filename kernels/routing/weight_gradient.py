"""The weight gradient's Triton kernel, and its launcher.

Between the launches of backward d(u_hat) is never stored: it is a sum of TERMS products of a
number a [B, N, J] and a vector x [B, J, D], for `sda` also of a number and the vote itself.
Equation 15 of README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import accumulation_type, cdiv, dot_precision, launch, padded
from . import tile


@triton.jit(do_not_specialize=["first", "B", "N", "begin", "end"])
def weight_gradient_kernel(
    u_ptr,
    W_ptr,
    a_ptr,
    x_ptr,
    dW_ptr,
    table_ptr,
    first,
    B,
    N,
    begin,
    end,
    K: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    TERMS: tl.constexpr,
    SDA: tl.constexpr,
    KEPT: tl.constexpr,
    STACKED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWS: tl.constexpr = None,
):
    """dW_i = sum_b u_i (x) d(vote_i) (equation 14) for one i and a tile of j.

    The numbers a are [TERMS (+ 1), B, end - begin, J], or if KEPT, couplings [N, J, B]; the vectors
    x [max(TERMS, 2), B, J, D]. If STACKED, u, a, x and dW begin with one dimension more, the layers
    from `first` on, and the table holds the addresses of every layer's W.
    """
    if STACKED:
        layer = tl.program_id(2).to(tl.int64)
        u_ptr += layer * B * N * K
        a_ptr += layer * (TERMS + SDA) * B * (end - begin) * J
        x_ptr += layer * max(TERMS, 2) * B * J * D
        dW_ptr += layer * N * K * J * D
        W_ptr = tile.weight(table_ptr, first + layer, W_ptr, ALIGNMENT)
    i = begin + tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    stride_a, stride_x = B.to(tl.int64) * (end - begin) * J, B.to(tl.int64) * J * D
    dW = tl.zeros([BLOCK_K, BLOCK_J * BLOCK_D], ACC)
    for start in range(0, B, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b = row[:, None, None]
        p_a = (
            a_ptr + (i * J + j) * B + b if KEPT else a_ptr + (b * (end - begin) + i - begin) * J + j
        )
        p_x = x_ptr + (b * J + j) * D + d
        m_a, m_x = (b < B) & (j < J), (b < B) & (j < J) & (d < D)
        g = tl.load(p_a, m_a, 0) * tl.load(p_x, m_x, 0)
        for t in tl.static_range(1, TERMS):
            g += tl.load(p_a + t * stride_a, m_a, 0) * tl.load(p_x + t * stride_x, m_x, 0)
        if SDA:
            p_u = u_ptr + tile.capsule(b, i, N, K, WINDOWS)
            p_W = W_ptr + i * K * J * D + j * D + d
            vote = tile.votes(p_u, b < B, p_W, (j < J) & (d < D), K, J, D, ACC)
            g += tl.load(p_a + TERMS * stride_a, m_a, 0) * vote
        p_u = u_ptr + tile.capsule(row[None, :], i, N, K, WINDOWS) + k
        b_u = tl.load(p_u, (row[None, :] < B) & (k < K), 0).to(ACC)  # [K, B]
        g = tl.reshape(g, [BLOCK_B, BLOCK_J * BLOCK_D])
        dW = tl.dot(b_u, g, dW, input_precision=PRECISION, out_dtype=ACC)
    column = tl.arange(0, BLOCK_J * BLOCK_D)[None, :]
    w_j, w_d = tl.program_id(1) * BLOCK_J + column // BLOCK_D, column % BLOCK_D
    p_dW = dW_ptr + ((i * K + k) * J + w_j) * D + w_d
    tl.store(p_dW, dW, (k < K) & (w_j < J) & (w_d < D))


def weight_gradient_tile(B: int, N: int, J: int, D: int) -> tuple[int, int]:
    """Output capsules and samples of a tile: 256 columns [J, D] if that makes programs enough."""
    columns = 256
    while columns > 64 and N * cdiv(padded(J) * padded(D), columns) < 264:
        columns //= 2
    block_j = max(1, min(padded(J), columns // padded(D)))
    return block_j, 16 if block_j * padded(D) > 128 else min(32, max(16, padded(B)))


def weight_gradient(
    u: Tensor,
    W: Tensor,
    a: Tensor,
    x: Tensor,
    dW: Tensor,
    span: tuple[int, int],
    terms: int,
    sda: bool,
    kept: bool = False,
    table: Tensor | None = None,
    alignment: int = 16,
    layers: tuple[int, int] = (0, 1),
    windows: tuple[int, ...] | None = None,
) -> None:
    """Fills dW [N, K, J, D] for the input capsules of a span, from the terms of d(vote).

    With a table of weights' addresses, multiples of `alignment`, for a run of layers: all but W
    then have layers at the front, and W tells the dtype.
    """
    B, (N, K, J, D) = x.shape[-3], W.shape
    begin, end = span
    block_j, block_b = weight_gradient_tile(B, end - begin, J, D)
    launch(
        weight_gradient_kernel,
        (end - begin, cdiv(J, block_j), layers[1] - layers[0]),
        *(u, W, a, x, dW, dW if table is None else table, layers[0], B, N, begin, end),
        K=K,
        J=J,
        D=D,
        TERMS=terms,
        SDA=sda,
        KEPT=kept,
        STACKED=table is not None,
        ALIGNMENT=alignment,
        BLOCK_B=block_b,
        BLOCK_K=padded(K),
        BLOCK_J=block_j,
        BLOCK_D=padded(D),
        ACC=accumulation_type(x),
        PRECISION=dot_precision(x),
        WINDOWS=windows,
        num_warps=8 if sda else 4 if terms > 1 else 2,
        num_stages=1,  # more loads ahead, but more conflicts of banks than that saves
    )
