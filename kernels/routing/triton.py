"""Launches the Triton kernels of routing, in the form that suits a problem."""

from typing import Any

import torch
from torch import Tensor

from ..launch import accumulation_dtype, accumulation_type, cdiv, launch, padded, split_precision
from . import chunked, plans
from .dot_sums import dot_sum_kernel, first_sum_kernel
from .dots import LEAST_K
from .kept import kept_backward_dots_kernel, kept_weight_gradient_kernel
from .on_chip import on_chip_backward_kernel, on_chip_forward_kernel
from .owned import owned_backward_kernel
from .plans import Plan
from .reference import distance_scale
from .streamed import (
    kept_backward_kernel,
    output_gradient_kernel,
    output_kernel,
    streamed_backward_kernel,
    streamed_sum_kernel,
)
from .weight_gradient import weight_gradient

TERMS_BYTES = 64 << 20
"""Numbers a that streamed backward holds at a time."""

Windows = tuple[int, ...] | None
"""The option WINDOWS of kernels, see `tile.py`."""


def sum_kernel(
    p: Plan, u: Tensor, W: Tensor, sda: bool, full: bool, windows: Windows
) -> tuple[Any, dict[str, Any]]:
    """The kernel of streamed sums, and its launch options that all of them share."""
    _, K, J, D = W.shape
    options: dict[str, Any] = dict(
        K=K,
        J=J,
        D=D,
        SCALE=distance_scale(J),
        SDA=sda,
        BLOCK_B=p.block_b,
        BLOCK_D=padded(D),
        ACC=accumulation_type(u, W),
        WINDOWS=windows,
        num_warps=p.num_warps,
        num_stages=1,
        **plans.sum_registers(p, K, sda, full),
    )
    if not p.dots:
        return streamed_sum_kernel, options | dict(BLOCK_J=padded(J))
    return dot_sum_kernel, options | dict(
        PRECISION=split_precision(u, W),
        WARPS=p.num_warps,
        BLOCK_K=max(padded(K), LEAST_K),
        BLOCK_J=max(padded(J), 8),
    )


def kept_shape(u: Tensor, W: Tensor, keep: bool) -> tuple[int, ...]:
    """Shape of the couplings that the streamed forward keeps; (0,) if it keeps none.

    They are [N, J, B], or where the static plan, whichever is chosen, has tensor cores, `in_tiles`.
    """
    N, K, J, D = W.shape
    shape = chunked.kept_shape(u, W, keep and not plans.fits_on_chip(N, J, D))
    dots = plans.fits_tensor_cores(K, J, D, accumulation_dtype(u, W).itemsize)
    return in_tiles(*shape) if len(shape) == 3 and dots else shape


def in_tiles(N: int, J: int, B: int) -> tuple[int, ...]:
    """Shape of couplings as tensor cores take them, [N, tiles, J, 16], J and tiles padded; see
    `fragments.coupling_place`."""
    return N, cdiv(B, 16), max(padded(J), 8), 16


def forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    iterations: int,
    method: str,
    keep: bool,
    p: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v [B, J, D], s of every iteration [R, B, J, D], and the kept couplings.

    By the plan `p` if one is given, of the form that the static plan has.
    """
    u, W = u.contiguous(), W.contiguous()
    p = p or plans.chosen(u, W, "forward", iterations, method)
    B, N, K = u.shape
    J, D = W.shape[2:]
    v = u.new_empty(B, J, D, dtype=torch.promote_types(u.dtype, W.dtype))
    s = u.new_empty(iterations, B, J, D, dtype=accumulation_dtype(u, W))
    kept = s.new_empty(kept_shape(u, W, keep))
    if kept.dim() == 4 and not p.dots:  # backward multiplies whole tiles, of which it fills a part
        kept.zero_()
    if B == 0:
        return v, s, kept
    if not p.on_chip:
        streamed_forward(u, W, bias, v, s, kept, method, p)
        return v, s, kept
    launch(
        on_chip_forward_kernel,
        (B,),
        *(u, W, v if bias is None else bias.contiguous(), v, s, B, N),
        K=K,
        J=J,
        D=D,
        R=iterations,
        SCALE=distance_scale(J),
        SDA=method == "sda",
        HAS_BIAS=bias is not None,
        BLOCK_N=padded(N),
        BLOCK_J=padded(J),
        BLOCK_D=padded(D),
        ACC=accumulation_type(u, W),
        num_warps=p.num_warps,
    )
    return v, s, kept


def streamed_forward(
    u: Tensor,
    W: Tensor,
    bias: Tensor | None,
    v: Tensor,
    s: Tensor,
    kept: Tensor,
    method: str,
    p: Plan,
    windows: Windows = None,
) -> None:
    """Fills v [B, J, D], s [R, B, J, D], and couplings [N, J, B], or `in_tiles`, if `kept` is to
    have them.

    The samples are u [B, N, K], or the `windows` of a grid; see `tile.py`.
    """
    R, B, J, D = s.shape
    N, K = W.shape[:2]
    sda = method == "sda"
    sizes = dict(J=J, D=D, BLOCK_J=padded(J), BLOCK_D=padded(D), ACC=accumulation_type(u, W))
    kernel, options = sum_kernel(p, u, W, sda, False, windows)
    has_bias = bias is not None
    bias = v if bias is None else bias.contiguous()
    slices, multiprocessors = cdiv(N, p.per_slice), plans.multiprocessors_of(u.device)
    partial = s.new_empty(slices, B, J, D)
    V = torch.empty_like(s[0])
    for r in range(R):
        if r == 0 and not sda and s.itemsize in plans.DOT_SIZES:
            block_b, block_jd = 32, min(max(padded(J) * padded(D), 16), 128)
            launch(
                first_sum_kernel,
                (cdiv(B, block_b), slices, cdiv(J * D, block_jd)),
                *(u, W, partial, B, N, p.per_slice),
                K=K,
                J=J,
                D=D,
                PRECISION=split_precision(u, W),
                BLOCK_B=block_b,
                BLOCK_NK=16,
                BLOCK_JD=block_jd,
                ACC=sizes["ACC"],
                WINDOWS=windows,
                num_warps=4,
                num_stages=1,
            )
        else:
            launch(
                kernel,
                (cdiv(B, p.block_b), slices),
                *(u, W, V, V, kept, partial, B, N, p.per_slice, multiprocessors),
                UNIFORM=r == 0,
                GRADIENT=False,
                KEEP=kept.dim() > 1 and r == R - 1,
                FRAGMENTS=kept.dim() == 4,
                **options,
            )
        launch(
            output_kernel,
            (B,),
            *(partial, bias, s[r], v, V, slices, B),
            HAS_BIAS=has_bias,
            ADD=r > 0 and not sda,
            BLOCK_S=max(1, 16384 // (padded(J) * padded(D))),
            num_warps=8,
            **sizes,
        )


def backward(
    dv: Tensor,
    u: Tensor,
    W: Tensor,
    s: Tensor,
    kept: Tensor,
    method: str,
    routing_grad: str,
    with_bias: bool,
    p: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """du [B, N, K], dW [N, K, J, D] and dbias [J, D] or [0]."""
    u, W, dv = u.contiguous(), W.contiguous(), dv.contiguous()
    s, kept = s.contiguous(), kept.contiguous()  # under vmap they are parts of larger ones
    B, N, K = u.shape
    R, _, J, D = s.shape
    du, dW = torch.empty_like(u), torch.empty_like(W)
    if B == 0:
        return du, dW.zero_(), s.new_zeros(J, D) if with_bias else s.new_empty(0)
    p = p or plans.chosen(u, W, "backward", R, method, routing_grad)
    sda, full = method == "sda", routing_grad == "full"
    if p.on_chip:
        x = on_chip_backward(dv, u, W, s, du, dW, sda, full, p)
    else:
        x = output_gradients(dv, u, W, s, kept, sda, full, p)
        streamed_backward(u, W, x, kept, du, dW, s, sda, full, p)
    return du, dW, bias_gradient(x, s, full) if with_bias else s.new_empty(0)


def terms_of(R: int, full: bool) -> int:
    """Of the sum that d(vote) is, equation 15, without that of the vote."""
    return 2 * R - 1 if full else 1


def bias_gradient(x: Tensor, s: Tensor, full: bool) -> Tensor:
    """dbias [J, D] from the ds of each iteration, or of the last; padding is 0."""
    R, _, J, D = s.shape
    return x[: R if full else 1].sum((0, 1))[:J, :D].contiguous()


def on_chip_backward(
    dv: Tensor,
    u: Tensor,
    W: Tensor,
    s: Tensor,
    du: Tensor,
    dW: Tensor,
    sda: bool,
    full: bool,
    p: Plan,
) -> Tensor:
    """Fills du [B, N, K] and dW [N, K, J, D]; returns ds and states, as `output_gradients`."""
    (B, N, K), (R, _, J, D) = u.shape, s.shape
    terms = terms_of(R, full)
    x = s.new_empty(max(terms, 2), B, J, D)
    a = s.new_empty((terms + sda) * B * N * J)
    launch(
        on_chip_backward_kernel,
        (B,),
        *(u, W, s, dv, du, a, x, B, N),
        K=K,
        J=J,
        D=D,
        R=R,
        TERMS=terms,
        SCALE=distance_scale(J),
        SDA=sda,
        FULL=full,
        BLOCK_N=padded(N),
        BLOCK_J=padded(J),
        BLOCK_D=padded(D),
        ACC=accumulation_type(u, W),
        num_warps=p.num_warps,
    )
    weight_gradient(u, W, a, x, dW, (0, N), terms, sda)
    return x


def streamed_backward(
    u: Tensor,
    W: Tensor,
    x: Tensor,
    kept: Tensor,
    du: Tensor,
    dW: Tensor,
    s: Tensor,
    sda: bool,
    full: bool,
    p: Plan,
    windows: Windows = None,
) -> None:
    """Fills du [B, N, K] and dW [N, K, J, D], given s [R, B, J, D] and what `output_gradients` made
    of it.

    Of `windows` du is added to a grid: no two of them may have an input capsule in common.
    """
    (R, B, _, _), (N, K, J, D) = s.shape, W.shape
    if kept.dim() > 1:
        kept_input_gradient(u, W, kept, x, du, B, p, windows)
        kept_weight_gradient(u, W, kept, x, dW, B, p, windows)
        return
    if plans.fits_owned(p, K, J, D):
        owned_backward(u, W, x, du, dW, R, sda, full, windows)
        return
    terms = terms_of(R, full)
    step = max(1, min(N, TERMS_BYTES // ((terms + sda) * B * J * x.itemsize)))
    a = x.new_empty((terms + sda) * B * step * J)
    p = plans.vector_plan(B, N, J, D, x.itemsize, x.device) if p.dots else p
    block_b, num_warps = plans.backward_tile(p, sda, full)
    multiprocessors = plans.multiprocessors_of(u.device)
    for begin in range(0, N, step):
        end = min(begin + step, N)
        launch(
            streamed_backward_kernel,
            (cdiv(B, block_b), cdiv(end - begin, p.per_slice)),
            *(u, W, x, du, a, B, N, begin, end, p.per_slice, multiprocessors),
            K=K,
            J=J,
            D=D,
            R=R,
            TERMS=terms,
            SCALE=distance_scale(J),
            SDA=sda,
            FULL=full,
            BLOCK_B=block_b,
            BLOCK_J=padded(J),
            BLOCK_D=padded(D),
            ACC=accumulation_type(u, W),
            WINDOWS=windows,
            num_warps=num_warps,
            **plans.backward_registers(num_warps, sda, full),
        )
        weight_gradient(u, W, a, x, dW, (begin, end), terms, sda, windows=windows)


def owned_backward(
    u: Tensor,
    W: Tensor,
    x: Tensor,
    du: Tensor,
    dW: Tensor,
    R: int,
    sda: bool,
    full: bool,
    windows: Windows,
) -> None:
    """Fills du [B, N, K] and dW [N, K, J, D] on tensor cores, couplings being made again."""
    B, (N, K, J, D) = x.shape[1], W.shape
    block_j, block_d = max(padded(J), 8), padded(D)
    warps = max(block_j * block_d // 64, 1)
    tiles = cdiv(B, 16)
    programs = plans.OWNED_PROGRAMS * plans.multiprocessors_of(u.device)
    tiles_of_part = cdiv(tiles, max(1, programs // N))
    parts = cdiv(tiles, tiles_of_part)
    sums = dW if parts == 1 else x.new_empty(parts, *W.shape)
    precision = split_precision(u, W)
    launch(
        owned_backward_kernel,
        (N, parts),
        *(u, W, x, du, sums, B, N, 16 * tiles_of_part),
        K=K,
        J=J,
        D=D,
        R=R,
        SCALE=distance_scale(J),
        SDA=sda,
        FULL=full,
        PRECISION=precision,
        # d(vote) is in float32 whatever u and W are
        PRECISION_G="rounded" if precision == "exact" else precision,
        WARPS=warps,
        BLOCK_K=max(padded(K), LEAST_K),
        BLOCK_J=block_j,
        BLOCK_D=block_d,
        ACC=accumulation_type(u, W),
        WINDOWS=windows,
        num_warps=warps,
        num_stages=1,
    )
    if parts > 1:
        dW.copy_(sums.sum(0))


def backward_plan(p: Plan, B: int, W: Tensor, s: Tensor) -> Plan:
    """The plan p if it has tensor cores, else the static one, for couplings that lie for them."""
    N, K, J, D = W.shape
    return p if p.dots else plans.dot_plan(B, N, J, D, s.device)


def kept_options(u: Tensor, W: Tensor, c: Tensor, p: Plan, windows: Windows) -> dict[str, Any]:
    """Launch options of du and dW on tensor cores, from couplings c `in_tiles`."""
    _, K, J, D = W.shape
    precision = split_precision(u, W)
    return dict(
        K=K,
        J=J,
        D=D,
        WARPS=p.num_warps,
        BLOCK_K=max(padded(K), 8),
        BLOCK_J=c.shape[2],
        BLOCK_D=padded(D),
        ACC=accumulation_type(u, W),
        WINDOWS=windows,
        # c ds is in float32 whatever u and W are
        PRECISION="rounded" if precision == "exact" else precision,
        num_warps=p.num_warps,
        num_stages=1,
        enable_fp_fusion=False,  # fused, c ds - high needs an instruction more to negate `high`
    )


def kept_input_gradient(
    u: Tensor, W: Tensor, c: Tensor, x: Tensor, du: Tensor, B: int, p: Plan, windows: Windows
) -> None:
    """Fills du [B, N, K] from kept couplings."""
    N, K, J, D = W.shape
    if c.dim() == 4:
        p = backward_plan(p, B, W, x)
        launch(
            kept_backward_dots_kernel,
            (cdiv(B, p.block_b), cdiv(N, p.per_slice)),
            *(W, c, x[0], du, B, N, p.per_slice, plans.multiprocessors_of(u.device)),
            BLOCK_B=p.block_b,
            **kept_options(u, W, c, p, windows),
        )
        return
    # a warp's sums for every k take 64 registers of each thread; each has an output capsule
    warps = min(padded(J), 2)
    block_b = max(1, min(8192 // (padded(K) * padded(D) * x.itemsize), padded(B)))
    launch(
        kept_backward_kernel,
        (cdiv(B, block_b) * N,),
        *(W, c, x[1], du, B, N),
        K=K,
        J=J,
        D=D,
        BLOCK_B=block_b,
        BLOCK_J=warps,
        BLOCK_D=padded(D),
        ACC=accumulation_type(u, W),
        WINDOWS=windows,
        num_warps=warps,
    )


def kept_weight_gradient(
    u: Tensor, W: Tensor, c: Tensor, x: Tensor, dW: Tensor, B: int, p: Plan, windows: Windows
) -> None:
    """Fills dW [N, K, J, D] from kept couplings."""
    N, K = W.shape[:2]
    if c.dim() == 3:
        weight_gradient(u, W, c, x, dW, (0, N), 1, False, True, windows=windows)
        return
    p = backward_plan(p, B, W, x)
    # input capsules of a program, whose sums fit registers
    together = 3 if K <= 8 and p.num_warps <= 4 else 2 if K <= 16 else 1
    launch(
        kept_weight_gradient_kernel,
        (cdiv(N, together),),
        *(u, c, x[1], dW, B, N),
        TOGETHER=together,
        **kept_options(u, W, c, p, windows),
    )


def output_gradients(
    dv: Tensor,
    u: Tensor,
    W: Tensor,
    s: Tensor,
    kept: Tensor,
    sda: bool,
    full: bool,
    p: Plan,
    windows: Windows = None,
) -> Tensor:
    """ds and states x [.., B, J, D] of the streamed form: of all iterations if `full`, else of the
    last; first every ds, then the states.

    If couplings are kept, it is the last ds as [B, J, D] and once more as [J, B, D]; if they are
    `in_tiles`, all sides are padded, and once more is in the order of `transposed_place`.
    Iterations are walked backwards; each but the first needs a pass over the votes for d(state).
    """
    (R, B, J, D), N = s.shape, len(W)
    tiled = kept.dim() == 4
    rows, block_j = (16 * kept.shape[1], kept.shape[2]) if tiled else (B, padded(J))
    sides = (rows, block_j, padded(D)) if tiled else (B, J, D)
    x = s.new_empty(max(terms_of(R, full), 2), *sides)
    kernel, options = sum_kernel(p, u, W, sda, full, windows)
    slices, multiprocessors = cdiv(N, p.per_slice), plans.multiprocessors_of(u.device)
    partial = s.new_empty(slices, B, J, D) if full and R > 1 else x
    dV = torch.empty_like(s[0])
    for r in reversed(range(R)):
        ds, V = (x[r], x[R + r - 1 if r else 0]) if full else (x[0], x[1])
        launch(
            output_gradient_kernel,
            (rows,),
            *(dv, partial, dV, s, ds, V, slices, B, r),
            LAST=r == R - 1,
            UNIFORM=r == 0,
            ADD=r < R - 2 and not sda,
            KEPT=kept.dim() > 1,
            WARPS=backward_plan(p, B, W, s).num_warps if tiled else None,
            J=J,
            D=D,
            SDA=sda,
            BLOCK_S=max(1, 16384 // (padded(J) * padded(D))),
            BLOCK_J=block_j,
            BLOCK_D=padded(D),
            ACC=accumulation_type(u, W),
            num_warps=8,
        )
        if not full or r == 0:
            break
        launch(
            kernel,
            (cdiv(B, p.block_b), slices),
            *(u, W, V, ds, ds, partial, B, N, p.per_slice, multiprocessors),
            UNIFORM=False,
            GRADIENT=True,
            KEEP=False,
            FRAGMENTS=False,
            **options,
        )
    return x
