"""What is verified of routing where it runs: each form, method and gradient, and what they share
in other dtypes and precisions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import chunked, direct, plans, reference

R = 3
FINAL, MODES = (
    ("rba", "final"),
    [("rba", "final"), ("rba", "full"), ("sda", "final"), ("sda", "full")],
)


def run(
    launchers: Any,
    mode: tuple[str, str],
    iterations: int,
    options: tuple[dict[str, Any], dict[str, Any]],
    keep: bool,
    u: Tensor,
    W: Tensor,
    bias: Tensor,
    g: Tensor,
) -> tuple[Tensor, ...]:
    v, s, kept = launchers.forward(u, W, bias, iterations, mode[0], keep, **options[0])
    return v, *launchers.backward(g, u, W, s, kept, *mode, True, **options[1])


def case(
    form: str,
    sizes: tuple[int, int, int, int, int],
    launchers: Any,
    mode: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    precision: str = "highest",
    keep: bool = True,
    iterations: int = R,
    q: Any = None,
    **options: Any,
) -> Case:
    """Of `form`, with B, N, K, J, D; by a plan `p` if one is given, and backward by `q`."""
    B, N, K, J, D = sizes
    both = options, options | ({} if q is None else {"p": q})

    def specification(u: Tensor, W: Tensor, bias: Tensor) -> Tensor:
        method, routing_grad = mode
        return reference.routing(
            u, W, iterations=iterations, method=method, routing_grad=routing_grad, bias=bias
        )

    return Case(
        f"{form}, {' '.join(mode)}",
        {"u": ((B, N, K), dtype), "W": ((N, K, J, D), dtype), "bias": ((J, D), torch.float32)},
        partial(run, launchers, mode, iterations, both, keep and mode == FINAL),
        specification,
        precision,
    )


def cases() -> Iterator[Case]:
    """Most of the time goes into compiling, so forms have sizes, and with them kernels, in common.

    A tile of the tensor cores' form has 256 columns on four warps, as for the paper's layers.
    """
    from . import triton

    small, wide, long = (3, 5, 3, 5, 3), (17, 4, 6, 17, 7), (3, 3, 3, 70, 9)  # B, N, K, J, D
    for mode in MODES:
        yield case("on chip", small, triton, mode)
    yield case("on chip", small, triton, FINAL, torch.float16)
    yield case("on chip", small, triton, FINAL, precision="high")

    def streamed(sizes: tuple[int, int, int, int, int]) -> plans.Plan:
        B, N, _, J, D = sizes
        return plans.vector_plan(B, N, J, D, 4, torch.device("meta"))._replace(per_slice=3)

    yield case("streamed, long rows", long, triton, FINAL, p=streamed(long))
    yield case("streamed, nothing kept", wide, triton, FINAL, keep=False, p=streamed(wide))
    for mode in MODES[1:]:
        yield case("streamed", wide, triton, mode, p=streamed(wide))

    dots = plans.Plan(on_chip=False, block_b=16, per_slice=3, num_warps=4, dots=True)
    for mode in MODES:
        yield case("tensor cores", wide, triton, mode, p=dots)
    yield case("tensor cores, nothing kept", wide, triton, FINAL, keep=False, p=dots)
    yield case("tensor cores", wide, triton, FINAL, precision="high", p=dots)
    yield case("tensor cores", wide, triton, FINAL, torch.bfloat16, p=dots)


def cpu_cases() -> Iterator[Case]:
    """Of the implementation for CPUs."""
    few, stacked = (3, 7, 3, 5, 3), (3, 5, 3, 5, 3)
    n, _ = chunked.chunking(17, torch.empty(1 << 20, 5, 33, 9, device="meta"), 4)
    N = max(2 * n + 1, direct.VOTES // (17 * 33 * 9) + 1)  # three chunks, and not all at once
    many = (17, N, 5, 33, 9)
    yield case("all votes at once", few, chunked, FINAL)
    yield case("all votes at once", few, chunked, FINAL, torch.bfloat16)
    for mode in MODES:
        yield case("one chunk", stacked, chunked, mode)
    for mode in (MODES[0], MODES[-1]):
        yield case("chunks", many, chunked, mode)
