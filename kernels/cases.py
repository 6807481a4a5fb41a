"""Small problems on which an implementation is compared with its reference where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, at_precision, compile_ahead, recording

TF32 = 2.0**-11
"""The rounding error of a number that tensor cores take, relative to it."""


class Case(NamedTuple):
    """One form of an operation, on one problem.

    Inputs are drawn from a normal distribution, on the CPU, alike everywhere.
    """

    name: str
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Names, shapes and dtypes of the inputs, in order."""
    run: Callable[..., Sequence[Tensor]]
    """Of the inputs and the output's gradient: the output and each input's gradient."""
    reference: Callable[..., Tensor]
    """The same output, by operations that PyTorch differentiates, in any dtype."""
    precision: str = "highest"
    """As of torch.set_float32_matmul_precision."""

    def __str__(self) -> str:
        dtypes = dict.fromkeys(str(dtype)[len("torch.") :] for _, dtype in self.inputs.values())
        return ", ".join(filter(None, [self.name, " and ".join(dtypes), self.precision_name]))

    @property
    def precision_name(self) -> str:
        return "" if self.precision == "highest" else f"precision {self.precision}"

    @property
    def rounding(self) -> float:
        """Relative error of the products that the implementation may make.

        Sums of 16-bit inputs are in float32, but what is multiplied by them may be rounded to TF32.
        """
        dtypes = [dtype for _, dtype in self.inputs.values()]
        if torch.float64 in dtypes:
            return torch.finfo(torch.float64).eps
        low = any(dtype != torch.float32 for dtype in dtypes)
        return TF32 if low or self.precision != "highest" else torch.finfo(torch.float32).eps


def check(case: Case, device: torch.device) -> str:
    """What is wrong with a case on a device; empty if nothing is.

    Results may differ from the reference's in float64 as much as those would if every input were
    off by the rounding of a few products, plus a rounding of the result; element by element. Run
    again, the same bits must come.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator).mul(0.7).to(dtype)
        for shape, dtype in case.inputs.values()
    ]
    wide = [x.double() for x in inputs]
    with torch.no_grad():
        shape = case.reference(*wide).shape
    g = torch.randn(shape, dtype=torch.float64, generator=generator).to(inputs[0].dtype)
    truth = differentiated(case, *wide, g.double())
    slack = [
        2 * torch.finfo(x.dtype).eps * t.abs().max()
        for x, t in zip([g, *inputs], truth, strict=True)
    ]
    for _ in range(3):
        moved = differentiated(case, *shaken(case.rounding, [*wide, g.double()], generator))
        slack = [
            max(s, 4 * (a - b).abs().max()) for s, a, b in zip(slack, moved, truth, strict=True)
        ]
    with at_precision(case.precision):
        there = [x.to(device) for x in [*inputs, g]]
        got, again = ([x.cpu() for x in case.run(*there)] for _ in range(2))
    names = ["the output", *(f"the gradient of {name}" for name in case.inputs)]
    wrong = []
    for name, x, t, s in zip(names, got, truth, slack, strict=True):
        if x.shape != t.shape:
            wrong.append(f"{name} has shape {list(x.shape)}, not {list(t.shape)}")
        elif not ((x.double() - t).abs() <= s).all():
            wrong.append(f"{name} is off by {(x.double() - t).abs().max():.2g}, allowed {s:.2g}")
    if not wrong:
        wrong = [
            f"{name} has other bits when it is computed again"
            for name, x, y in zip(names, got, again, strict=True)
            if not torch.equal(x, y)
        ]
    return "; ".join(wrong)


def compile_all(cases: Iterable[Case], device: torch.device) -> None:
    """Compiles the kernels of all cases, many at a time. What fails will say why in `check`."""
    launches: list[Launch] = []
    for case in cases:
        with suppress(Exception), at_precision(case.precision), recording() as made:
            inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in case.inputs.values()]
            output = case.reference(*(x.double() for x in inputs))
            case.run(*(x.to(device) for x in [*inputs, output.to(inputs[0].dtype)]))
            launches += made
    compile_ahead(launches, device)


def differentiated(case: Case, *args: Tensor) -> list[Tensor]:
    """The reference's output and gradients, of its inputs and the output's gradient."""
    *inputs, g = args
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = case.reference(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, g)]


def shaken(unit: float, tensors: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Tensors with a relative change of about `unit` in every number."""
    return [
        x + x * unit * torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in tensors
    ]
