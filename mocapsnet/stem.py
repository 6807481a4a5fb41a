"""What turns an image into a feature map: residual convolutions, normalised within each sample."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

BACKBONES = {"resnet18": 64, "resnet34": 64, "resnet50": 256}
"""Networks of torchvision that can be cut at a stage, and the channels of their first stage."""


def norm(channels: int) -> nn.GroupNorm:
    """Each sample by itself: nothing depends on how a batch is split, and nothing runs along."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), where sizes change with x by a 1x1 convolution.

    The second convolution starts at zero, so that the block starts as x, however many there are.

    Args:
        channels_in, channels: before and after; stride: of the first convolution.
    Shapes: [B, channels_in, H, Wd] -> [B, channels, ceil(H / stride), ceil(Wd / stride)].
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks"; for the zeros, Zhang et
        al. 2019, "Fixup Initialization".
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(first.weight)
        nn.init.zeros_(second.weight)
        self.branch = nn.Sequential(
            norm(channels_in), nn.ReLU(), first, norm(channels), nn.ReLU(), second
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            nn.init.normal_(self.skip.weight, std=channels_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


def residual_stem(colours: int, widths: tuple[int, ...], stride: int, blocks: int) -> nn.Sequential:
    """A convolution of this stride, then stages of residual blocks; each but the first halves."""
    kernel = max(3, 2 * stride - 1)
    first = nn.Conv2d(colours, widths[0], kernel, stride, kernel // 2, bias=False)
    nn.init.normal_(first.weight, std=first.weight[0].numel() ** -0.5)
    layers: list[nn.Module] = [first]
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            halves = stage > 0 and block == 0
            layers.append(ResidualBlock(channels, width, 2 if halves else 1))
            channels = width
    return nn.Sequential(*layers)


def torchvision_network(name: str, colours: int, **options: Any) -> nn.Module:
    """A residual network of torchvision with random weights, for images of so many channels.

    Args:
        options: of torchvision's function.
    Raises: ImportError without torchvision.
    """
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise ImportError(f'{name} needs torchvision: pip install "mocapsnet[train]"') from error
    network = get_model(name, weights=None, **options)
    if colours != 3:
        network.conv1 = nn.Conv2d(colours, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def backbone_stem(name: str, stage: int, colours: int) -> nn.Sequential:
    """A network of torchvision up to the end of one of its four stages, weights drawn at random.

    Its batch normalisation is replaced by `norm`.

    Raises: ImportError without torchvision.
    """
    network = torchvision_network(name, colours, norm_layer=norm)
    return nn.Sequential(*list(network.children())[: 4 + stage])
