"""What is verified of squash where it runs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case
from . import reference


def cases() -> Iterator[Case]:
    from . import triton

    def run(s: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        return triton.forward(s), triton.backward(s, dv)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Case("", {"s": ((400, 3), dtype)}, run, reference.squash)
