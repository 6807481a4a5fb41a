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
def dot(a, b, PRECISION: tl.constexpr):
    """a [M, K] @ b [K, N], or with a batch dimension before both."""
    if PRECISION == "ieee":
        x = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    elif PRECISION == "exact":
        x = tl.dot(a, b, input_precision="tf32")
    else:
        high_a, high_b = rounded(a), rounded(b)
        if PRECISION == "split":
            # a - low_a is high_a, but the compiler would take high_a once more through memory
            low_a = a - high_a
            x = tl.dot(low_a, high_b, input_precision="tf32")
            x = tl.dot(a - low_a, b - high_b, x, input_precision="tf32")
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
