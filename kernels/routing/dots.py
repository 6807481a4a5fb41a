"""Matrix products on tensor cores, in float32 accuracy, as device functions. See README.md.

PRECISION is "split" for three TF32 products of the operands' parts, "rounded" for one product of
the operands rounded to TF32, "exact" for one product of operands that TF32 holds exactly, and
"ieee" for units that multiply as the operands' dtype says.
"""

import triton
import triton.language as tl

LEAST_K = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16
"""Fewest columns of a matrix, and rows of another, that Triton multiplies in 32 bits."""


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
