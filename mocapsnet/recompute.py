"""Autograd's node of a reversible stack of any layers: backward calls each of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kernels.momentum.schedule import Schedule
from .probe import lost_gradients, probe, switch
from .replay import (
    attributes,
    autocast,
    autocast_state,
    held,
    hooks_off,
    meaning,
    parametrizations_computed,
    put_back,
    random_numbers,
    random_state,
)
from .residual_checks import branch, known, owns_tensors, patched, refuse_changes, versions

if TYPE_CHECKING:
    from .reversible import MomentumStack


STATES = 7
"""Kinds of calls of a layer that are remembered beside the last, as having been looked at."""


def step(plan: Schedule, n: int, x: Tensor, v: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Layer n of Algorithm 1, with output f."""
    f = (1 - plan.gamma) * f
    v = f if plan.restarts(n) else plan.gamma * v + f
    return x + v, v


def traced() -> bool:
    """Whether something that does not see backward will differentiate or record what is computed:
    a transform of torch.func, forward-mode differentiation, torch.jit.trace, torch.export."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch.compiler.is_exporting()
    )


def reversible(stack: MomentumStack, x: Tensor, v: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Calls `_Reversible` with the tensors of args and kwargs apart, for autograd to see them."""
    if traced():
        return stack.stored(x, v, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    needs = [leaves[i].requires_grad for i in places]
    form = spec, tuple(places), needs, [leaf for leaf in map(switch, leaves) if leaf is not None]
    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None

    def arguments(tensors: Iterable[Tensor]) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return tree_unflatten(filled, spec)

    parameters = [p for p in stack.layers.parameters() if p.requires_grad]
    return _Reversible.apply(stack, arguments, form, x, v, *tensors, *parameters)


class _Reversible(torch.autograd.Function):
    """The whole stack as one node of the graph, with arguments and parameters as its inputs.

    `arguments` makes (args, kwargs) of the tensors that they contain, the first of rest; `form` is
    what these are besides their values, second the places of the tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: MomentumStack,
        arguments: Callable[[Iterable[Tensor]], Any],
        form: tuple[Any, ...],
        x: Tensor,
        v: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        count = len(form[1])
        tensors = rest[:count]
        args, kwargs = arguments(tensors)
        layers, plan = list(stack.layers), stack.plan(x.dtype)
        precision = autocast_state(x.device)
        meanings = [meaning(layer) for layer in layers]
        trusted, anchored = not patched(), set(plan.anchors)
        sure = [trusted and known(layer) and owns_tensors(layer) for layer in layers]
        anchors, random, refused, attributes_then = [], {}, None, []
        with autocast(precision), parametrizations_computed():
            for n, layer in enumerate(layers):
                u, own = x, attributes(layer)
                attributes_then.append(own)
                if sure[n]:
                    x, v = step(plan, n, x, v, branch(n, layer, x, args, kwargs))
                else:
                    before = random_state(x.device)
                    buffers, given = versions(layer.buffers()), versions([x, *tensors])
                    f = branch(n, layer, x, args, kwargs)
                    x, v = step(plan, n, x, v, f)
                    refuse_changes(n, layer, buffers, given)
                    after = random_state(x.device)
                    if not all(map(torch.equal, before, after)):
                        random[n] = before
                    own[:] = [a for a in own if a.there()]  # what the call sets is its own
                    switches = [(a.key, switch(a.value)) for a in own]
                    state = meanings[n], form, [s for s in switches if s[1] is not None]
                    if state not in stack.probed.get(layer, ()):
                        seen = list(map(_leaf, tensors))
                        found = probe(n, layer, u, f, arguments(seen), seen, before)
                        refused = refused or found
                        if found is None and u.numel() and not u.is_meta:
                            stack.probed[layer] = [*stack.probed.get(layer, ())[-STATES:], state]
                    own[:] = [a._replace(version=None) if a.changed() else a for a in own]
                if n in anchored:
                    anchors += [x, v]
        ctx.save_for_backward(*tensors, *anchors)
        ctx.layers, ctx.plan, ctx.arguments, ctx.count = layers, plan, arguments, count
        ctx.precision, ctx.random, ctx.refused, ctx.trusted = precision, random, refused, sure
        ctx.wanted = rest[count:]
        ctx.held, ctx.meanings, ctx.attributes = held(layers), meanings, attributes_then
        return x

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        refuse_backward(ctx)
        # Computed parameters, of functional_call, end the graph of a layer as given ones do.
        leaves = {h.tensor: _leaf(h.tensor) for h in ctx.held if h.tensor.grad_fn is not None}
        places = [(h.place, h.name, leaves.get(h.tensor, h.tensor)) for h in ctx.held]
        with torch.no_grad(), put_back(places), parametrizations_computed():
            gradients = _backward(ctx, grad_x, leaves)
        if torch.is_grad_enabled():
            gradients = _Once.apply(torch.zeros((), requires_grad=True), *gradients)
        return None, None, None, *gradients


def _backward(ctx: Any, grad_x: Tensor, leaves: dict[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of x, v, the tensors in args and kwargs, and the parameters, in the place of some
    of which there are `leaves`."""
    layers, plan, gamma = ctx.layers, ctx.plan, ctx.plan.gamma
    anchored = set(plan.anchors)
    saved = ctx.saved_tensors  # checkpointing allows reading it once
    tensors, anchors = [_leaf(t) for t in saved[: ctx.count]], list(saved[ctx.count :])
    args, kwargs = ctx.arguments(tensors)
    sums: dict[Tensor, Tensor] = {}
    grad_v = torch.zeros_like(grad_x)
    for n, layer in reversed(list(enumerate(layers))):
        if n in anchored:
            v, x = anchors.pop(), anchors.pop()
        x = (x - v).requires_grad_()
        with (
            autocast(ctx.precision),
            random_numbers(x.device, ctx.random.get(n)),
            put_back((a.place, a.key, a.value) for a in ctx.attributes[n]),
            torch.enable_grad(),
        ):
            f = branch(n, layer, x.view_as(x), args, kwargs)  # flop_counter's hooks take no leaf
        grad_v = grad_v + grad_x
        if not ctx.trusted[n]:
            lost = lost_gradients(n, layer, f, [x, *tensors])
            if lost is not None:
                raise ValueError(lost)
        if f.requires_grad:
            inputs = [t for t in (*layer.parameters(), *tensors) if t.requires_grad]
            with hooks_off(inputs):
                grad, *grads = torch.autograd.grad(
                    f, [x, *inputs], (1 - gamma) * grad_v, allow_unused=True
                )
            for tensor, share in zip(inputs, grads, strict=True):
                if share is not None:
                    sums[tensor] = sums[tensor] + share if tensor in sums else share
            grad_x = grad_x if grad is None else grad_x + grad
        x = x.detach()
        if not plan.restarts(n):
            v = (v - (1 - gamma) * f.detach()) / gamma
        grad_v = torch.zeros_like(grad_v) if plan.restarts(n) else gamma * grad_v
    wanted = [leaves.get(p, p) for p in ctx.wanted]
    return grad_x, grad_v, *(sums.get(t) for t in (*tensors, *wanted))


def refuse_backward(ctx: Any) -> None:
    """Raises if calling the layers again would not give what forward had, or gradients get lost."""
    if ctx.refused is not None:
        raise ValueError(ctx.refused)
    if any(h.changed() for h in ctx.held):
        raise RuntimeError(
            "parameters or buffers of a reversible stack were changed between forward and "
            "backward, perhaps by an optimizer step or requires_grad_(); go backward first, or use "
            'memory="stored"'
        )
    for n, layer in enumerate(ctx.layers):
        if meaning(layer) != ctx.meanings[n]:
            raise RuntimeError(
                f"layer {n} ({type(layer).__name__}) of a reversible stack was changed between "
                "forward and backward: training or evaluation mode, a hook, its forward or one of "
                'its modules; go backward first, or use memory="stored"'
            )
        for attribute in ctx.attributes[n]:
            if attribute.changed():
                raise RuntimeError(
                    f"layer {n} ({type(layer).__name__}) of a reversible stack: its tensor "
                    f"{attribute.key!r} was changed in place between forward and backward; go "
                    'backward first, or use memory="stored"'
                )


class _Once(torch.autograd.Function):
    """Gradients that raise when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError('a reversible stack has no double backward; use memory="stored" for it')


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)
