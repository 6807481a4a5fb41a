"""Calls of a residual layer: what it may return and change, and which need no look at them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from .conv_layers import ConvCapsuleLayer
from .layers import CapsuleLayer, RoutingLayer


def calls(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What a call of a layer of this class runs."""
    return kind.forward, kind._call_impl, kind.__call__


CALLS = {kind: calls(kind) for kind in (CapsuleLayer, ConvCapsuleLayer)}

GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    module._global_forward_hooks,
    module._global_forward_pre_hooks,
    module._global_backward_hooks,
    module._global_backward_pre_hooks,
)
"""Hooks of all modules, by their handles."""

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


def branch(n: int, layer: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Output of layer n in x's dtype; a layer in half precision is given x in its own."""
    half = None if isinstance(layer, RoutingLayer) else half_precision(layer)
    f = layer(x if half is None else x.to(half), *args, **kwargs)
    return checked_output(f, x, n, layer).to(x.dtype)


def half_precision(layer: nn.Module) -> torch.dtype | None:
    """The dtype of all floating-point parameters of a layer, if it is one below float32."""
    found = None
    for p in layer.parameters():
        if p.is_floating_point():
            if p.dtype.itemsize >= 4 or found not in (None, p.dtype):
                return None
            found = p.dtype
    return found


def known(layer: nn.Module) -> bool:
    """Whether calling this layer is a capsule layer's forward as this library defines it, no more.

    Then it draws no random numbers, changes nothing, and may be run by a fused operation. A
    subclass may do otherwise, which parametrizations, `fully_shard` and the like make of a layer,
    and so may a hook, a forward of the object's own (Accelerate, many LoRAs) or a compiled call.
    """
    if type(layer) not in CALLS or layer._compiled_call_impl is not None:
        return False
    own = vars(layer)
    if "forward" in own or "_call_impl" in own or layer.forward is None:
        return False  # the last only has torch.compile watch for a later forward of its own
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def owns_tensors(layer: nn.Module) -> bool:
    """Whether a capsule layer's weight and bias are its parameters, and not other tensors in their
    place, as in a replica of DataParallel, which `layer.parameters()` would not find."""
    own = vars(layer)
    return "weight" not in own and own.get("bias") is None


def patched() -> bool:
    """Whether a call of a capsule layer may do something else: a global hook, a patched class.

    Hooks that follow which module runs, for `torch.utils.flop_counter`, change nothing, and neither
    does what `torch.export` puts in the place of every module's `__call__`.
    """
    if any(not follows(hook) for hooks in GLOBAL_HOOKS for hook in hooks.values()):
        return True
    judged = 2 if torch.compiler.is_exporting() else 3
    return any(
        call is not own
        for kind, known in CALLS.items()
        for call, own in zip(calls(kind)[:judged], known, strict=False)
    )


def follows(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__ == "torch.utils.module_tracker"


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
