"""The specification of squash, in eager PyTorch for any float dtype."""

import torch
from torch import Tensor


def squash(s: Tensor) -> Tensor:
    """Shorten every vector to a length in [0, 1), keeping its direction: n / (1 + n^2) * s.

    This form of n^2 / (1 + n^2) * s / n has no division by the length n = |s|, so it needs no
    epsilon; its derivative at s = 0 is 0.
    """
    n = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * (n / (1 + n * n))
