"""Convolutional routing the way one writes it without an operation for it: unfold and einsum."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocapsnet import ConvCapsuleLayer
from mocapsnet.kernels.conv_routing.reference import unfold
from mocapsnet.reversible import MomentumStack

from . import published


def einsum(
    u: Tensor, W: Tensor, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1)
) -> Tensor:
    """u [B, H, Wd, N, K], W [kh, kw, N, K, J, D] -> [B, H', W', J, D], all votes in memory."""
    windows = unfold(u, W.shape[:2], stride, padding)  # [B, H', W', kh, kw, N, K]
    v = published.einsum(windows.flatten(3, 5).flatten(0, 2), W.flatten(0, 2))
    return v.unflatten(0, windows.shape[:3])


def checkpointed(
    u: Tensor, W: Tensor, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1)
) -> Tensor:
    """The same, computed again in backward."""
    out: Any = checkpoint(einsum, u, W, stride, padding, use_reentrant=False)
    return out


class UnfoldedLayer(nn.Module):
    """A `ConvCapsuleLayer` with its own weight, routed by one of the functions above."""

    def __init__(self, layer: ConvCapsuleLayer, again: bool):
        super().__init__()
        self.weight = layer.weight
        self.steps = layer.stride, layer.padding
        self.route = checkpointed if again else einsum

    def forward(self, u: Tensor) -> Tensor:
        return self.route(u, self.weight, *self.steps)


def unfold_layers(module: nn.Module, again: bool = False) -> None:
    """Replaces all convolutional capsule layers in a module; parameters and results stay."""
    for name, child in module.named_children():
        if isinstance(child, ConvCapsuleLayer):
            setattr(module, name, UnfoldedLayer(child, again))
        elif isinstance(child, MomentumStack):
            for n, layer in enumerate(child.layers):
                child.layers[n] = UnfoldedLayer(layer, again)  # type: ignore[arg-type]
        else:
            unfold_layers(child, again)
