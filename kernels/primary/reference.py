"""The specification of primary capsules, in eager PyTorch for any float dtype."""

from torch import Tensor

from ..squash.reference import squash


def primary_capsules(features: Tensor, dim: int) -> Tensor:
    """Group `dim` neighbouring channels at one position into a capsule, and squash it."""
    B, C, H, Wd = features.shape
    groups = features.unflatten(1, (C // dim, dim))  # [B, G, K, H, Wd]
    return squash(groups.permute(0, 1, 3, 4, 2).reshape(B, C // dim * H * Wd, dim))
