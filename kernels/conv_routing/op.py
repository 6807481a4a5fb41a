"""Convolutional routing as torch.library operations with autograd, and the public function
`conv_routing`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..launch import (
    accumulation_dtype,
    device_of,
    full_precision,
    implementation,
    recording,
    triton_installed,
)
from ..library import Operation, transformed
from ..routing.op import Explanation, backward_flops, explanation, forward_flops
from . import chunked, reference
from .windows import Windows


def conv_routing(
    u: Tensor,
    W: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Route the input capsules of every window of a grid to output capsules by agreement.

    The window of output position (y, x) holds the capsules of the kh kw input positions
    (y stride - padding + dy, x stride - padding + dx), N of each. They are routed as by `routing`,
    each position for itself, through weights that all positions share.

    Padding casts no votes: at the border only the capsules inside the grid are routed, with the
    couplings that they would have anywhere, and sums have fewer terms. A window wholly outside
    gives squash(bias), or zero.

    The result has the dtype to which those of u and W promote; sums are accumulated in float32,
    or float64 for float64. Autocast does not lower the precision of routing.

    Args:
        u: input capsules [B, H, Wd, N, K], floating point; B may be 0.
        W: transformation matrices [kh, kw, N, K, J, D], same device.
        stride: steps of the window in y and x, at least 1; one integer for both.
        padding: positions added at each of the four sides, at least 0; one integer for y and x.
        iterations, method, routing_grad: as in `routing`.
        bias: added to the weighted sum before squash [J, D], or None.
        backend: None chooses; "reference" is eager PyTorch with all windows and votes in memory;
            "chunked" is PyTorch with those of a few positions in memory at a time, the choice for
            CPUs; "triton" is the fused kernels of `routing`, which read windows from the grid, the
            choice for GPUs. Forward-mode differentiation, torch.jit.trace and ONNX export take
            "reference" alone, and then None chooses it.
    Returns: output capsules [B, H', W', J, D], length of each in [0, 1);
        H' = (H + 2 padding - kh) // stride + 1, and W' alike.
    Raises: ValueError if a shape, dtype, device or option does not fit; the message says which.
    Source: Hinton et al. 2018, "Matrix capsules with EM routing", for convolutional capsules;
        `routing` for the routing.
    """
    stride, padding = _check(u, W, stride, padding, iterations, method, routing_grad, bias)
    chosen = implementation(u, backend, eager="chunked", family="conv_routing")
    if chosen == "reference":
        dtype = accumulation_dtype(u, W)
        with full_precision(u):
            v = reference.conv_routing(
                u.to(dtype),
                W.to(dtype),
                stride=stride,
                padding=padding,
                iterations=iterations,
                method=method,
                routing_grad=routing_grad,
                bias=None if bias is None else bias.to(dtype),
            )
        return v.to(torch.promote_types(u.dtype, W.dtype))
    needs_grad = torch.is_grad_enabled() and (u.requires_grad or W.requires_grad)
    keep = needs_grad and iterations > 1 and (method, routing_grad) == ("rba", "final")
    keep = keep and not torch.compiler.is_exporting()  # its size would bound the batch
    # vmap takes kept couplings apart by samples, which those of tensor cores do not lie by
    keep = keep and not (chosen == "triton" and transformed())
    options = *stride, *padding, iterations, method, routing_grad, keep, chosen
    return conv_routing_forward(u, W, bias, *options)[0]


