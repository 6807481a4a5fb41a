"""What routing does to a tile of votes, as device functions. Equations: README.md.

A tile is [X, J, D] in the accumulation dtype, X being input capsules in the on-chip form and
samples in the streamed form. SDA is the method: scaled-distance agreement, else by agreement.

WINDOWS says where the input capsules of samples lie. None: one after the other, u [B, N, K]. Else
samples are windows in a grid, counted from left to right, then down, then grid by grid, and WINDOWS
is how many numbers a window's row has, and how many lie between it and the next; how many windows
are below each other in a grid, and beside each other; and how many numbers it is from grid to grid,
from a window to the one below, and to the one on the right.
"""

import triton
import triton.language as tl

from .. import device


@triton.jit
def place(multiprocessors):
    """Which tile of the batch and which slice of the input capsules a program of a grid of tiles
    and slices takes.

    If a GPU hands programs out to its multiprocessors in turn, as it seems to (NVIDIA does not
    say), those beside each other on one of them take the same slice of neighbouring tiles: they
    walk over the same input capsules, and find in L1 what one of them has read of W.
    """
    tiles = tl.num_programs(0)
    programs = tiles * tl.num_programs(1)
    n = tl.program_id(1) * tiles + tl.program_id(0)
    who = n % multiprocessors
    n = n // multiprocessors + who * (programs // multiprocessors)
    n += tl.minimum(who, programs % multiprocessors)
    return n % tiles, n // tiles


@triton.jit
def outputs(J: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Output capsules j [1, J, 1], their components d, and which of both there are [1, J, D]."""
    j = tl.arange(0, BLOCK_J)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    return j, d, (j < J) & (d < D)


@triton.jit
def sample(b, stride, WINDOWS: tl.constexpr):
    """Offset of sample b, of `stride` numbers if it is no window."""
    if WINDOWS is None:
        o = b * stride
    else:
        n = tl.cast(b, tl.uint32)
        y = tl.cast(n // WINDOWS[3] % WINDOWS[2], tl.int64)
        x = tl.cast(n % WINDOWS[3], tl.int64)
        b = tl.cast(n // (WINDOWS[2] * WINDOWS[3]), tl.int64)
        o = b * WINDOWS[4] + y * WINDOWS[5] + x * WINDOWS[6]
    return o


@triton.jit
def within(n, WINDOWS: tl.constexpr):
    """Offset of number n of [N, K] from the first of its sample."""
    if WINDOWS is not None:
        n += tl.cast(tl.cast(n, tl.uint32) // WINDOWS[0], tl.int64) * WINDOWS[1]
    return n


@triton.jit
def capsule(b, i, N, K: tl.constexpr, WINDOWS: tl.constexpr):
    """Offset of input capsule i of sample b."""
    if WINDOWS is None:
        o = (b * N + i) * K
    else:
        o = sample(b, N * K, WINDOWS) + within(i * K, WINDOWS)
    return o


@triton.jit
def store_gradient(p_du, du, m_u, WINDOWS: tl.constexpr):
    """Stores du, or adds it to what overlapping windows gave."""
    if WINDOWS is not None:
        du += tl.load(p_du, m_u, 0)
    tl.store(p_du, du, m_u)


@triton.jit
def add_votes(
    x, p_u, m_u, p_W, m_W, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr
):
    """x + u_hat as K rank-one updates (1); p_u and p_W point at component k = 0."""
    for k in tl.static_range(K):
        x += tl.load(p_u + k, m_u, 0).to(ACC) * tl.load(p_W + k * J * D, m_W, 0).to(ACC)
    return x


@triton.jit
def votes(p_u, m_u, p_W, m_W, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """u_hat [X, J, D] (equation 1)."""
    zero = tl.zeros([p_u.shape[0], p_W.shape[1], p_W.shape[2]], ACC)
    return add_votes(zero, p_u, m_u, p_W, m_W, K, J, D, ACC)


@triton.jit
def weight(table_ptr, layer, W_like_ptr, ALIGNMENT: tl.constexpr):
    """W of a layer, from a table of addresses that are all multiples of ALIGNMENT bytes."""
    return tl.multiple_of(tl.load(table_ptr + layer).to(W_like_ptr.dtype), ALIGNMENT)


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
def state(p_s, m_v, stride_s, r, like, SDA: tl.constexpr):
    """The state of iteration r >= 1, V or v(r - 1), from the sums s of the iterations before it."""
    V = tl.zeros_like(like)
    for q in range(r - 1 if SDA else 0, r):
        V += device.squash(tl.load(p_s + q * stride_s, m_v, 0), 2)
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
    WINDOWS: tl.constexpr = None,
):
    """Stores du_i = sum_j W_ij d(vote_ij) + radial_i u_i (13, 14), one component k at a time."""
    for k in tl.static_range(K):
        b_W = tl.load(p_W + k * J * D, m_W, 0).to(ACC)
        by_row = tl.reshape(g * b_W, [g.shape[0], g.shape[1] * g.shape[2], 1])
        b_du = tl.sum(by_row, 1, keep_dims=True)
        if SDA:
            b_du += radial * tl.load(p_u + k, m_u, 0).to(ACC)
        store_gradient(p_du + k, b_du, m_u, WINDOWS)
