"""What the capsule layers of a network do with an input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import CapsuleLayer, RoutingLayer


class LayerRecord(NamedTuple):
    """u [B, N, K] and v [B, J, D] of one call of a layer, couplings [iterations, B, N, J]."""

    u: Tensor
    v: Tensor
    couplings: Tensor


class LayerCall(NamedTuple):
    """One call of a layer: what it was given, u [B, ..., N, K], and made, v [B, ..., J, D]."""

    layer: RoutingLayer
    u: Tensor
    v: Tensor


@torch.no_grad()
def layer_calls(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, LayerCall]:
    """As `inspect_layers`, convolutional layers too, without couplings and their votes' memory."""
    calls: dict[str, LayerCall] = {}

    def note(name: str, layer: RoutingLayer) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = LayerCall(layer, inputs[0].detach().clone(), output.detach().clone())

        return layer.register_forward_hook(hook)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoutingLayer)}
    handles = [note(name, layer) for name, layer in layers.items()]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def inspect_layers(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, LayerRecord]:
    """Calls model(*args, **kwargs) and tells what each of its capsule layers was given and made.

    The couplings of a layer are computed by the reference, with all votes in memory: batch x 1.2 MB
    for the first layer on MNIST. In a residual stack v is the layer's output before x is added.

    Returns: records by the layers' names in `model.named_modules()`, in the order of their calls;
        of a layer that is called more than once, its last call.
    """
    calls = layer_calls(model, *args, **kwargs)
    return {
        name: LayerRecord(u, v, layer.couplings(u))
        for name, (layer, u, v) in calls.items()
        if isinstance(layer, CapsuleLayer)
    }
