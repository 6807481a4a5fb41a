"""Autograd's node of a reversible stack of any layers: backward calls each of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .replay import autocast, autocast_state, hooks_off, random_numbers, random_state
from .residual_checks import changed, known, patched, refuse_changes, versions
from .skip_connections import refuse_own_skip

if TYPE_CHECKING:
    from .reversible import MomentumStack


def reversible(stack: MomentumStack, x: Tensor, v: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Calls `_Reversible` with the tensors of args and kwargs apart, for autograd to see them."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None

    def arguments(tensors: Iterable[Tensor]) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return tree_unflatten(filled, spec)

    parameters = [p for p in stack.layers.parameters() if p.requires_grad]
    return _Reversible.apply(stack, arguments, len(tensors), x, v, *tensors, *parameters)


class _Reversible(torch.autograd.Function):
    """The whole stack as one node of the graph, with arguments and parameters as its inputs.

    `arguments` makes (args, kwargs) of the tensors that they contain, the first `count` of rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: MomentumStack,
        arguments: Callable[[Iterable[Tensor]], Any],
        count: int,
        x: Tensor,
        v: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        tensors = rest[:count]
        args, kwargs = arguments(tensors)
        detached = arguments(map(_leaf, tensors))
        every = stack.spacing(x.dtype)
        precision = autocast_state(x.device)
        anchors, random, trusted = [], {}, not patched()
        with autocast(precision):
            for n, layer in enumerate(stack.layers):
                u = x
                if trusted and known(layer):
                    x, v = stack.step(n, x, v, args, kwargs)
                else:
                    before = random_state(x.device)
                    buffers, given = versions(layer.buffers()), versions([x, *tensors])
                    x, v = stack.step(n, x, v, args, kwargs)
                    refuse_changes(n, layer, buffers, given)
                    after = random_state(x.device)
                    if not all(map(torch.equal, before, after)):
                        random[n] = before
                    if layer not in stack.branches:
                        with random_numbers(x.device, before):
                            refuse_own_skip(n, layer, u, *detached)
                        stack.branches.add(layer)
                if stack.anchored(n, every):
                    anchors += [x, v]
        ctx.save_for_backward(*tensors, *anchors)
        ctx.stack, ctx.arguments, ctx.count, ctx.every = stack, arguments, count, every
        ctx.precision, ctx.random = precision, random
        ctx.wanted = rest[count:]
        ctx.parameters = versions(stack.layers.parameters())
        return x

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _backward(ctx, grad_x)
        if torch.is_grad_enabled():
            gradients = _Once.apply(torch.zeros((), requires_grad=True), *gradients)
        return None, None, None, *gradients


def _backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, v, the tensors in args and kwargs, and the parameters."""
    stack, gamma = ctx.stack, ctx.stack.gamma
    if changed(ctx.parameters, versions(stack.layers.parameters())):
        raise RuntimeError(
            "parameters of a reversible stack were changed between forward and backward, perhaps "
            'by an optimizer step; go backward first, or use memory="stored"'
        )
    saved = ctx.saved_tensors  # checkpointing allows reading it once
    tensors, anchors = [_leaf(t) for t in saved[: ctx.count]], list(saved[ctx.count :])
    args, kwargs = ctx.arguments(tensors)
    sums: dict[Tensor, Tensor] = {}
    grad_v = torch.zeros_like(grad_x)
    for n in reversed(range(len(stack.layers))):
        if stack.anchored(n, ctx.every):
            v, x = anchors.pop(), anchors.pop()
        x = (x - v).requires_grad_()
        with (
            autocast(ctx.precision),
            random_numbers(x.device, ctx.random.get(n)),
            torch.enable_grad(),
        ):
            f = stack.branch(n, x, args, kwargs)
        grad_v = grad_v + grad_x
        if f.requires_grad:
            inputs = [t for t in (*stack.layers[n].parameters(), *tensors) if t.requires_grad]
            with hooks_off(inputs):
                grad, *grads = torch.autograd.grad(
                    f, [x, *inputs], (1 - gamma) * grad_v, allow_unused=True
                )
            for tensor, share in zip(inputs, grads, strict=True):
                if share is not None:
                    sums[tensor] = sums[tensor] + share if tensor in sums else share
            grad_x = grad_x if grad is None else grad_x + grad
        x = x.detach()
        if not stack.resets(n):
            v = (v - (1 - gamma) * f.detach()) / gamma
        grad_v = torch.zeros_like(grad_v) if stack.resets(n) else gamma * grad_v
    return grad_x, grad_v, *(sums.get(t) for t in (*tensors, *ctx.wanted))


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
