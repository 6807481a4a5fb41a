"""What is verified of stacks of momentum capsule layers where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import chunked, reference
from .schedule import schedule

L, R, GAMMA, J, D = 3, 3, 0.8, 5, 3
MODES = [("rba", "final"), ("rba", "full"), ("sda", "final"), ("sda", "full")]


def run(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    mode: tuple[str, str],
    iterations: int,
    *args: Tensor,
) -> Sequence[Tensor]:
    x, v, *parameters, g = args
    weights, biases = parameters[:L], parameters[L:]
    stack = schedule(L, GAMMA, 2, 0)
    y, anchors = forward(x, v, weights, biases, stack, iterations, mode[0])
    dx, dv, dW, dbias = backward(g, anchors, weights, biases, stack, iterations, *mode)
    return [y, dx, dv, *dW, *dbias]


def specification(
    mode: tuple[str, str], iterations: int, x: Tensor, v: Tensor, *parameters: Tensor
) -> Tensor:
    weights, biases = parameters[:L], parameters[L:]
    return reference.momentum_routing(x, v, weights, biases, GAMMA, 0, iterations, *mode)


def case(
    form: str,
    launchers: Any,
    mode: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
    *,
    sizes: tuple[int, int, int] = (3, J, D),
    iterations: int = R,
    p: Any = None,
    q: Any = None,
) -> Case:
    """Of `form`, with B, J, D; by plans `p` forward and `q` backward if they are given."""
    B, J, D = sizes
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    inputs = {name: ((B, J, D), torch.float32) for name in ("x", "v")}
    inputs |= {f"W[{n}]": ((J, D, J, D), dtype) for n in range(L)}
    inputs |= {f"bias[{n}]": ((J, D), torch.float32) for n in range(L)}
    forward, backward = launchers.forward, launchers.backward
    forward = forward if p is None else partial(forward, plan=p)
    backward = backward if q is None else partial(backward, plan=q)
    return Case(
        f"{form}, {' '.join(mode)}",
        inputs,
        partial(run, forward, backward, mode, iterations),
        partial(specification, mode, iterations),
        precision,
    )


def cases() -> Iterator[Case]:
    """Stacks too large for one program are made of launches of routing, which is verified too."""
    from . import triton

    for mode in MODES:
        yield case("on chip", triton, mode)
    yield case("on chip", triton, MODES[0], precision="high")
    yield case("on chip", triton, MODES[0], torch.bfloat16)


def cpu_cases() -> Iterator[Case]:
    """Of the implementation for CPUs."""
    for mode in MODES:
        yield case("layer by layer", chunked, mode)
