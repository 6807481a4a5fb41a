"""Convolutional momentum capsules: a capsule network for natural images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .conv_layers import ConvCapsuleLayer, output_size
from .depth import stream_lengths
from .kernels import checks, squash
from .layers import CapsuleLayer, squashed
from .model import CLASS_SUM_LENGTH, CapsNet, Decoder
from .reversible import MomentumStack
from .stem import BACKBONES, backbone_stem, norm, residual_stem

# Of weighted sums before squash. A relative error of s becomes 2 / (1 + s^2) times as large in v:
# here one as large, at the 0.5 of dense networks one 1.6 times as large, layer after layer.
SUM_LENGTH = 1.0

PRESETS: dict[int, dict[str, Any]] = {
    8: dict(stem=(16, 32), capsules=8, stage_strides=(1,)),
    32: dict(stem=(32, 64, 128)),
    64: dict(stem=(32, 64, 128), stem_stride=2),
    224: dict(stem=(32, 64, 128, 256), stem_stride=2, capsules=32),
}
"""Fields of `ConvMoCapsNetConfig` that suit images of so many pixels a side."""


@dataclass(frozen=True)
class ConvMoCapsNetConfig:
    """What `ConvMoCapsNet` is built from.

    Args:
        image_shape: channels, height and width of the images.
        classes: number of classes.
        stem: channels of the stem's stages; each but the first halves the feature map.
        stem_stride: of the first convolution.
        stem_blocks: residual blocks in every stage of the stem.
        backbone: instead of that stem, a network of torchvision, "resnet18", "resnet34" or
            "resnet50", with random weights and normalised within each sample.
        backbone_stage: its last stage used, 1 to 4, of 1/4, 1/8, 1/16 and 1/32 of the image's size.
        capsules, capsule_dim: capsules at every place of the grid, components of each.
        stage_strides: one for each stage, which begins with a convolutional capsule layer of this
            stride, or with its blocks if that is 1.
        window: height and width of the windows of all convolutional capsule layers, odd.
        blocks: reversible momentum blocks of two layers in every stage.
        class_dim: components of a class capsule.
        decoder: units of the decoder's hidden layers; None for no decoder.
        iterations, method, routing_grad, routing_backend: see `mocapsnet.kernels.conv_routing`.
        gamma, velocity, memory, anchor_every: see `MomentumStack`.
    Raises: ValueError if a value is out of range, or the images are too small.
    """

    image_shape: tuple[int, int, int]
    classes: int
    stem: tuple[int, ...] = (32, 64, 128)
    stem_stride: int = 1
    stem_blocks: int = 1
    backbone: str | None = None
    backbone_stage: int = 2
    capsules: int = 16
    capsule_dim: int = 8
    stage_strides: tuple[int, ...] = (2,)
    window: int = 3
    blocks: int = 1
    class_dim: int = 16
    decoder: tuple[int, ...] | None = None
    iterations: int = 3
    method: str = "rba"
    routing_grad: str = "final"
    gamma: float = 0.9
    velocity: str = "network"
    memory: str = "reversible"
    anchor_every: int | None = None
    routing_backend: str | None = None

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                f"image_shape must be (channels, height, width); got {self.image_shape}"
            )
        sizes = "classes stem_stride stem_blocks capsules capsule_dim window class_dim"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("stem", "stage_strides"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(
                    f"{name} must be integers of at least 1, one a stage; got {values}"
                )
        if min(self.decoder or (), default=1) < 1:
            raise ValueError(f"decoder: every width must be at least 1; got {self.decoder}")
        if self.blocks < 0:
            raise ValueError(f"blocks must be at least 0; got {self.blocks}")
        if self.window % 2 == 0:
            raise ValueError(f"window must be odd; got {self.window}")
        checks.choice("backbone", self.backbone, (None, *BACKBONES))
        checks.choice("backbone_stage", self.backbone_stage, (1, 2, 3, 4))
        if not self._fits(self.image_shape[1:]):
            size = next(n for n in range(1, 2**20) if self._fits((n, n)))
            grids = " to ".join(f"{h}x{w}" for h, w in self.grids)
            raise ValueError(
                f"images of {self.image_shape[1]}x{self.image_shape[2]} pixels are too small: "
                f"they make grids of {grids} capsules, where windows have {self.window}x"
                f"{self.window}; use images of at least {size}x{size} pixels, a smaller window or "
                "fewer stages and strides"
            )

    @classmethod
    def preset(
        cls, image_shape: Sequence[int], classes: int, size: int | None = None, **options: Any
    ) -> ConvMoCapsNetConfig:
        """A configuration with the preset for images of 8, 32, 64 or 224 pixels a side.

        Args:
            size: which; None for the nearest to the shorter side of the image.
            options: fields that differ from the preset.
        """
        if size is None:
            side = min(image_shape[1:])
            size = min(PRESETS, key=lambda n: abs(math.log(n / side)))
        checks.choice("preset", size, tuple(PRESETS))
        return cls(tuple(image_shape), classes, **(PRESETS[size] | options))  # type: ignore[arg-type]

    @property
    def features(self) -> tuple[int, int, int]:
        """Channels, height and width of the feature map that becomes primary capsules."""
        channels = self.stem[-1]
        if self.backbone is not None:
            channels = BACKBONES[self.backbone] * 2 ** (self.backbone_stage - 1)
        height, width = self._halved(self.image_shape[1:])
        return channels, height, width

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Height and width of the grid of the primary capsules, and of every stage."""
        return self._grids(self.features[1:])

    @property
    def parameters(self) -> int:
        """Numbers of the network's parameters together; nothing is allocated for it."""
        with torch.device("meta"):
            return sum(p.numel() for p in ConvMoCapsNet(**vars(self)).parameters())

    @property
    def stem_numbers(self) -> int:
        """Numbers that the stem makes of an image and its backward pass needs, at least."""
        channels, height, width = self.features
        if self.backbone is not None:
            return channels * height * width
        return sum(
            2 * self.stem_blocks * width * height * wd
            for stage, width in enumerate(self.stem)
            for height, wd in [self._halved(self.image_shape[1:], stage + 1)]
        )

    def _halved(self, size: Sequence[int], stages: int | None = None) -> tuple[int, int]:
        """Height and width of the feature map, or after so many stages of the stem."""
        strides = [self.stem_stride, *[2] * (len(self.stem) - 1)][:stages]
        if self.backbone is not None:
            strides = [2] * (self.backbone_stage + 1)
        height, width = size
        for stride in strides:
            height, width = -(-height // stride), -(-width // stride)
        return height, width

    def _grids(self, size: Sequence[int]) -> list[tuple[int, int]]:
        grids = [(size[0], size[1])]
        for stride in self.stage_strides:
            height, width = (
                output_size(n, self.window, stride, self.window // 2) for n in grids[-1]
            )
            grids.append((height, width))
        return grids

    def _fits(self, size: Sequence[int]) -> bool:
        """Whether no window is larger than the grid that it moves over."""
        grids = self._grids(self._halved(size))
        return min(map(min, grids if self.blocks else grids[:-1])) >= self.window


class ConvMoCapsNet(CapsNet):
    """A capsule network of convolutional capsule layers in reversible momentum blocks.

    A residual stem, or a network of torchvision cut at a stage, turns the image into a feature map,
    whose channels at every place become primary capsules [H, Wd, N, K]. Stages follow: where the
    grid is to shrink a strided `ConvCapsuleLayer`, then a `MomentumStack` of layers that keep it,
    whose activations are not stored. At the end every capsule of the last grid votes for
    every class by a matrix of its own (`CapsuleLayer`), so votes see where on the grid they come
    from.

    Capsules start with known lengths as in `CapsNet`: the projection to primary capsules is drawn
    so that they have length 1 before squash, and every capsule layer for the length that reaches it
    and the size of its grid; capsules in the stream then have length 0.5, and what a layer's sums
    are too long or too short by is not amplified by squash.

    Normalisation is within each sample (`nn.GroupNorm`), also in the backbone: nothing depends on
    how a batch is split over processes and micro-batches, and nothing but weights is learned.
    Under autocast only the stem runs in the lower precision.

    With more than ten classes it learns sooner with `MarginLoss(down_weight=None)` and, for the
    weights of `last`, a learning rate `classes / 10` times as large, as `mocapsnet train` does it.

    Args:
        image_shape: channels, height and width of the images.
        classes: number of classes.
        options: any other field of `ConvMoCapsNetConfig`; see there for `preset`.
    Shapes: as `CapsNet`; without a decoder, `reconstruction` is None.
    Raises: ValueError as `ConvMoCapsNetConfig` and `CapsNet`; ImportError for a backbone without
        torchvision.
    """

    Config = ConvMoCapsNetConfig
    config: ConvMoCapsNetConfig  # type: ignore[assignment]

    def build(self) -> None:
        c = self.config
        colours, (channels, *_), (N, K) = c.image_shape[0], c.features, (c.capsules, c.capsule_dim)
        if c.backbone is None:
            stem = residual_stem(colours, c.stem, c.stem_stride, c.stem_blocks)
        else:
            stem = backbone_stem(c.backbone, c.backbone_stage, colours)
        project = nn.Conv2d(channels, N * K, 1)
        # relu of normalised features has a mean square of 1/2
        nn.init.normal_(project.weight, std=SUM_LENGTH * (2 / channels / K) ** 0.5)
        nn.init.constant_(project.bias, 0)  # type: ignore[arg-type]
        self.convolutions = nn.Sequential(*stem, norm(channels), nn.ReLU(), project)

        options = dict(
            iterations=c.iterations,
            method=c.method,
            routing_grad=c.routing_grad,
            backend=c.routing_backend,
        )
        stages: list[nn.Module] = []
        length, before = squashed(SUM_LENGTH), c.grids[0]
        for stride, grid in zip(c.stage_strides, c.grids[1:], strict=True):
            if stride > 1:
                layer = ConvCapsuleLayer(
                    *(N, K, N, K),
                    kernel_size=c.window,
                    stride=stride,
                    in_length=length,
                    sum_length=SUM_LENGTH,
                    grid=before,
                    **options,  # type: ignore[arg-type]
                )
                stages.append(layer)
            stack = MomentumStack.of_capsules(
                *(2 * c.blocks, N, K),
                in_length=squashed(SUM_LENGTH),
                kernel_size=c.window,
                layer=options | {"grid": grid},
                gamma=c.gamma,
                velocity=c.velocity,
                memory=c.memory,
                anchor_every=c.anchor_every,
            )
            stages.append(stack)
            length = stream_lengths(stack.stream_weights, 2 * c.blocks, squashed(SUM_LENGTH))[-1]
            before = grid
        self.stages = nn.Sequential(*stages)
        self.last = CapsuleLayer(
            *(math.prod(before) * N, K, c.classes, c.class_dim),
            in_length=length,
            sum_length=CLASS_SUM_LENGTH,
            **options,  # type: ignore[arg-type]
        )
        self.decoder = None  # type: ignore[assignment]
        if c.decoder is not None:
            self.decoder = Decoder(c.classes * c.class_dim, c.decoder, c.image_shape)

    def features(self, images: Tensor) -> Tensor:
        # Channels last in memory: on a CPU the stem takes a sixth less time, and capsules
        # [H, Wd, N, K] need no copy.
        return super().features(images.movedim(1, -1).contiguous().movedim(-1, 1))

    def route(self, features: Tensor) -> Tensor:
        N, K = self.config.capsules, self.config.capsule_dim
        grid = features.permute(0, 2, 3, 1).unflatten(3, (N, K))  # [B, H, Wd, N, K]
        capsules = self.stages(squash(grid))
        return self.last(capsules.flatten(1, 3))
