"""Who takes part in the benchmark of routing, and on which inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mocapsnet.kernels import routing
from mocapsnet.kernels.launch import interpreting, triton_installed
from mocapsnet.train import graph

from . import published

Route = Callable[[Tensor, Tensor], Tensor]
EAGER: dict[str, Route] = {"published": published.broadcast_matmul, "einsum": published.einsum}
MODES = {"compiled": "default", "compiled, max-autotune": "max-autotune"}


STOPPED = "interrupted before it was compiled"


class Candidate(NamedTuple):
    """A way to route; if it is a CUDA graph, its replay, with what `forward_backward` returns."""

    route: Route
    graph: Callable[[], list[Tensor]] | None = None
    own_pool: bool = False
    """Whether its memory is not the allocator's to count."""


def problem(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, N, K], W [N, K, J, D], and the gradient of v [B, J, D]."""
    B, N, K, J, D = shape
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(B, N, K, generator=generator) * 0.2
    W = torch.randn(N, K, J, D, generator=generator) * (J / (N * D) ** 0.5)
    g = torch.randn(B, J, D, generator=generator)
    return u.to(device).requires_grad_(), W.to(device).requires_grad_(), g.to(device)


def sized(shape: tuple[int, ...], shrink: int) -> tuple[int, ...]:
    """The shape with B, N and J divided, at least 1."""
    B, N, K, J, D = shape
    B, N, J = (max(1, size // shrink) for size in (B, N, J))
    return B, N, K, J, D


def forward_backward(run: Route, u: Tensor, W: Tensor, g: Tensor) -> list[Tensor]:
    """v and the gradients of u and W."""
    v = run(u, W)
    return [v.detach(), *torch.autograd.grad(v, (u, W), g)]


def candidates(
    shape: tuple[int, ...], device: torch.device, compiled: bool
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Candidates for this shape, and why others are missing. Compiled ones are compiled here."""
    found = {name: Candidate(route) for name, route in EAGER.items()}
    found["chunked"] = Candidate(partial(routing, backend="chunked"))
    if triton_installed() and (device.type == "cuda" or interpreting()):
        found["triton"] = Candidate(partial(routing, backend="triton"))
    missing: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], Candidate]) -> None:
        try:
            found[name] = make()
        except Exception as error:  # whatever a compiler or a driver may raise, the rest goes on
            lines = str(error).strip().splitlines()
            missing[name] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

    if device.type == "cuda":
        for name, candidate in list(found.items()):
            attempt(f"{name}, CUDA graph", partial(graphed, candidate.route, shape, device))
    if compiled:
        ways = {f"{n}, {w}": (r, m) for n, r in EAGER.items() for w, m in MODES.items()}
        try:
            for name, (route, mode) in ways.items():
                attempt(name, partial(warmed, route, mode, shape, device))
        except KeyboardInterrupt:  # the time is over, which the others need not pay for
            missing |= {name: STOPPED for name in ways if name not in found | missing}
    return found, missing


def warmed(route: Route, mode: str, shape: tuple[int, ...], device: torch.device) -> Candidate:
    """`route` compiled for one shape, forward and backward."""
    compiled = torch.compile(route, mode=mode, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on precision, which is the caller's choice
        for _ in range(3):  # max-autotune records its CUDA graphs in the first calls
            forward_backward(compiled, *problem(shape, device))
    return Candidate(compiled, own_pool=device.type == "cuda" and mode == "max-autotune")


def graphed(route: Route, shape: tuple[int, ...], device: torch.device) -> Candidate:
    """`route` with the replay of its forward and backward."""
    u, W, g = problem(shape, device)
    with graph.aside(device) as stream:  # warm up there, as capturing asks for
        for _ in range(3):
            forward_backward(route, u, W, g)
    again, kept = graph.recorded(partial(forward_backward, route, u, W, g), stream)

    def replay(held: tuple[Tensor, ...] = (u, W, g)) -> list[Tensor]:
        """`held` keeps the inputs where the graph reads them."""
        again()
        return kept

    return Candidate(route, replay, own_pool=True)
