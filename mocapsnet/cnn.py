"""Networks without capsules, to compare capsule networks with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import Conv2d
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
            Conv2d(c.image_shape[0], c.channels, c.kernel_size),
            nn.ReLU(),
            Conv2d(c.channels, c.channels, c.kernel_size, stride=c.stride),
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
            weight = next(self.dense.parameters(), features)  # none in quantised layers
            logits = self.dense(features.to(weight.dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if labels is not None:
                presence(labels, logits)
            return CapsNetOutput(logits.softmax(1), logits.unsqueeze(2), None)


@dataclass(frozen=True)
class ResNetConfig:
    """What `ResNet18` is built from.

    Args:
        image_shape: channels, height and width of the images.
        classes: number of classes.
    Raises: ValueError if a number is below 1.
    """

    image_shape: tuple[int, int, int]
    classes: int

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                f"image_shape must be (channels, height, width); got {self.image_shape}"
            )
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1; got {self.classes}")

    @property
    def parameters(self) -> int:
        """Numbers of the network's parameters together; nothing is allocated for it."""
        with torch.device("meta"):
            return sum(p.numel() for p in ResNet18(**vars(self)).parameters())

    @property
    def stem_numbers(self) -> int:
        """Numbers that the convolutions make of an image and their backward pass needs, at least.

        Those of the first, and of four in each of four stages.
        """
        _, height, width = self.image_shape
        halved = [(-(-height // n), -(-width // n)) for n in (2, 4, 8, 16, 32)]
        places = [h * w for h, w in halved]
        return 64 * (places[0] + 4 * sum(n * 2**i for i, n in enumerate(places[1:])))


class ResNet18(CNN):
    """torchvision's ResNet-18 with its initial weights, batch normalisation included.

    Built, trained, saved and read as `CNN`, but of these two sizes alone. With several processes or
    micro-batches each normalises its own share of a batch.

    Args:
        image_shape: channels, height and width of the images.
        classes: number of classes.
    Shapes: as `CNN`.
    Raises: ValueError as `ResNetConfig`; ImportError without torchvision.
    Source: He et al. 2016, "Deep Residual Learning for Image Recognition".
    """

    Config: ClassVar[type] = ResNetConfig

    def build(self) -> None:
        from .stem import torchvision_network

        c = self.config
        network = torchvision_network("resnet18", c.image_shape[0])
        self.convolutions = nn.Sequential(*list(network.children())[:-1])  # [B, 512, 1, 1]
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(512, c.classes))
        self.decoder = None  # type: ignore[assignment]


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
        labels = labels if labels.is_floating_point() else labels.long()
        loss = F.cross_entropy(output.capsules.squeeze(2), labels, reduction="sum")
        return LossParts(loss, loss, torch.zeros_like(loss))
