"""Launches the Triton kernels of `routing` on windows, which they read from the grid itself.

Every output position is a sample of the streamed form. Its input capsules lie in the grid, copied
once with its padding; no window is copied. Backward goes place by place of a window: at one place
no two windows have a capsule in common, so each launch adds to du, without atomic operations.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..launch import accumulation_dtype
from ..routing import chunked, plans
from ..routing import triton as routing
from .windows import Windows


def kept_shape(u: Tensor, W: Tensor, steps: tuple[int, ...], keep: bool) -> tuple[int, ...]:
    """Shape of the couplings that forward keeps; (0,) if it keeps none.

    They are [kh kw N, J, B, H', W'], or where tensor cores take them, in tiles of 16 windows.
    """
    shape = W.shape[:3].numel(), W.shape[4], u.shape[0], *Windows.of(u, W, steps).output
    itemsize = accumulation_dtype(u, W).itemsize
    if not keep or math.prod(shape) * itemsize > chunked.KEPT_BYTES:
        return (0,)
    B = math.prod(shape[2:])
    K, J, D = W.shape[3:]
    if plans.fits_tensor_cores(K, J, D, itemsize):
        return routing.in_tiles(shape[0], J, B)
    return shape


def planned(W: Tensor, s: Tensor) -> plans.Plan:
    """The plan for weights W [N, K, J, D] of whole windows, or of a place, and their sums s."""
    N, K, J, D = W.shape
    return plans.streamed_plan(s[0].numel() // (J * D), N, K, J, D, s.itemsize, s.device)


def with_padding(u: Tensor, windows: Windows) -> Tensor:
    """The grid with its padding [B, H + 2 py, Wd + 2 px, N, K]; u itself if it has none."""
    if windows.py == windows.px == 0:
        return u.contiguous()
    return pad(u, (0, 0, 0, 0, *[windows.px] * 2, *[windows.py] * 2)).contiguous()


def forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    steps: tuple[int, ...],
    iterations: int,
    method: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, H', W', J, D], s of every iteration [R, B, H', W', J, D], and the kept couplings."""
    windows = Windows.of(u, W, steps)
    shape = len(u), *windows.output, *W.shape[4:]
    v = u.new_empty(shape, dtype=torch.promote_types(u.dtype, W.dtype))
    s = u.new_empty(iterations, *shape, dtype=accumulation_dtype(u, W))
    kept = s.new_empty(kept_shape(u, W, steps, keep))
    if len(u):
        weights = W.contiguous().flatten(0, 2)
        routing.streamed_forward(
            with_padding(u, windows),
            weights,
            bias,
            v.flatten(0, 2),
            s.flatten(1, 3),
            kept.flatten(2) if kept.dim() == 5 else kept,
            method,
            planned(weights, s),
            windows.addresses(*u.shape[3:]),
        )
    return v, s, kept


def backward(
    dv: Tensor,
    u: Tensor,
    W: Tensor,
    s: Tensor,
    kept: Tensor,
    steps: tuple[int, ...],
    method: str,
    routing_grad: str,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, H, Wd, N, K], dW [kh, kw, N, K, J, D] and dbias [J, D] or [0].

    du is summed in a grid with its padding, in the accumulation dtype.
    """
    W, s, kept = W.contiguous(), s.contiguous(), kept.contiguous()  # parts under vmap
    dW = torch.empty_like(W)
    if len(u) == 0:
        return u.new_empty(u.shape), dW.zero_(), s.new_zeros(W.shape[4:] if with_bias else 0)
    windows = Windows.of(u, W, steps)
    addresses = windows.addresses(*u.shape[3:])
    modes = method == "sda", routing_grad == "full"
    grid, weights = with_padding(u, windows), W.flatten(0, 2)
    du = torch.zeros_like(grid, dtype=s.dtype)
    sums, couplings = s.flatten(1, 3), kept.flatten(2) if kept.dim() == 5 else kept
    plan = planned(weights, sums)
    dv = dv.contiguous().flatten(0, 2)
    x = routing.output_gradients(dv, grid, weights, sums, couplings, *modes, plan, addresses)
    are_kept, place_plan = kept.dim() > 1, planned(W[0, 0], sums)
    by_place = couplings.unflatten(0, W.shape[:3]) if are_kept else couplings
    for dy, dx in product(range(windows.kh), range(windows.kw)):
        W_place, u_place, du_place = W[dy, dx], grid[:, dy:, dx:], du[:, dy:, dx:]
        if are_kept:
            c = by_place[dy, dx]
            routing.kept_input_gradient(
                u_place, W_place, c, x, du_place, sums.shape[1], place_plan, addresses
            )
        else:
            routing.streamed_backward(
                u_place, W_place, x, kept, du_place, dW[dy, dx], sums, *modes, place_plan, addresses
            )
    if are_kept:  # dW of all places at once
        routing.kept_weight_gradient(
            grid, weights, couplings, x, dW.flatten(0, 2), sums.shape[1], plan, addresses
        )
    inner = du[:, windows.py : windows.py + windows.H, windows.px : windows.px + windows.Wd]
    dbias = routing.bias_gradient(x, sums, modes[1]) if with_bias else s.new_empty(0)
    return inner.to(u.dtype).contiguous(), dW, dbias
