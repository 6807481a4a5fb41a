"""Calling a layer once more as before: the same tensors, random numbers, autocast and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .residual_checks import GLOBAL_HOOKS, follows


class Held(NamedTuple):
    """A parameter or buffer in its place, its count of in-place changes, and its requires_grad."""

    place: dict[str, Any]
    name: str
    tensor: Tensor
    version: int
    differentiated: bool

    def changed(self) -> bool:
        if self.tensor.requires_grad != self.differentiated:
            return True
        return not self.tensor.is_inference() and self.tensor._version != self.version


def held(layers: Iterable[nn.Module]) -> list[Held]:
    """Parameters and buffers of layers; inference tensors count no changes."""
    return [
        Held(place, name, t, 0 if t.is_inference() else t._version, t.requires_grad)
        for layer in layers
        for m in layer.modules()
        for place in (m._parameters, m._buffers)
        for name, t in place.items()
        if t is not None
    ]


@contextmanager
def put_back(tensors: Iterable[Held]) -> Iterator[None]:
    """Parameters and buffers as they were held, though others stand in their places by now, as
    after `torch.func.functional_call`."""
    replaced = [(h, h.place[h.name]) for h in tensors if h.place[h.name] is not h.tensor]
    for h, _ in replaced:
        h.place[h.name] = h.tensor
    try:
        yield
    finally:
        for h, now in replaced:
            h.place[h.name] = now


def meaning(layer: nn.Module) -> tuple[Any, ...]:
    """What a call of the layer does besides its tensors: its modules with their forward, hooks,
    mode and names of tensors, and the hooks of all modules."""
    return (
        *(tuple(key for key, hook in hooks.items() if not follows(hook)) for hooks in GLOBAL_HOOKS),
        *(
            (
                m,
                type(m),
                tuple(m._parameters.keys()),  # of scripted modules no dicts
                tuple(m._buffers.keys()),
                getattr(type(m), "forward", None),
                vars(m).get("forward"),
                m.training,
                tuple(m._forward_hooks),
                tuple(m._forward_pre_hooks),
                tuple(m._backward_hooks),
                tuple(m._backward_pre_hooks),
            )
            for m in layer.modules()
        ),
    )


PLAIN = int, float, complex, str, bytes, type(None), torch.dtype


def attributes(layer: nn.Module) -> dict[tuple[int, str], Any]:
    """Plain values, and tensors with their counts of changes, that modules have as attributes."""
    found: dict[tuple[int, str], Any] = {}
    for i, m in enumerate(layer.modules()):
        for key, value in vars(m).items():
            if isinstance(value, Tensor):
                found[i, key] = value, 0 if value.is_inference() else value._version
            elif plain(value):
                found[i, key] = value
    return found


def plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(plain, value)))


def same(a: Any, b: Any) -> bool:
    """Whether two values of `attributes` are the same."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a is b or bool(a == b)


def lasting(before: dict[Any, Any], layer: nn.Module) -> dict[Any, Any]:
    """Those of some attributes of a layer that are as before: a call has not set them."""
    now = attributes(layer)
    return {key: value for key, value in before.items() if key in now and same(value, now[key])}


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


@contextmanager
def parametrizations_computed() -> Iterator[None]:
    """Without the cache of `torch.nn.utils.parametrize.cached()`, which would hand weights computed
    without gradients to code that wants them."""
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


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
