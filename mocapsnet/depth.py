"""Capsule layers for residual stacks of any depth: how strongly each is drawn at the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .conv_layers import ConvCapsuleLayer
from .layers import CapsuleLayer, squashed, unsquashed

HIDDEN_SUM_LENGTH = 0.5
HIDDEN_LENGTH = squashed(HIDDEN_SUM_LENGTH)

StreamWeights = Callable[[int], list[float]]
"""Weights of the outputs of a stack's first n layers in what enters the next."""


def branch_length(weights: StreamWeights, layers: int, in_length: float) -> float:
    """Length of every layer's output: all of them laid end to end make `in_length` at most."""
    return in_length / max(1.0, sum(weights(layers)))


def stream_lengths(weights: StreamWeights, layers: int, in_length: float) -> list[float]:
    """Root mean square length of the capsules that enter each layer of a stack, and leave it.

    The sum of independent outputs has the sum of their squares.
    """
    branch = branch_length(weights, layers, in_length)
    return [
        math.sqrt(in_length**2 + sum((w * branch) ** 2 for w in weights(n)))
        for n in range(layers + 1)
    ]


def capsule_layers(
    weights: StreamWeights,
    layers: int,
    capsules: int,
    dim: int,
    in_length: float = HIDDEN_LENGTH,
    kernel_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> list[CapsuleLayer] | list[ConvCapsuleLayer]:
    """Layers for a stack that starts by keeping its input, however deep it is.

    A residual layer starts the more modestly the more they are: all outputs, laid end to end, are
    at most as long as what enters the stack, so that even if training turns all one way they only
    double it. Layers drawn at full length each, as `CapsuleLayer` draws alone, make a deep stack
    chaotic: differences grow from layer to layer, and beyond 60 of them gradients are noise.

    Args:
        weights: of the outputs in the stream; [] for a stack that adds nothing up.
        layers: how many; capsules, dim: of every one.
        in_length: root mean square length of the capsules that enter the stack, below 1.
        kernel_size: of convolutional layers that keep their grid; None for dense layers.
        options: of `CapsuleLayer`, or of `ConvCapsuleLayer`.
    """
    if layers < 0:
        raise ValueError(f"layers must be at least 0; got {layers}")
    if not 0 < in_length < 1:
        raise ValueError(
            f"in_length must lie between 0 and 1, both excluded, as lengths of squashed capsules "
            f"do; got {in_length}"
        )
    options["sum_length"] = unsquashed(branch_length(weights, layers, in_length))
    shape, lengths = (capsules, dim, capsules, dim), stream_lengths(weights, layers, in_length)[:-1]
    if kernel_size is None:
        return [CapsuleLayer(*shape, in_length=length, **options) for length in lengths]
    options["kernel_size"] = kernel_size
    return [ConvCapsuleLayer(*shape, in_length=length, **options) for length in lengths]
