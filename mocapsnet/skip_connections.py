"""Whether a layer adds its input to its output itself: read off autograd's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

# Nodes that hand their first operand on, up to an element-wise map, a scale or another layout.
WRAPPERS = set(
    "Relu LeakyRelu Elu Gelu Silu Mish Hardtanh Hardswish NativeLayerNorm NativeGroupNorm "
    "NativeBatchNorm CudnnBatchNorm FusedRmsNorm NativeDropout FusedDropout View UnsafeView "
    "ReshapeAlias Reshape Transpose T Permute Clone ToCopy Alias AsStrided Expand Squeeze "
    "Unsqueeze".split()
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
        kind = in_place_kind(node) if kind.endswith("CopySlices") else kind
        if kind == "Add":
            todo += [(operand, skips or len(dependent) > 1) for operand in dependent]
        elif not operands or operands[0] not in depends:
            continue
        elif kind == "Sub":  # g(x) - x is a branch: it pulls x towards g(x)
            todo.append((operands[0], skips or len(dependent) > 1))
        elif kind in WRAPPERS or (kind in ("Mul", "Div") and not any(operands[1:])):
            todo.append((operands[0], skips))  # by a constant: dropout on the CPU is a product
    return False


def in_place_kind(node: Any) -> str:
    """What an operation in place on a view was, told from its derivatives: the node has no name.

    As linear layers of some versions of PyTorch return views, g += x is such an operation.
    """
    (made,) = node._input_metadata
    if made.device.type == "meta":
        return "unknown"
    with torch.no_grad():
        found = node(torch.ones(made.shape, dtype=made.dtype, device=made.device))
    first, *others = found if isinstance(found, tuple) else (found,)
    values = [d.unique() for d in others if d is not None]
    if all(len(d) == 1 for d in values) and len(first.unique()) == 1 and values:
        return "Add" if all(d[0] > 0 for d in values) else "Sub"
    return "Relu" if not values and len(first.unique()) <= 2 else "unknown"


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
