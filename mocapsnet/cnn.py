"""A plain convolutional network, to compare capsule networks with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.launch import full_precision
from .loss import CapsuleLoss, LossParts
from .model import CapsNet, CapsNetOutput, presence


class CNN(CapsNet):
    """A network without capsules and of as many parameters as `MoCapsNet` of the same options.

    The two convolutions are those of the capsule networks. What follows them, capsules, routing and
    decoder, is replaced by one hidden layer of ReLUs, as wide as makes the number of parameters
    that of the `MoCapsNet`, decoder included, and a layer of a logit for every class. It is a
    `CapsNet` only in that it is built, trained, saved and read as one. PyTorch's initial weights.

    Args:
        image_shape, classes, options: as `MoCapsNet`; those of capsules, blocks and decoder count
            for the number of parameters, and those of routing, momentum and `init` for nothing.
    Shapes: images [B, C, H, W], normalised -> `CapsNetOutput`: `lengths` are the probabilities of
        the classes [B, classes], their sum 1, `capsules` the logits [B, classes, 1], and
        `reconstruction` is None. Labels are checked and not used.
    Raises: ValueError as `CapsNet`.
    """

    has_capsules = False
    class_loss = "cross-entropy"

    def build(self) -> None:
        c = self.config
        convolutions: list[nn.Module] = [
            nn.Conv2d(c.image_shape[0], c.channels, c.kernel_size),
            nn.ReLU(),
            nn.Conv2d(c.channels, c.channels, c.kernel_size, stride=c.stride),
        ]
        self.convolutions = nn.Sequential(*convolutions)
        features = c.channels * math.prod(c.feature_size)
        left = c.parameters - sum(p.numel() for p in self.convolutions.parameters()) - c.classes
        hidden = round(left / (features + 1 + c.classes))
        self.dense = nn.Sequential(
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, c.classes),
        )
        self.decoder = None  # type: ignore[assignment]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CapsNetOutput:
        features = self.features(images)
        with full_precision(images):
            weight = next(self.dense.parameters())
            logits = self.dense(features.to(weight.dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if labels is not None:
                presence(labels, logits)
            return CapsNetOutput(logits.softmax(1), logits.unsqueeze(2), None)


class CrossEntropy(nn.Module):
    """What stands in the place of `MarginLoss` for a `CNN`: -log of the true class's probability.

    Shapes: probabilities [B, classes], labels as `MarginLoss` -> scalar, the sum over the batch.
    """

    def forward(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        return self.each(probabilities, labels).sum()

    def each(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample [B]."""
        logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return -(presence(labels, probabilities) * logs).sum(1)


class CNNLoss(CapsuleLoss):
    """Cross-entropy of a `CNN`, summed over the batch like the losses of capsule networks.

    Shapes: output of a `CNN`, pixels (not used), labels as `MarginLoss` -> `LossParts`, of which
        `total` and `margin` are the cross-entropy, and `reconstruction` is 0.
    """

    def __init__(self) -> None:
        super().__init__(reconstruction_weight=0.0)
        self.margin = CrossEntropy()  # type: ignore[assignment]

    def forward(self, output: CapsNetOutput, pixels: Tensor, labels: Tensor) -> LossParts:
        presence(labels, output.lengths)
        loss = F.cross_entropy(output.capsules.squeeze(2), labels, reduction="sum")
        return LossParts(loss, loss, torch.zeros_like(loss))
