"""Momentum layers of one sample after the other in one program, with x and v in registers.

Routing treats samples independently, so a program that owns a sample walks through all layers
without waiting for another. Between layers x goes through memory, because a state [J, D] and the
input capsules of the next votes [N, K] lie differently in registers.
"""

import triton
import triton.language as tl

from ..routing import tile
from ..routing.on_chip import differentiate, iterate, make_votes


@triton.jit(do_not_specialize=["B", "begin", "end"])
def momentum_forward_kernel(
    x_in_ptr,
    v_in_ptr,
    table_ptr,
    W_like_ptr,
    bias_ptr,
    u_ptr,
    s_ptr,
    x_ptr,
    v_ptr,
    B,
    begin,
    end,
    J: tl.constexpr,
    D: tl.constexpr,
    GAMMA: tl.constexpr,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RESTART: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """x and v [B, J, D] of one sample after layers from begin to end; RESTART begins with v = 0.

    u [B, J, D] and s [R, B, J, D] are scratch.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_J)[:, None, None]
    j, d, m_x = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    o_x = b * J * D + j * D + d
    o_W = i * D * J * D + j * D + d
    x = tl.load(x_in_ptr + o_x, m_x, 0)
    v = tl.zeros_like(x)
    if not RESTART:
        v = tl.load(v_in_ptr + o_x, m_x, 0)
    for layer in range(begin, end):
        tl.store(u_ptr + o_x, x, m_x)
        tl.debug_barrier()
        p_u = u_ptr + (b * J + i) * D
        p_W = tile.weight(table_ptr, layer, W_like_ptr, ALIGNMENT) + o_W
        u_hat, _, _ = make_votes(p_u, i < J, p_W, (i < J) & m_x, D, J, D, SDA, ACC)
        bias = tl.zeros([1, BLOCK_J, BLOCK_D], ACC)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + (layer * J + j) * D + d, m_x, 0).to(ACC)
        stride = B.to(tl.int64) * J * D
        f = iterate(u_hat, bias, s_ptr + o_x, m_x, stride, j, J, R, SCALE, SDA)
        v = GAMMA * v + (1 - GAMMA) * f
        x += v
        tl.debug_barrier()
    tl.store(x_ptr + o_x, x, m_x)
    tl.store(v_ptr + o_x, v, m_x)


@triton.jit(do_not_specialize=["B", "begin", "end"])
def momentum_backward_kernel(
    state_in_ptr,
    state_ptr,
    table_ptr,
    W_like_ptr,
    bias_ptr,
    u_ptr,
    du_ptr,
    s_ptr,
    a_ptr,
    ds_ptr,
    B,
    begin,
    end,
    J: tl.constexpr,
    D: tl.constexpr,
    GAMMA: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    SCALE: tl.constexpr,
    SDA: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Undoes and differentiates layers from end to begin; votes serve both.

    The state is x, v, dx and dv [4, B, J, D] after the last layer; then before the first. Stores u
    [end - begin, B, J, D] and the terms of d(vote) of every layer, see `weight_gradient_kernel`.
    du [B, J, D] and s [R, B, J, D] are scratch.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_J)[:, None, None]
    j, d, m_x = tile.outputs(J, D, BLOCK_J, BLOCK_D)
    o_x = b * J * D + j * D + d
    o_W = i * D * J * D + j * D + d
    m_a = (i < J) & (j < J)
    stride = B.to(tl.int64) * J * D
    stride_a = B.to(tl.int64) * J * J
    x = tl.load(state_in_ptr + o_x, m_x, 0)
    v = tl.load(state_in_ptr + stride + o_x, m_x, 0)
    dx = tl.load(state_in_ptr + 2 * stride + o_x, m_x, 0)
    dv = tl.load(state_in_ptr + 3 * stride + o_x, m_x, 0)
    for n in range(end - begin):
        layer = end - 1 - n
        row = (layer - begin).to(tl.int64)
        x -= v
        dv += dx
        tl.store(u_ptr + row * stride + o_x, x, m_x)
        tl.debug_barrier()
        p_u = u_ptr + row * stride + (b * J + i) * D
        p_W = tile.weight(table_ptr, layer, W_like_ptr, ALIGNMENT) + o_W
        u_hat, factor, length = make_votes(p_u, i < J, p_W, (i < J) & m_x, D, J, D, SDA, ACC)
        bias = tl.zeros([1, BLOCK_J, BLOCK_D], ACC)
        if HAS_BIAS:
            bias += tl.load(bias_ptr + (layer * J + j) * D + d, m_x, 0).to(ACC)
        p_s = s_ptr + o_x
        f = iterate(u_hat, bias, p_s, m_x, stride, j, J, R, SCALE, SDA)
        v = (v - (1 - GAMMA) * f) / GAMMA
        tl.debug_barrier()
        p_a = a_ptr + row * (TERMS + SDA) * stride_a + (b * J + i) * J + j
        p_ds = ds_ptr + row * tl.maximum(TERMS, 2) * stride + o_x
        g, radial = differentiate(
            u_hat, factor, length, (1 - GAMMA) * dv, p_s, p_ds, m_x, stride, p_a, m_a, stride_a, j,
            J, R, TERMS, SCALE, SDA, FULL,
        )  # fmt: skip
        p_du = du_ptr + (b * J + i) * D
        tile.input_gradient(p_du, p_u, i < J, p_W, (i < J) & m_x, g, radial, D, J, D, SDA, ACC)
        tl.debug_barrier()
        dx += tl.load(du_ptr + o_x, m_x, 0)
        dv = GAMMA * dv
        tl.debug_barrier()
    tl.store(state_ptr + o_x, x, m_x)
    tl.store(state_ptr + stride + o_x, v, m_x)
    tl.store(state_ptr + 2 * stride + o_x, dx, m_x)
    tl.store(state_ptr + 3 * stride + o_x, dv, m_x)
