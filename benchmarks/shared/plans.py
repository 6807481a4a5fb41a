"""Plans that a call of routing could have, and whether they are right.

A candidate is compared with the reference on a small problem of the same kernels, and at its true
size with the implementation in PyTorch in float64, beside the static plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mocapsnet.kernels.cases import TF32, Case, check
from mocapsnet.kernels.launch import padded
from mocapsnet.kernels.momentum import cases as momentum_cases
from mocapsnet.kernels.momentum import chunked as momentum_chunked
from mocapsnet.kernels.momentum import triton as momentum
from mocapsnet.kernels.routing import cases as routing_cases
from mocapsnet.kernels.routing import chunked, plans
from mocapsnet.kernels.routing import triton as routing
from mocapsnet.kernels.routing.plans import Plan

from .calls import Call

STATIC = "static"


def static(call: Call, device: torch.device) -> Plan:
    return plans.plan(*call.sizes, 8 if torch.float64 in (call.u, call.W) else 4, device)


def by_layers(call: Call) -> Call:
    """A stack whose samples do not fit a program is launched layer by layer, as `routing`."""
    _, N, _, J, D = call.sizes
    if call.operation == "momentum" and not plans.fits_on_chip(N, J, D):
        return call._replace(operation="routing", stack=None)
    return call


def candidates(call: Call, device: torch.device) -> dict[str, Plan]:
    """Plans by how they differ from the static one, which comes first; all of its form."""
    B, N, K, J, D = call.sizes
    p = static(call, device)
    found = {
        "half the warps": p._replace(num_warps=p.num_warps // 2),
        "twice the warps": p._replace(num_warps=2 * p.num_warps),
    }
    if p.on_chip:
        found["a quarter of the warps"] = p._replace(num_warps=p.num_warps // 4)
        found["four times the warps"] = p._replace(num_warps=4 * p.num_warps)
    else:
        found["half the programs"] = p._replace(per_slice=min(2 * p.per_slice, N))
        found["twice the programs"] = p._replace(per_slice=-(-p.per_slice // 2))
        found["twice the samples and warps"] = p._replace(
            block_b=min(2 * p.block_b, padded(B)), num_warps=2 * p.num_warps
        )
        if p.dots or p.num_warps == 1:
            found["half the samples"] = p._replace(block_b=p.block_b // 2)
            found["twice the samples"] = p._replace(block_b=min(2 * p.block_b, padded(B)))
        else:
            found["half the samples and warps"] = p._replace(
                block_b=p.block_b // 2, num_warps=p.num_warps // 2
            )
        if p.dots:
            found["vector units"] = plans.vector_plan(B, N, J, D, 4, device)
        elif torch.float64 not in (call.u, call.W) and K <= 32:
            found["tensor cores"] = plans.dot_plan(B, N, J, D, device)
    distinct = {STATIC: p}
    for name, plan in found.items():
        if possible(plan, call) and plan not in distinct.values():
            distinct[name] = plan
    return distinct


def possible(p: Plan, call: Call) -> bool:
    """A product on tensor cores takes 16 samples, and eight columns [J, D] of each warp."""
    columns = padded(call.sizes[3]) * padded(call.sizes[4])
    fits = 1 <= p.num_warps <= 32 and p.block_b >= 1
    return fits and (not p.dots or (p.block_b >= 16 and columns >= 8 * p.num_warps))


def small_case(call: Call, precision: str, p: Plan, q: Plan) -> Case:
    """A problem that makes the kernels of `p` forward and `q` backward, with ragged tiles."""
    B, N, K, J, D = call.sizes
    mode = call.method, call.routing_grad
    if call.operation == "momentum":
        made = momentum_cases.case(
            "on chip",
            momentum,
            mode,
            call.W,
            precision,
            sizes=(min(B, 3), J, D),
            iterations=call.iterations,
            p=p,
            q=q,
        )
        states = {name: (made.inputs[name][0], call.u) for name in ("x", "v")}
        return made._replace(inputs={**made.inputs, **states})
    if not p.on_chip:
        B, N = min(B, max(p.block_b, q.block_b) + 1), min(N, 5)
        p, q = (plan._replace(per_slice=min(3, N)) for plan in (p, q))
    made = routing_cases.case(
        "a plan",
        (min(B, 3) if p.on_chip else B, N, K, J, D),
        routing,
        mode,
        call.W,
        precision=precision,
        keep=call.iterations > 1,
        iterations=call.iterations,
        p=p,
        q=q,
    )
    return made._replace(inputs={**made.inputs, "u": (made.inputs["u"][0], call.u)})


class Launchers(NamedTuple):
    """A call with tensors: its two directions, as functions of a plan.

    `backward` continues from what the forward direction by the static plan has left.
    """

    forward: Callable[[Plan], tuple[Tensor, ...]]
    backward: Callable[[Plan], tuple[Tensor, ...]]
    truth: Callable[[], list[Tensor]]
    """The output and all gradients, by PyTorch in float64."""


def launchers(call: Call, device: torch.device) -> Launchers:
    """A call at its size, with random inputs that are the same everywhere."""
    generator = torch.Generator().manual_seed(0)

    def random(dtype: torch.dtype, scale: float, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(scale).to(device, dtype)

    B, N, K, J, D = call.sizes
    R, method, grad = call.iterations, call.method, call.routing_grad
    u = random(call.u, 0.2, B, N, K)
    g = random(torch.float32, 1.0, B, J, D)
    layers = call.stack[0] if call.stack else 1
    weights = [random(call.W, J / (N * D) ** 0.5, N, K, J, D) for _ in range(layers)]
    biases = [random(torch.float32, 0.1, J, D) for _ in weights] if call.bias else []
    wide_weights, wide_biases = ([x.double() for x in these] for these in (weights, biases))
    if call.operation == "momentum":
        v, plan = torch.zeros_like(u), call.schedule()
        anchors = momentum.forward(u, v, weights, biases, plan, R, method, static(call, device))[1]

        def momentum_truth() -> list[Tensor]:
            both = wide_weights, wide_biases
            y, kept = momentum_chunked.forward(u.double(), v.double(), *both, plan, R, method)
            back = momentum_chunked.backward(g.double(), kept, *both, plan, R, method, grad)
            return [y, *back]

        return Launchers(
            lambda p: momentum.forward(u, v, weights, biases, plan, R, method, p),
            lambda p: momentum.backward(
                g.to(u.dtype), anchors, weights, biases, plan, R, method, grad, p
            ),
            momentum_truth,
        )
    W, bias = weights[0], biases[0] if biases else None
    keep = (method, grad) == ("rba", "final") and R > 1
    v, s, kept = routing.forward(u, W, bias, R, method, keep, static(call, device))

    def routing_truth() -> list[Tensor]:
        wide_u, wide_W = u.double(), wide_weights[0]
        wide_bias = wide_biases[0] if wide_biases else None
        v, s, kept = chunked.forward(wide_u, wide_W, wide_bias, R, method, keep)
        back = chunked.backward(g.double(), wide_u, wide_W, s, kept, method, grad, bias is not None)
        return [v, *back]

    return Launchers(
        lambda p: routing.forward(u, W, bias, R, method, keep, p),
        lambda p: routing.backward(g.to(v.dtype), u, W, s, kept, method, grad, bias is not None, p),
        routing_truth,
    )


class Judge:
    """Says what is wrong with plans of one call.

    Args:
        works: the call with tensors.
        call, precision, device: of it.
    """

    def __init__(self, call: Call, precision: str, device: torch.device, works: Launchers):
        self.call, self.precision, self.device, self.works = call, precision, device, works
        self.truth = works.truth()
        self.allowed: list[float] | None = None

    def verdict(self, p: Plan, q: Plan) -> str:
        """What is wrong with `p` forward and `q` backward; empty if nothing is.

        At true size a plan may be off four times as much as the static plan, which comes first and
        may be off by what rounding every product does.
        """
        wrong = check(small_case(self.call, self.precision, p, q), self.device)
        if wrong:
            return wrong
        got = [self.works.forward(p)[0], *self.works.backward(q)]
        errors = [
            float((x.double() - t).abs().max()) if t.numel() else 0.0
            for x, t in zip(got, self.truth, strict=True)
        ]
        largest = [float(t.abs().max()) if t.numel() else 0.0 for t in self.truth]
        units = [2 * torch.finfo(x.dtype).eps * m for x, m in zip(got, largest, strict=True)]
        if self.allowed is None:
            loose = self.precision != "highest" or self.call.W.itemsize == 2
            rounding = 32 * TF32 if loose else 1e-4
            limits = [rounding * m + u for m, u in zip(largest, units, strict=True)]
        else:
            limits = self.allowed
        for n, (error, limit) in enumerate(zip(errors, limits, strict=True)):
            if not error <= limit:
                return f"at its true size result {n} is off by {error:.2g}, allowed {limit:.2g}"
        if self.allowed is None:
            self.allowed = [4 * e + u for e, u in zip(errors, units, strict=True)]
        return ""
