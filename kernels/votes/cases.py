"""What is verified of votes where they run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case
from . import reference


def cases() -> Iterator[Case]:
    from . import triton

    def run(u: Tensor, W: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return triton.forward(u, W), *triton.backward(g, u, W)

    for dtype, precision in (
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
    ):
        inputs = {"u": ((17, 3, 5), dtype), "W": ((3, 5, 7, 3), dtype)}
        yield Case("", inputs, run, reference.votes, precision)
