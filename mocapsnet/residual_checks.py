"""What calling a residual layer twice takes: that it bears it, same random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from .layers import CapsuleLayer

Versions = list[tuple[Tensor, int]]

# Nodes that hand their first operand on, up to an element-wise map, a scale or another layout.
WRAPPERS = set(
    "Relu LeakyRelu Elu Gelu Silu Mish Hardtanh Hardswish NativeLayerNorm NativeGroupNorm "
    "NativeBatchNorm CudnnBatchNorm FusedRmsNorm NativeDropout FusedDropout View UnsafeView "
    "ReshapeAlias Reshape Transpose T Permute Clone ToCopy Alias Expand Squeeze Unsqueeze".split()
)


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


def refuse_own_skip(n: int, layer: nn.Module, x: Tensor, args: Any, kwargs: Any) -> None:
    """Calls layer n with gradients; raises ValueError if it returns x + g(x) instead of g(x).

    Random state and autocast are the caller's affair; args and kwargs must be detached.
    """
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        root = x.detach().requires_grad_().clone()
        end = root.grad_fn
        f = layer(root, *args, **kwargs)
    if end is not None and f.grad_fn is not None and has_skip(f.grad_fn, end):
        raise ValueError(
            f"layer {n} ({type(layer).__name__}) contains a skip connection: it returns x + g(x), "
            "and the stack would add x once more. Return the branch g(x) alone, the stack adds x "
            "itself; or call layers with skip connections of their own in a plain nn.Sequential, "
            "and branches without momentum in a ResidualStack"
        )


def has_skip(start: Node, end: Node) -> bool:
    """Whether additions and wrappers alone lead from `start` to `end`, past an operand that
    depends on `end` too."""
    depends = dependants(start, end)
    todo, seen = [(start, False)], set()
    while todo:
        node, skips = todo.pop()
        if node is end and skips:
            return True
        if node is end or (node, skips) in seen:
            continue
        seen.add((node, skips))
        operands = [operand for operand, _ in node.next_functions]
        dependent = [operand for operand in operands if operand in depends]
        kind = node.name().split("Backward")[0]
        if kind == "Add":
            todo += [(operand, skips or len(dependent) > 1) for operand in dependent]
        elif not operands or operands[0] not in depends:
            continue
        elif kind == "Sub":  # g(x) - x is a branch: it pulls x towards g(x)
            todo.append((operands[0], skips or len(dependent) > 1))
        elif kind in WRAPPERS or (kind in ("Mul", "Div") and not any(operands[1:])):
            todo.append((operands[0], skips))  # by a constant: dropout on the CPU is a product
    return False


def dependants(start: Node, end: Node) -> set[Node]:
    """The nodes of the graph below `start` whose value depends on that of `end`, itself too."""
    users: dict[Node, list[Node]] = {}
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        for operand, _ in node.next_functions:
            if operand is not None:
                users.setdefault(operand, []).append(node)
                if operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
    found, todo = {end}, [end]
    while todo:
        for user in users.get(todo.pop(), []):
            if user not in found:
                found.add(user)
                todo.append(user)
    return found


def autocast_state(device: torch.device) -> list[dict[str, Any]]:
    return [
        dict(
            device_type=kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
        )
        for kind in {"cpu", device.type}
        if torch.amp.is_autocast_available(kind)
    ]


@contextmanager
def autocast(state: list[dict[str, Any]]) -> Iterator[None]:
    """Autocast as it was, without its cache: that would keep low-precision weights of all layers,
    and hand those cast without gradients to code that wants them."""
    with ExitStack() as contexts:
        for options in state:
            contexts.enter_context(torch.autocast(**options, cache_enabled=False))
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """States of the random number generators of the CPU and, if it is another, the device."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        where = () if device.type == "mps" else (device,)
        states.append(torch.get_device_module(device).get_rng_state(*where))
    return states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        where = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(states[1], *where)


@contextmanager
def random_numbers(device: torch.device, states: list[Tensor] | None) -> Iterator[None]:
    """Random numbers from `states` on, then from where they were; None changes nothing."""
    if states is None:
        yield
        return
    now = random_state(device)
    set_random_state(device, states)
    try:
        yield
    finally:
        set_random_state(device, now)


@contextmanager
def hooks_off(tensors: Iterable[Tensor]) -> Iterator[None]:
    """No tensor hooks: autograd runs a parameter's on its whole gradient, not on a layer's share.

    `torch.autograd.grad` would run them, and `torch.func.functional_call` with detached parameters
    does not reach every module (nn.LSTM keeps a list of its own).
    """
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for t, _ in hooked:
        t._backward_hooks = None
    try:
        yield
    finally:
        for t, hooks in hooked:
            t._backward_hooks = hooks
