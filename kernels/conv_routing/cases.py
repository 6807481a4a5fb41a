"""What is verified of convolutional routing where it runs: each kernel of `routing` that reads
windows from a grid."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import reference

STEPS = 1, 2, 0, 1
"""Stride and padding in y and x."""


def run(
    launchers: Any, mode: tuple[str, str], keep: bool, u: Tensor, W: Tensor, bias: Tensor, g: Tensor
) -> tuple[Tensor, ...]:
    v, s, kept = launchers.forward(u, W, bias, STEPS, 3, mode[0], keep)
    return v, *launchers.backward(g, u, W, s, kept, STEPS, *mode, True)


def case(
    form: str,
    K: int,
    launchers: Any,
    mode: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    keep: bool = False,
) -> Case:
    """Windows of 2x1 on grids of 4x3 with two capsules of K: 32 columns [J, D], 18 windows."""

    def specification(u: Tensor, W: Tensor, bias: Tensor) -> Tensor:
        return reference.conv_routing(
            u,
            W,
            bias=bias,
            stride=STEPS[:2],
            padding=STEPS[2:],
            method=mode[0],
            routing_grad=mode[1],
        )

    shapes = {"u": (2, 4, 3, 2, K), "W": (2, 1, 2, K, 5, 3)}
    inputs = {name: (shape, dtype) for name, shape in shapes.items()}
    inputs["bias"] = (5, 3), torch.float32
    name = f"{form}, {' '.join(mode)}"
    return Case(name, inputs, partial(run, launchers, mode, keep), specification)


def cases() -> Iterator[Case]:
    """A K of 3 takes the vector units, one of 6 tensor cores."""
    from . import triton

    for form, K in (("streamed", 3), ("tensor cores", 6)):
        yield case(form, K, triton, ("rba", "final"), keep=True)
        yield case(f"{form}, nothing kept", K, triton, ("rba", "final"))
        yield case(form, K, triton, ("sda", "full"))
    yield case("tensor cores", 6, triton, ("rba", "final"), torch.bfloat16, keep=True)