def explain_conv(
    u: Tensor,
    W: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    iterations: int = 3,
    method: str = "rba",
    routing_grad: str = "final",
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which implementation, kernels and configurations `conv_routing` uses for these arguments.

    Nothing is computed, and tensors on the meta device do. `backend="triton"` tells what a GPU
    would run also where there is none.

    Args, raises: as for `conv_routing`.
    """
    pairs = _check(u, W, stride, padding, iterations, method, routing_grad, bias)
    steps = pairs[0] + pairs[1]
    if backend != "triton":
        backend = implementation(u, backend, eager="chunked", family="conv_routing")
    elif not triton_installed():
        raise ValueError('backend="triton" needs the package triton: pip install triton')
    if backend == "reference":
        return Explanation(backend, "eager PyTorch with all windows and votes in memory", (), ())
    if backend == "chunked":
        (J, D), itemsize = W.shape[4:], accumulation_dtype(u, W).itemsize
        count = sum(1 for _ in chunked.blocks(Windows.of(u, W, steps), len(u), J, D, itemsize))
        most = chunked.block_positions(J, D, itemsize)
        step = f"{count} blocks of at most {most} output positions"
        form = "PyTorch, windows and votes of a block in memory at a time"
        return Explanation(backend, form, (step,), (step,))
    from . import triton

    place, u, W = u.device, u.to("meta"), W.to("meta")
    bias = None if bias is None else bias.to("meta")
    keep = (method, routing_grad) == ("rba", "final") and iterations > 1
    with recording() as forward, triton.plans.for_tensors_on(place):
        v, sums, kept = triton.forward(u, W, bias, steps, iterations, method, keep)
    with recording() as backward, triton.plans.for_tensors_on(place):
        triton.backward(v, u, W, sums, kept, steps, method, routing_grad, bias is not None)
    return explanation(forward, backward, "static")


def _check(
    u: Tensor,
    W: Tensor,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    iterations: int,
    method: str,
    routing_grad: str,
    bias: Tensor | None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Checks the arguments; returns stride and padding in y and x."""
    checks.tensor("u", u, "B H Wd N K")
    checks.tensor("W", W, "kh kw N K J D")
    if u.shape[3:] != W.shape[2:4]:
        raise ValueError(
            "u [B, H, Wd, N, K] and W [kh, kw, N, K, J, D] must agree in N and K; got "
            f"u {list(u.shape)} and W {list(W.shape)}"
        )
    if u.device != W.device:
        raise ValueError(f"u and W must be on one device; got u on {u.device} and W on {W.device}")
    if 0 in W.shape:
        raise ValueError(f"W must have no empty dimension; got shape {list(W.shape)}")
    checks.routing_options(iterations, method, routing_grad, "input", "paper")
    checks.bias(bias, W.shape[4:], u.device)
    strides, paddings = checks.pair("stride", stride, 1), checks.pair("padding", padding, 0)
    for size, kernel, pad in zip(u.shape[1:3], W.shape[:2], paddings, strict=True):
        if size + 2 * pad < kernel:
            raise ValueError(
                f"a window of {list(W.shape[:2])} does not fit a grid of {list(u.shape[1:3])} with "
                f"padding {list(paddings)}: use a smaller kernel or more padding"
            )
    return strides, paddings


def _forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    sy: int,
    sx: int,
    py: int,
    px: int,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, H', W', J, D], the sums of every iteration, and the kept couplings.

    Given sy, sx, the stride, and py, px, the padding. The sums are [R, J, D, H', W', B], those of
    Triton [R, B, H', W', J, D].
    """
    if backend == "triton":
        from . import triton

        with device_of(u):
            return triton.forward(u, W, bias, (sy, sx, py, px), iterations, method, keep)
    with full_precision(u):
        return chunked.forward(u, W, bias, (sy, sx, py, px), iterations, method, keep)


def _forward_fake(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    sy: int,
    sx: int,
    py: int,
    px: int,
    iterations: int,
    method: str,
    routing_grad: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, (J, D) = u.shape[0], W.shape[4:]
    height, width = Windows.of(u, W, (sy, sx, py, px)).output
    acc = accumulation_dtype(u, W)
    if backend == "triton":
        from . import triton

        kept_shape = triton.kept_shape(u, W, (sy, sx, py, px), keep)
        sums_shape = B, height, width, J, D
    else:
        kept_shape = chunked.kept_shape(u, W, (sy, sx, py, px), keep)
        sums_shape = J, D, height, width, B
    return (
        u.new_empty(B, height, width, J, D, dtype=torch.promote_types(u.dtype, W.dtype)),
        u.new_empty(iterations, *sums_shape, dtype=acc),
        u.new_empty(kept_shape, dtype=acc),
    )


def _backward(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    sy: int,
    sx: int,
    py: int,
    px: int,
    method: str,
    routing_grad: str,
    with_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, H, Wd, N, K], dW [kh, kw, N, K, J, D], and dbias [J, D] or without bias [0]."""
    steps = sy, sx, py, px
    if backend == "triton":
        from . import triton

        with device_of(u):
            return triton.backward(grad_v, u, W, sums, kept, steps, method, routing_grad, with_bias)
    with full_precision(u):
        return chunked.backward(grad_v, u, W, sums, kept, steps, method, routing_grad, with_bias)


def _backward_fake(
    grad_v: Tensor,
    u: Tensor,
    W: Tensor,
    sums: Tensor,
    kept: Tensor,
    sy: int,
    sx: int,
    py: int,
    px: int,
    method: str,
    routing_grad: str,
    with_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = sums.new_empty(W.shape[4:] if with_bias else 0)
    return u.new_empty(u.shape), W.new_empty(W.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, W, bias, *ctx.steps, _, ctx.method, ctx.routing_grad, _, ctx.backend = inputs
    _, sums, kept = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(sums, kept)
    ctx.set_materialize_grads(False)  # else backward is given zeros as large as `kept`
    ctx.save_for_backward(u, W, sums, kept)


def _gradients(ctx: Any, grad_v: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_v is None:
        return (None,) * 12
    with_bias = ctx.bias_dtype is not None
    options = *ctx.steps, ctx.method, ctx.routing_grad, with_bias, ctx.backend
    du, dW, dbias = conv_routing_backward(grad_v, *ctx.saved_tensors, *options)
    return du, dW, dbias.to(ctx.bias_dtype) if with_bias else None, *(None,) * 9


def _layout(args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    """Where v, sums and kept couplings have the batch; kept ones may be none."""
    sums, kept = (1, 2) if args[-1] == "triton" else (5, 4)
    return 0, sums, kept if output[2].dim() == 5 else None


def _flat(u: Tensor, W: Tensor, *steps: int) -> tuple[Tensor, Tensor]:
    """What `routing` counts for all windows: u [B H' W', 0] and W [kh kw N, K, J, D]."""
    height, width = Windows.of(u, W, steps).output
    return u.new_empty(len(u) * height * width, 0, device="meta"), W.flatten(0, 2)


def _forward_flops(u: Tensor, W: Tensor, bias: Any, *options: Any) -> int:
    return forward_flops(*_flat(u, W, *options[:4]), options[4])


def _backward_flops(
    dv: Tensor, u: Tensor, W: Tensor, sums: Tensor, kept: Tensor, *options: Any
) -> int:
    return backward_flops(*_flat(u, W, *options[:4]), len(sums), options[5])


conv_routing_forward = Operation(
    "conv_routing_forward",
    _forward,
    _forward_fake,
    batched=1,
    layout=_layout,
    flops=_forward_flops,
)
conv_routing_backward = Operation(
    "conv_routing_backward", _backward, _backward_fake, flops=_backward_flops
)
conv_routing_forward.differentiate(_gradients, _setup_context)
conv_routing_backward.refuse_derivative()
