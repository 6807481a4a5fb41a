"""The specification of squash, in eager PyTorch for any float dtype."""

import torch
from torch import Tensor


def squash(s: Tensor) -> Tensor:
    """Shorten every vector to a length in [0, 1), keeping its direction: n / (1 + n^2) * s.

    This form of n^2 / (1 + n^2) * s / n has no division by the length n = |s|, so it needs no
    epsilon; its derivative at s = 0 is 0.
    """
    x = s.to(torch.promote_types(s.dtype, torch.float32))  # in float16 1 + n^2 overflows
    n = length(x)
    return (x * (n / (1 + n * n))).to(s.dtype)


def length(s: Tensor) -> Tensor:
    """|s| of the last dimension, which is kept; at s = 0 its derivatives of any order are 0."""
    square = (s * s).sum(-1, keepdim=True)
    positive = square > 0
    return square.where(positive, 1).sqrt() * positive
