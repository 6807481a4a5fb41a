"""Routing as torch.library operations with autograd, and the public function `routing`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, tuning
from ..launch import (
    Launch,
    accumulation_dtype,
    device_of,
    full_precision,
    implementation,
    recording,
    triton_installed,
)
from ..library import Operation, observed, transformed
from . import chunked, direct, reference


def routing(
    u: Tensor,
    W: Tensor,
    *,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    sda_mean: str = "input",
    sda_scale: str = "paper",
    backend: str | None = None,
) -> Tensor:
    """Route input capsules to output capsules by agreement.

    Every input capsule i votes u_hat_ij = u_i W_ij for every output capsule j. Each iteration
    weighs the votes with couplings c_ij = softmax_j(b_ij), squashes their sum to v_j, and updates
    the logits b_ij from how well each vote agrees with v_j. Votes are recomputed, never stored.

    The result has the dtype to which those of u and W promote; sums are accumulated in float32,
    or float64 for float64. Autocast does not lower the precision of routing.

    Args:
        u: input capsules [B, N, K], floating point; B may be 0.
        W: transformation matrices [N, K, J, D], same device.
        iterations: routing iterations R >= 1; the first has equal couplings 1 / J.
        method: "rba", routing by agreement, adds the agreement u_hat_ij . v_j to b_ij; "sda",
            scaled-distance agreement, shortens votes to the length of their capsule and sets b_ij
            to their distance from v_j over the mean distance, scaled so that a vote at half the
            mean distance would have a coupling of 0.9.
        routing_grad: "final" treats the couplings and all iterations but the last as constants;
            "full" differentiates through every iteration.
        bias: added to the weighted sum before squash [J, D], or None.
        sda_mean: with method "sda" the mean distance is taken per input capsule, "input", or over
            batch, input and output capsules, "batch", as the published code of Momentum Capsule
            Networks does; then a sample's output depends on the others in its batch. "batch" runs
            on the reference implementation only.
        sda_scale: with method "sda" the scale t of the logits, for a mean distance m: that of the
            method's paper, (log(0.9 (J - 1)) - log 0.1) / (m / 2 - m), or of the "published" code
            of Momentum Capsule Networks, log(0.9 (J - 1)) - log 0.1 / (m / 2 - m), which changes
            its sign as m grows. "published" runs on the reference implementation only.
        backend: None chooses by device; "reference" is eager PyTorch with all votes in memory;
            "chunked" is PyTorch with a few input capsules' votes in memory at a time, the choice
            for CPUs; "triton" is fused kernels, the choice for GPUs. Forward-mode differentiation,
            torch.jit.trace and ONNX export take "reference" alone, and then None chooses it.
    Returns: output capsules [B, J, D], length of each in [0, 1).
    Raises: ValueError if a shape, dtype, device or option does not fit; the message says which.
    Source: Sabour et al. 2017, procedure 1 (rba); Peer et al. 2018, "gamma-capsules" (sda); see
        kernels/routing/README.md for the stateless form and both gradients.
    """
    modes = (iterations, method, routing_grad, bias, sda_mean, sda_scale)
    chosen = _implementation(u, W, *modes, backend)
    if chosen == "reference":
        return _reference(u, W, *modes)
    seen = observed() or transformed()
    if chosen == "chunked" and not seen and direct.faster(len(u), W, method):
        with full_precision(u):
            return direct.routing(u, W, bias, iterations, routing_grad)
    needs_grad = torch.is_grad_enabled() and (u.requires_grad or W.requires_grad)
    keep = needs_grad and iterations > 1
    keep = keep and (method, routing_grad) == ("rba", "final")
    keep = keep and not torch.compiler.is_exporting()  # its size would bound the batch
    # vmap takes kept couplings apart by samples, which those of tensor cores do not lie by
    keep = keep and not (chosen == "triton" and transformed())
    return routing_forward(u, W, bias, iterations, method, routing_grad, keep, chosen)[0]


def _implementation(
    u: Tensor,
    W: Tensor,
    iterations: int,
    method: str,
    routing_grad: str,
    bias: Tensor | None,
    sda_mean: str,
    sda_scale: str,
    backend: str | None,
) -> str:
    """Checks the arguments of `routing` and says what runs them."""
    checks.capsules_and_weight(u, W)
    checks.routing_options(iterations, method, routing_grad, sda_mean, sda_scale)
    checks.bias(bias, W.shape[2:], u.device)
    if _eager_only(method, sda_mean, sda_scale, backend):
        return "reference"
    return implementation(u, backend, eager="chunked", family="routing")


def _eager_only(method: str, sda_mean: str, sda_scale: str, backend: str | None) -> bool:
    """Whether the reference alone has these options. Raises: ValueError if another is asked for."""
    asked = {"sda_mean": (sda_mean, "batch"), "sda_scale": (sda_scale, "published")}
    for name, (value, eager) in asked.items():
        if method == "sda" and value == eager:
            if backend not in (None, "reference"):
                raise ValueError(
                    f'{name}="{value}" needs backend="reference" or None; got "{backend}"'
                )
            return True
    return False


class Explanation(NamedTuple):
    """What runs a call of `routing` or `conv_routing`; `str` writes it in lines.

    `forward` and `backward` name kernels with their grids and compile-time parameters, in the
    order of their launches, or the size of the chunks; nothing for the reference.
    """

    backend: str
    form: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    plans: str = ""
    """Of the kernels: which table they are from, or why they are the static ones."""

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.form}"]
        lines += [f"  plans:    {self.plans}"] if self.plans else []
        lines += [f"  forward:  {step}" for step in self.forward]
        return "\n".join(lines + [f"  backward: {step}" for step in self.backward])


def explain(
    u: Tensor,
    W: Tensor,
    *,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    sda_mean: str = "input",
    sda_scale: str = "paper",
    backend: str | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Which implementation, kernels and configurations `routing` uses for these arguments.

    The choice follows from shapes, dtypes, device and its table of tuned plans alone; nothing is
    computed, and tensors on the meta device do. `backend="triton"` tells what a GPU would run also
    where there is none.

    Args, raises: as for `routing`, but
        device: whose table counts, for tensors that are not there; None for that of u.
    """
    modes = (iterations, method, routing_grad, bias, sda_mean, sda_scale)
    if backend != "triton":
        backend = _implementation(u, W, *modes, backend)
    else:
        _implementation(u, W, *modes, "reference")
        _eager_only(method, sda_mean, sda_scale, backend)
        if not triton_installed():
            raise ValueError('backend="triton" needs the package triton: pip install triton')
    if backend == "reference":
        return Explanation(backend, "eager PyTorch with all votes in memory", (), ())
    if backend == "chunked":
        if direct.faster(len(u), W, method):
            return Explanation(
                backend, "PyTorch, all votes at once, as they are few", ("direct",), ("direct",)
            )
        n, chunks = chunked.chunking(len(u), W, accumulation_dtype(u, W).itemsize)
        step = f"{chunks} chunks of {n} input capsules"
        return Explanation(
            backend, "PyTorch, votes of a chunk in memory at a time", (step,), (step,)
        )
    from . import triton

    place = u.device if device is None else torch.device(device)
    u, W = u.to("meta"), W.to("meta")
    bias = None if bias is None else bias.to("meta")
    keep = (method, routing_grad) == ("rba", "final") and iterations > 1
    p, q, plans = tuning.told(place, u, W, iterations, method, routing_grad)
    with recording() as forward, triton.plans.for_tensors_on(place):
        v, sums, kept = triton.forward(u, W, bias, iterations, method, keep, p)
    with recording() as backward, triton.plans.for_tensors_on(place):
        triton.backward(v, u, W, sums, kept, method, routing_grad, bias is not None, q)
    return explanation(forward, backward, plans)


