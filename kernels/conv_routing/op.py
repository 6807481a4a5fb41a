"""Convolutional routing: argument checks and the public function `conv_routing`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..launch import full_precision
from . import reference


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
        backend: "reference" is eager PyTorch with all windows and votes in memory.
    Returns: output capsules [B, H', W', J, D], length of each in [0, 1);
        H' = (H + 2 padding - kh) // stride + 1, and W' alike.
    Raises: ValueError if a shape, dtype, device or option does not fit; the message says which.
    Source: Hinton et al. 2018, "Matrix capsules with EM routing", for convolutional capsules;
        `routing` for the routing.
    """
    stride, padding = _check(u, W, stride, padding, iterations, method, routing_grad, bias)
    checks.choice("backend", backend, (None, "reference"))
    dtype = torch.promote_types(u.dtype, W.dtype)
    with full_precision(u):
        return reference.conv_routing(
            u.to(dtype),
            W.to(dtype),
            stride=stride,
            padding=padding,
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=None if bias is None else bias.to(dtype),
        )


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
