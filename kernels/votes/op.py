"""The public function `votes`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import reference


def votes(u: Tensor, W: Tensor, *, backend: str | None = None) -> Tensor:
    """Predict every output capsule from every input capsule: u_hat_ij = u_i W_ij.

    `routing` never needs the votes as a whole; this function is for those who do.

    Args:
        u: input capsules [B, N, K], floating point.
        W: transformation matrices [N, K, J, D], same device. Two dtypes are promoted to one.
        backend: None or "reference" (eager PyTorch).
    Returns: votes [B, N, J, D].
    Raises: ValueError if shapes, dtypes or devices do not fit, or the backend is unknown.
    Source: Sabour et al. 2017, equation 2.
    """
    checks.capsules_and_weight(u, W)
    checks.choice("backend", backend, (None, "reference"))
    dtype = torch.promote_types(u.dtype, W.dtype)
    return reference.votes(u.to(dtype), W.to(dtype))