def explanation(forward: list[Launch], backward: list[Launch], plans: str) -> Explanation:
    """Of the launches of Triton kernels."""
    from . import triton

    on_chip = any(launch.kernel is triton.on_chip_forward_kernel for launch in forward)
    form = "on chip, a sample per program" if on_chip else "streamed over the input capsules"
    if any(launch.kernel is triton.dot_sum_kernel for launch in forward):
        of_dots = (triton.kept_backward_dots_kernel, triton.owned_backward_kernel)
        in_dots = any(launch.kernel in of_dots for launch in backward)
        form += ", votes and gradients on" if in_dots else ", gradients on vector units, votes on"
        form += " tensor cores"
    launches = [tuple(map(str, part)) for part in (forward, backward)]
    return Explanation("triton", form, launches[0], launches[1], plans)


def _reference(
    u: Tensor,
    W: Tensor,
    iterations: int,
    method: str,
    routing_grad: str,
    bias: Tensor | None,
    sda_mean: str,
    sda_scale: str,
) -> Tensor:
    dtype = accumulation_dtype(u, W)
    with full_precision(u):
        v = reference.routing(
            u.to(dtype),
            W.to(dtype),
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=None if bias is None else bias.to(dtype),
            sda_mean=sda_mean,
            sda_scale=sda_scale,
        )
    return v.to(torch.promote_types(u.dtype, W.dtype))


