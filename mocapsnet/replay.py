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
        return version(self.tensor) != self.version


def held(layers: Iterable[nn.Module]) -> list[Held]:
    """Parameters and buffers of layers."""
    return [
        Held(place, name, t, version(t), t.requires_grad)
        for layer in layers
        for m in layer.modules()
        for place in (m._parameters, m._buffers)
        for name, t in place.items()
        if t is not None
    ]


@contextmanager
def put_back(places: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Parameters, buffers and attributes as they were, though others stand in their places by now,
    as after `torch.func.functional_call`.

    Args:
        places: dictionaries, keys, and what belongs there.
    """
    missing = object()
    replaced = []
    for place, key, value in places:
        now = place[key] if key in place else missing  # scripted modules have no dicts
        if now is not value:
            replaced.append((place, key, now))
            place[key] = value
    try:
        yield
    finally:
        for place, key, now in reversed(replaced):
            if now is missing:
                place.pop(key, None)
            else:
                place[key] = now


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


OWN = vars(nn.Module()).keys()
"""Attributes of every module; `meaning` has what matters of them."""

PLAIN = {int, float, bool, complex, str, bytes, type(None), torch.dtype}


class Attribute(NamedTuple):
    """A plain value or a tensor that a module has as an attribute."""

    place: dict[str, Any]
    key: str
    value: Any
    version: int | None = None
    """Of a tensor, its count of changes in place; None if they do not matter."""

    def there(self) -> bool:
        """Whether nothing else is in its place."""
        return self.place.get(self.key, self) is self.value

    def changed(self) -> bool:
        """Whether the tensor was changed in place."""
        return self.version is not None and version(self.value) != self.version


def attributes(layer: nn.Module) -> list[Attribute]:
    """Those of a layer's modules."""
    found = []
    for m in layer.modules():
        place = vars(m)
        for key, value in place.items():
            if key in OWN:
                continue
            if isinstance(value, Tensor):
                found.append(Attribute(place, key, value, version(value)))
            elif plain(value):
                found.append(Attribute(place, key, value))
    return found


def plain(value: Any) -> bool:
    return all(map(plain, value)) if isinstance(value, tuple) else type(value) in PLAIN


def version(t: Tensor) -> int:
    """An inference tensor counts no changes."""
    return 0 if t.is_inference() else t._version


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
