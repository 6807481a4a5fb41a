"""Matrix products on tensor cores, in float32 accuracy, as device functions. See README.md.

PRECISION is "split" for three TF32 products of the operands' parts, "rounded" for one product of
the operands rounded to TF32, "exact" for one product of operands that TF32 holds exactly, and
"ieee" for units that multiply as the operands' dtype says.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """x rounded to the nearest number of TF32, which has 13 bits less."""
    bits = x.to(tl.uint32, bitcast=True) + 4096
    return (bits & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_again(x):
    """The same, written so that LLVM knows and Triton does not: Triton would take the second use of
    the first factor in a product through shared memory."""
    bits = x.to(tl.uint32, bitcast=True) + 4096
    return (bits >> 13 << 13).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [M, K] @ b [K, N], or with a batch dimension before both."""
    if PRECISION == "ieee":
        x = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    elif PRECISION == "exact":
        x = tl.dot(a, b, input_precision="tf32")
    else:
        high_a, high_b = rounded(a), rounded(b)
        if PRECISION == "split":
            x = tl.dot(a - high_a, high_b, input_precision="tf32")
            x = tl.dot(rounded_again(a), b - high_b, x, input_precision="tf32")
            x = tl.dot(high_a, high_b, x, input_precision="tf32")
        else:
            x = tl.dot(high_a, high_b, input_precision="tf32")
    return x


@triton.jit
def add(x, y):
    """x + y, added outside of the tensor cores, which do not round sums to the nearest.

    Written x + y it would become the addend of the product that y is.
    """
    return tl.fma(y, tl.full([1] * len(y.shape), 1, y.dtype), x)


@triton.jit
def votes(p_u, m_u, p_W, m_W, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """u_hat [X, J, D] from pointers to u [X, K] and W [K, J, D] (equation 1).

    The columns of the product are in the order (d, j), so that a thread has whole rows of D.
    """
    b_u = tl.load(p_u, m_u, 0).to(ACC)
    b_W = tl.permute(tl.load(p_W, m_W, 0).to(ACC), (0, 2, 1))
    X: tl.constexpr = b_u.shape[0]
    K: tl.constexpr = b_W.shape[0]
    D: tl.constexpr = b_W.shape[1]
    J: tl.constexpr = b_W.shape[2]
    x = dot(b_u, tl.reshape(b_W, [K, D * J]), PRECISION)
    return tl.permute(tl.reshape(x, [X, D, J]), (0, 2, 1))


@triton.jit
def input_gradient(g, p_W, m_W, WARPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """du_i [X, K] = sum_j W_ij d(vote_ij) (14), from g [X, J, D] and pointers to W [K, J, D].

    Each warp sums over the columns that it has of g as `votes` leaves them: of every eight columns
    (d, j) a thread has two neighbours, and as an operand numbers four apart.
    """
    b_W = tl.permute(tl.load(p_W, m_W, 0).to(ACC), (0, 2, 1))
    X: tl.constexpr = g.shape[0]
    K: tl.constexpr = b_W.shape[0]
    ROWS: tl.constexpr = g.shape[1] * g.shape[2] // (8 * WARPS)
    g = tl.reshape(tl.permute(g, (0, 2, 1)), [X, ROWS, WARPS, 4, 2])
    g = tl.reshape(tl.permute(g, (2, 0, 1, 4, 3)), [WARPS, X, ROWS * 8])
    b_W = tl.reshape(b_W, [K, ROWS, WARPS, 4, 2])
    b_W = tl.reshape(tl.permute(b_W, (2, 1, 4, 3, 0)), [WARPS, ROWS * 8, K])
    return tl.sum(dot(g, b_W, PRECISION), 0)


@triton.jit
def weight_gradient(g, b_u, WARPS: tl.constexpr, PRECISION: tl.constexpr):
    """sum_b d(vote_i) (x) u_i (14) from g [B, J, D] and u [B, K]: [WARPS, D J / WARPS, K].

    Each warp has eight neighbours of J and rows of D, so a thread few couplings; see `unpacked`.
    """
    B: tl.constexpr = g.shape[0]
    ROWS: tl.constexpr = g.shape[1] * g.shape[2] // (8 * WARPS)
    g = tl.reshape(tl.permute(g, (0, 2, 1)), [B, ROWS, WARPS, 8])
    g = tl.reshape(tl.permute(g, (2, 1, 3, 0)), [WARPS, ROWS * 8, B])
    b_u = tl.broadcast_to(b_u[None, :, :], [WARPS, B, b_u.shape[1]])
    return dot(g, b_u, PRECISION)


@triton.jit
def unpacked(dW, J: tl.constexpr, D: tl.constexpr):
    """[K, J, D] from what `weight_gradient` made."""
    WARPS: tl.constexpr = dW.shape[0]
    K: tl.constexpr = dW.shape[2]
    dW = tl.reshape(dW, [WARPS, D * J // (8 * WARPS), 8, K])
    return tl.permute(tl.reshape(tl.permute(dW, (3, 1, 0, 2)), [K, D, J]), (0, 2, 1))
