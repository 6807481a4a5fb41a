"""The public function `squash`."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from . import reference


def squash(s: Tensor, *, backend: str | None = None) -> Tensor:
    """Shorten every vector of the last dimension to a length in [0, 1), keeping its direction.

    squash(s) = |s| / (1 + |s|^2) * s. A zero vector stays zero and passes a zero gradient.

    Args:
        s: vectors [..., D], floating point.
        backend: None or "reference" (eager PyTorch).
    Returns: squashed vectors [..., D], dtype of `s`.
    Raises: ValueError if `s` is not a floating-point tensor with at least one dimension, or the
        backend is unknown.
    Source: Sabour et al. 2017, equation 1.
    """
    if not isinstance(s, Tensor) or not s.is_floating_point() or s.dim() == 0:
        got = f"{s.dtype} {list(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
        raise ValueError(f"s must be a floating-point tensor [..., D]; got {got}")
    checks.choice("backend", backend, (None, "reference"))
    return reference.squash(s)
