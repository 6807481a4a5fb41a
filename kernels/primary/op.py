"""The public function `primary_capsules`."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from . import reference


def primary_capsules(features: Tensor, dim: int, *, backend: str | None = None) -> Tensor:
    """Turn a convolution's output into squashed primary capsules.

    A capsule is made of `dim` neighbouring channels at one position. Capsules are ordered by
    channel group, then row, then column.

    Args:
        features: feature maps [B, C, H, Wd], floating point, C a multiple of `dim`.
        dim: components per capsule.
        backend: None or "reference" (eager PyTorch).
    Returns: capsules [B, (C // dim) * H * Wd, dim], length of each in [0, 1), dtype of `features`.
    Raises: ValueError if `features` has another rank or dtype, C is not a multiple of `dim`, or
        the backend is unknown.
    Source: Sabour et al. 2017, section 4.
    """
    checks.tensor("features", features, "B C H Wd")
    checks.choice("backend", backend, (None, "reference"))
    if dim < 1 or features.shape[1] % dim:
        raise ValueError(
            f"the {features.shape[1]} channels of features {list(features.shape)} cannot be "
            f"grouped into capsules of dim={dim}: use a positive divisor of the channel count"
        )
    return reference.primary_capsules(features, dim)
