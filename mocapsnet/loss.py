"""Margin loss and its sum with the reconstruction loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .kernels import checks
from .model import CapsNetOutput, presence


class MarginLoss(nn.Module):
    """Wants the class capsule of the true class long and all others short.

    L = sum_k T_k max(0, upper - |v_k|)^2 + down_weight (1 - T_k) max(0, |v_k| - lower)^2

    T_k is 1 for the true class and 0 for others, or the share that a class has in a mixed image.
    L is linear in T: an image of which a share p shows class a and the rest class b has the loss
    p L_a + (1 - p) L_b of both labels, as mixing wants it.

    Args:
        upper, lower: margins m+ and m- on the capsule's length.
        down_weight: weight of each absent class; None for 0.5, and with more than ten classes for
            0.5 * 9 / (classes - 1), so that all absent classes together weigh what they weigh with
            ten. With 0.5 each, many absent classes outweigh the true one, and what is learned first
            is to make all capsules short.
        reduction: "sum" over the batch, as published, or "mean".
    Shapes: lengths [B, classes], labels [B], class indices of an integer dtype, or shares
        [B, classes] between 0 and 1, of a floating dtype -> scalar.
    Raises: ValueError if an option is out of range, lengths no tensor, or labels neither. On a GPU
        an index that is no class's ends the process's work on it, as in PyTorch's own losses.
    Source: Sabour et al. 2017, equation 4.
    """

    def __init__(
        self,
        upper: float = 0.9,
        lower: float = 0.1,
        down_weight: float | None = 0.5,
        reduction: str = "sum",
    ):
        super().__init__()
        checks.choice("reduction", reduction, ("sum", "mean"))
        checks.number("upper", upper, 0, 1)
        checks.number("lower", lower, 0, 1)
        if down_weight is not None:
            checks.number("down_weight", down_weight, 0)
        if lower >= upper:
            raise ValueError(
                f"lower must be less than upper, the margins of absent and present classes; got "
                f"lower={lower} and upper={upper}"
            )
        self.upper = upper
        self.lower = lower
        self.down_weight = down_weight
        self.reduction = reduction

    def forward(self, lengths: Tensor, labels: Tensor) -> Tensor:
        loss = self.each(lengths, labels)
        return loss.sum() if self.reduction == "sum" else loss.mean()

    def each(self, lengths: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample [B], whatever the reduction."""
        if not isinstance(lengths, Tensor):
            raise ValueError(
                f"lengths must be a tensor [B, classes], not {type(lengths).__name__}; of what a "
                "network gives it is output.lengths"
            )
        lengths = lengths.float() if lengths.itemsize < 4 else lengths
        T = presence(labels, lengths)
        present = (self.upper - lengths).clamp(min=0).square()
        weight = self.down_weight
        if weight is None:
            weight = 0.5 * min(1.0, 9 / max(1, lengths.shape[1] - 1))
        absent = weight * (lengths - self.lower).clamp(min=0).square()
        if T.dtype == torch.bool:
            return torch.where(T, present, absent).sum(1)
        return (T * present + (1 - T) * absent).sum(1)


class LossParts(NamedTuple):
    """Scalars: total = margin + reconstruction_weight * reconstruction."""

    total: Tensor
    margin: Tensor
    reconstruction: Tensor


class CapsuleLoss(nn.Module):
    """Margin loss plus the weighted squared error of the reconstruction.

    As published, both parts are summed: over classes and pixels of a sample, and over the batch.
    Adam's steps do not depend on the scale of the loss as long as gradients are well above its
    epsilon, which the sum helps; gradient clipping, weight decay inside the loss and plain SGD do
    depend on it: with those, use `reduction="mean"` or a learning rate divided by the batch size.
    Of a network without a decoder the margin loss is all.

    Args:
        reconstruction_weight: lambda of the paper's equation 1, per sample and pixel.
        reduction: "sum" over the batch, or "mean"; None for that of `margin`, else "sum".
        margin: the margin loss; None for the published margins.
    Shapes: output of a model, pixels in [0, 1] [B, C, H, W], labels [B] -> `LossParts`.
    Raises: ValueError if an option is out of range or differs from the margin loss's, if pixels
        are not floating point of the reconstruction's shape, or as `MarginLoss`.
    """

    def __init__(
        self,
        reconstruction_weight: float = 5e-4,
        reduction: str | None = None,
        margin: MarginLoss | None = None,
    ):
        super().__init__()
        checks.number("reconstruction_weight", reconstruction_weight, 0)
        self.margin = margin or MarginLoss(reduction=reduction or "sum")
        if reduction not in (None, self.margin.reduction):
            raise ValueError(
                f"reduction={reduction!r} does not go with a margin loss of "
                f"reduction={self.margin.reduction!r}: give both the same, or only the latter"
            )
        self.reconstruction_weight = reconstruction_weight
        self.reduction = self.margin.reduction

    def forward(self, output: CapsNetOutput, pixels: Tensor, labels: Tensor) -> LossParts:
        margin = self.margin(output.lengths, labels)
        if output.reconstruction is None:
            return LossParts(margin, margin, torch.zeros_like(margin))
        if pixels.shape != output.reconstruction.shape:
            raise ValueError(
                f"pixels {list(pixels.shape)} must have the shape of the reconstruction "
                f"{list(output.reconstruction.shape)}"
            )
        if not pixels.is_floating_point():
            raise ValueError(
                f"pixels must be floating point in [0, 1]; got {pixels.dtype}: bytes become that "
                "by pixels.float() / 255"
            )
        error = (output.reconstruction - pixels).square().flatten(1).sum(1)
        reconstruction = error.sum() if self.reduction == "sum" else error.mean()
        total = margin + self.reconstruction_weight * reconstruction
        return LossParts(total, margin, reconstruction)