def _forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, D], the sums of every iteration [R, B, J, D], and the kept couplings."""
    if backend == "triton":
        from . import triton

        with device_of(u):
            return triton.forward(u, W, bias, iterations, method, keep)
    with full_precision(u):
        return chunked.forward(u, W, bias, iterations, method, keep)


def _forward_fake(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, (J, D) = u.shape[0], W.shape[2:]
    acc = accumulation_dtype(u, W)
    if backend == "triton":
        from . import triton

        kept_shape = triton.kept_shape(u, W, keep)
    else:
        kept_shape = chunked.kept_shape(u, W, keep)
    return (
        u.new_empty(B, J, D, dtype=torch.promote_types(u.dtype, W.dtype)),
        u.new_empty(iterations, B, J, D, dtype=acc),
        u.new_empty(kept_shape, dtype=acc),
    )


def _backward(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    with_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, N, K], dW [N, K, J, D], and dbias [J, D] or without bias [0]."""
    if backend == "triton":
        from . import triton

        with device_of(u):
            return triton.backward(grad_v, u, W, sums, kept, method, routing_grad, with_bias)
    with full_precision(u):
        return chunked.backward(grad_v, u, W, sums, kept, method, routing_grad, with_bias)


def _backward_fake(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    with_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = sums.new_empty(W.shape[2:] if with_bias else 0)
    return u.new_empty(u.shape), W.new_empty(W.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, W, bias, _, ctx.method, ctx.routing_grad, _, ctx.backend = inputs
    _, sums, kept = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(sums, kept)
    ctx.set_materialize_grads(False)  # else backward is given zeros as large as `kept`
    ctx.save_for_backward(u, W, sums, kept)


def _gradients(ctx: Any, grad_v: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_v is None:
        return (None,) * 8
    with_bias = ctx.bias_dtype is not None
    du, dW, dbias = routing_backward(
        grad_v, *ctx.saved_tensors, ctx.method, ctx.routing_grad, with_bias, ctx.backend
    )
    return du, dW, dbias.to(ctx.bias_dtype) if with_bias else None, None, None, None, None, None


def _layout(args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    """Where v, sums and kept couplings have the batch; kept ones may be none."""
    return 0, 1, 2 if output[2].dim() == 3 else None


def forward_flops(u: Tensor, W: Tensor, iterations: int) -> int:
    """Of the votes, made once, of every iteration's weighted sum, and of the agreements between."""
    return 2 * len(u) * W[0, 0].numel() * len(W) * (W.shape[1] + 2 * iterations - 1)


def backward_flops(u: Tensor, W: Tensor, iterations: int, routing_grad: str) -> int:
    """Of du and dW, equation 14; "full" also of the votes, made again, and equations 9 and 11."""
    K = W.shape[1]
    sums = 2 * K if routing_grad == "final" else 3 * K + 3 * (iterations - 1)
    return 2 * len(u) * W[0, 0].numel() * len(W) * sums


routing_forward = Operation(
    "routing_forward",
    _forward,
    _forward_fake,
    batched=1,
    layout=_layout,
    flops=lambda u, W, bias, iterations, *_: forward_flops(u, W, iterations),
)
routing_backward = Operation(
    "routing_backward",
    _backward,
    _backward_fake,
    flops=lambda dv, u, W, sums, kept, method, grad, *_: backward_flops(u, W, len(sums), grad),
)
routing_forward.differentiate(_gradients, _setup_context)
routing_backward.refuse_derivative()
