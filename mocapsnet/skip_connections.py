"""Whether a layer adds its input to its output itself: read off autograd's graph."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

# Nodes that hand their first operand on, up to an element-wise map, a scale or another layout.
WRAPPERS = set(
    "Relu LeakyRelu Elu Gelu Silu Mish Hardtanh Hardswish NativeLayerNorm NativeGroupNorm "
    "NativeBatchNorm CudnnBatchNorm FusedRmsNorm NativeDropout FusedDropout View UnsafeView "
    "ReshapeAlias Reshape Transpose T Permute Clone ToCopy Alias AsStrided Expand Squeeze "
    "Unsqueeze".split()
)


def refuse_own_skip(n: int, layer: nn.Module, start: Node, end: Node) -> None:
    """Raises ValueError if layer n, that mapped x of node `end` to `start`, returned x + g(x)."""
    if has_skip(start, end):
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


def nodes(start: Iterable[Node], ends: Container[Node] = ()) -> Iterator[Node]:
    """The nodes of the graph from `start` down to `ends`."""
    todo = list(start)
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for operand, _ in () if node in ends else node.next_functions:
            if operand is not None and operand not in seen:
                seen.add(operand)
                todo.append(operand)


def dependants(start: Node, end: Node) -> set[Node]:
    """The nodes of the graph below `start` whose value depends on that of `end`, itself too."""
    users: dict[Node, list[Node]] = {}
    for node in nodes([start]):
        for operand, _ in node.next_functions:
            if operand is not None:
                users.setdefault(operand, []).append(node)
    found, todo = {end}, [end]
    while todo:
        for user in users.get(todo.pop(), []):
            if user not in found:
                found.add(user)
                todo.append(user)
    return found
