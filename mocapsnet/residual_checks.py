"""What a residual layer may return and change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .layers import CapsuleLayer

Versions = list[tuple[Tensor, int]]


def checked_output(f: Any, x: Tensor, n: int, layer: nn.Module) -> Tensor:
    """The output f of layer n for input x, if it can be added to x.

    Raises: ValueError if f is no tensor or has another shape than x.
    """
    if not isinstance(f, Tensor):
        raise ValueError(
            f"layer {n} ({type(layer).__name__}) returned a {type(f).__name__}; a residual layer "
            "must return one tensor of its input's shape: wrap it in a module that does"
        )
    if f.shape != x.shape:
        raise ValueError(
            f"layer {n} ({type(layer).__name__}) maps shape {list(x.shape)} to {list(f.shape)}; a "
            "residual layer must keep the shape: place one that changes it outside of the stack"
        )
    return f


def known(layer: nn.Module) -> bool:
    """Whether a layer needs no check: it draws no random numbers and changes nothing."""
    hooks = [layer._forward_hooks, layer._forward_pre_hooks]
    hooks += [layer._backward_hooks, layer._backward_pre_hooks]
    return type(layer) is CapsuleLayer and not any(hooks)


def versions(tensors: Iterable[Tensor]) -> Versions:
    """Tensors with their counts of in-place changes; inference tensors have none."""
    return [(t, 0 if t.is_inference() else t._version) for t in tensors]


def changed(before: Versions, after: Versions) -> bool:
    """Whether a tensor was replaced or changed in place between two calls of `versions`."""
    if len(before) != len(after):
        return True
    return any(a is not b or n != m for (a, n), (b, m) in zip(before, after, strict=True))


def refuse_changes(n: int, layer: nn.Module, buffers: Versions, given: Versions) -> None:
    """Raises ValueError if layer n has changed its buffers or what it was given, since then."""
    if changed(buffers, versions(layer.buffers())):
        raise ValueError(
            f"layer {n} ({type(layer).__name__}) changes its buffers in forward, as BatchNorm and "
            "spectral norm do in training mode; a reversible stack calls it again in backward. "
            "Use a normalisation without running statistics (GroupNorm, LayerNorm), put the "
            'layer in eval mode, or use memory="stored"'
        )
    if changed(given, versions(t for t, _ in given)):
        raise ValueError(
            f"layer {n} ({type(layer).__name__}) changes its input or another argument in place; "
            'a reversible stack needs them in backward. Use inplace=False, or memory="stored"'
        )
