"""What a second call of a layer tells: whether it repeats itself, what its gradients reach."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .replay import random_numbers
from .residual_checks import branch
from .skip_connections import nodes, refuse_own_skip


def probe(
    n: int,
    layer: nn.Module,
    x: Tensor,
    f: Tensor,
    arguments: Any,
    tensors: Iterable[Tensor],
    states: list[Tensor],
) -> str | None:
    """Calls layer n again, with gradients, after it mapped x to f from these random states.

    Args:
        arguments: (args, kwargs) of the call, detached; `tensors` are those in them.
    Returns: None, or why there is no backward: the layer's gradients would reach a tensor that the
        stack does not know.
    Raises: ValueError if the layer does not repeat itself, or returns x + g(x) instead of g(x).
    """

    def again(x: Tensor) -> Tensor:
        with random_numbers(x.device, states), saved_tensors_hooks(lambda t: t, lambda t: t):
            return branch(n, layer, x, *arguments)

    name = f"layer {n} ({type(layer).__name__})"
    if sharded(layer):
        raise ValueError(
            f"{name} is sharded on its own, so its parameters are there only while it is called "
            "and would get no gradient from a reversible stack; shard the stack or the model as a "
            'whole, as fully_shard(stack) does, or use memory="stored"'
        )
    numbers, sources = plain_numbers(layer), generators(layer)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        root = leaf.clone()
        second = again(root)
    for key, number in plain_numbers(layer).items():
        if numbers.get(key) != number:
            raise ValueError(
                f"{name} changes its attribute {key[1]!r} whenever it is called, and a reversible "
                'stack calls it again in backward; use memory="stored", or count outside of it'
            )
    if generators(layer) != sources:
        sources = generators(layer)
        again(x)
        if generators(layer) != sources:  # twice: another thread does not draw every time
            raise ValueError(
                f"{name} draws random numbers from Python's random, numpy.random or a generator of "
                "its own, which a reversible stack cannot repeat in backward; draw from PyTorch's "
                'default generator, as torch.rand(...) does, or use memory="stored"'
            )
    if second.grad_fn is not None and root.grad_fn is not None:
        refuse_own_skip(n, layer, second.grad_fn, root.grad_fn)
    if not repeats(f, second, lambda: again(x)):
        raise ValueError(
            f"{name} returns another output when it is called again with the same input, as with "
            "random numbers of its own, a state that it changes or code that asks whether "
            "gradients are recorded; a reversible stack calls it again in backward: use "
            'memory="stored"'
        )
    return lost_gradients(n, layer, second, [leaf, *tensors])


def sharded(layer: nn.Module) -> bool:
    """Whether FSDP shards the layer, or a module in it, by itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    if fsdp is None:
        return False
    return any(
        isinstance(m, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for m in layer.modules()
    )


def plain_numbers(layer: nn.Module) -> dict[tuple[int, str], float]:
    """The numbers among the attributes of the layer's modules."""
    return {
        (i, key): value
        for i, module in enumerate(layer.modules())
        for key, value in vars(module).items()
        if isinstance(value, int | float)
    }


def generators(layer: nn.Module) -> bytes:
    """State of the random number generators that are not PyTorch's default ones."""
    states: list[Any] = [random.getstate(), np.random.get_state()]
    for module in layer.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                states.append(value.get_state().numpy())
            elif isinstance(value, random.Random):
                states.append(value.getstate())
            elif isinstance(value, np.random.Generator):
                states.append(value.bit_generator.state)
            elif isinstance(value, np.random.RandomState):
                states.append(value.get_state())
    return pickle.dumps(states)


def repeats(first: Tensor, second: Tensor, third: Callable[[], Tensor]) -> bool:
    """Whether a layer gave the same output without gradients, with them, and again without.

    The same bits are wanted. But PyTorch may choose another kernel where gradients are recorded,
    and some GPU kernels add up in any order: without the same bits, an output is taken for the
    same within 64 roundings, what `MomentumStack.spacing` allows anyway, or within 1 % if the third
    has the bits of the first.
    """
    if type(first) is not Tensor or first.is_meta or first.numel() == 0:
        return True
    first, second = first.detach().nan_to_num(), second.detach().nan_to_num()
    if torch.equal(first, second):
        return True
    off, size = (first - second).norm(), first.norm()
    if off <= 64 * torch.finfo(first.dtype).eps * size:
        return True
    return bool(off <= 0.01 * size) and torch.equal(first, third().detach().nan_to_num())


def switch(value: Any) -> Any:
    """What of an attribute or an argument may have a call do something else: of numbers, whether
    they are zero. A layer that was probed with another one is probed again."""
    if isinstance(value, int | float):
        return bool(value)
    return value if isinstance(value, str) else None


def lost_gradients(n: int, layer: nn.Module, output: Tensor, given: Iterable[Tensor]) -> str | None:
    """What to say if the gradient of layer n's output reaches a tensor that is no parameter and not
    given."""
    if output.grad_fn is None:
        return None
    name = f"layer {n} ({type(layer).__name__})"
    own = [p for p in layer.parameters() if p.requires_grad]
    ends = {p.grad_fn: p for p in own if p.grad_fn is not None}  # computed, by functional_call
    met = [
        ends.get(node, getattr(node, "variable", None)) for node in nodes([output.grad_fn], ends)
    ]
    reached = {id(t): t for t in met if t is not None}
    known = {id(t) for t in (*own, *given)}
    strange = [t for key, t in reached.items() if key not in known]
    if not strange:
        return None
    if own and not any(id(p) in reached for p in own):
        return (
            f"{name} computes with other parameters than it has between calls, as under "
            "Accelerate's offloading, so that their gradients would be lost: train without, and "
            "offload for inference alone"
        )
    return (
        f"{name} computes with a tensor {list(strange[0].shape)} that needs a gradient and is "
        "neither its parameter nor an argument of the stack, so that its gradient would be lost; "
        "make it a parameter of the layer, pass it as stack(x, None, tensor), or use "
        'memory="stored"'
    )
