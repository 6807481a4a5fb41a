"""What is verified of primary capsules where they run."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from . import reference

DIM = 3


def cases() -> Iterator[Case]:
    from . import triton

    def run(memory_format: torch.memory_format, f: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        f = f.contiguous(memory_format=memory_format)
        return triton.forward(f, DIM), triton.backward(f, dv, DIM)

    def specification(features: Tensor) -> Tensor:
        return reference.primary_capsules(features, DIM)

    formats = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    for name, memory_format in formats.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = {"features": ((2, 4 * DIM, 5, 7), dtype)}
            yield Case(name, inputs, partial(run, memory_format), specification)
