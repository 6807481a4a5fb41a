"""Device functions that the kernels share. Tiles are in the accumulation dtype."""

import triton
import triton.language as tl


@triton.jit
def squash(s, axis: tl.constexpr):
    """n / (1 + n^2) s for vectors along `axis`."""
    n = tl.sqrt(tl.sum(s * s, axis, keep_dims=True))
    return s * (n / (1 + n * n))


@triton.jit
def squash_gradient(s, dv, axis: tl.constexpr):
    """ds = n / (1 + n^2) dv + (1 - n^2) / (1 + n^2)^2 (dv . s / n) s; the last term is 0 at 0."""
    n = tl.sqrt(tl.sum(s * s, axis, keep_dims=True))
    q = 1 + n * n
    along = tl.sum(dv * (s / tl.where(n > 0, n, 1)), axis, keep_dims=True)
    return dv * (n / q) + s * ((1 - n * n) / q / q * along)


@triton.jit
def softmax(b, valid, axis: tl.constexpr):
    """Softmax along `axis` over the valid entries; 0 elsewhere."""
    b = tl.where(valid, b, float("-inf"))
    e = tl.exp(b - tl.max(b, axis, keep_dims=True))
    return e / tl.sum(e, axis, keep_dims=True)
