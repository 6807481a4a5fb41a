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
    forward: Callable[..., Any], backward: Callable[..., Any], mode: tuple[str, str], *args: Tensor
) -> Sequence[Tensor]:
    x, v, *parameters, g = args
    weights, biases = parameters[:L], parameters[L:]
    plan = schedule(L, GAMMA, 2, 0)
    y, anchors = forward(x, v, weights, biases, plan, R, mode[0])
    dx, dv, dW, dbias = backward(g, anchors, weights, biases, plan, R, *mode)
    return [y, dx, dv, *dW, *dbias]


def specification(mode: tuple[str, str], x: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
    return reference.momentum_routing(x, v, parameters[:L], parameters[L:], GAMMA, 0, R, *mode)


def case(
    form: str,
    launchers: Any,
    mode: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
) -> Case:
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    inputs = {name: ((3, J, D), torch.float32) for name in ("x", "v")}
    inputs |= {f"W[{n}]": ((J, D, J, D), dtype) for n in range(L)}
    inputs |= {f"bias[{n}]": ((J, D), torch.float32) for n in range(L)}
    both = (launchers.forward, launchers.backward)
    return Case(
        f"{form}, {' '.join(mode)}",
        inputs,
        partial(run, *both, mode),
        partial(specification, mode),
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
