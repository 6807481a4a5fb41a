"""Convolutions, and the memory layout and numbers that they compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from .fourier import Shape, correlate, correlate_input, correlate_weight
from .kernels.launch import full_precision
from .kernels.library import BATCHED, observed, plain_only, transformed

PLAIN = {Tensor, nn.Parameter}
"""Classes of tensors that are sure to be their own values, not a share of them on this process."""


def computed_in(weight: Tensor) -> torch.dtype:
    """What a convolution with this weight computes in, under autocast or not."""
    kind = weight.device.type
    if weight.is_meta or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def channels_last(images: Tensor) -> Tensor:
    """Images [B, C, H, W] with the channels of a pixel side by side in memory, which convolutions
    take for a wish that their outputs be so too.

    Tensor cores read them so, processors with instructions for bfloat16, and `conv2d`. PyTorch's
    own convolution in float32 gained nothing on a processor: a training step of the paper's MNIST
    network, 32 images on one thread, took 0.99 to 1.06 times as long, and inference 1.14 times.
    """
    pixels = images.movedim(1, -1)
    if pixels.shape[-1] == 1:  # a single channel lies in either order, and only a copy can tell
        pixels = pixels.clone(memory_format=torch.contiguous_format)
    return pixels.contiguous().movedim(-1, 1)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without, PyTorch emulates it."""
    return torch.cpu._is_avx512_bf16_supported()


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Whether PyTorch's convolution takes the processor's instructions for matrices (AMX).

    It is then the faster one forward, but not backward. Two convolutions of the paper's and ten
    smaller ones, on one core of an Intel Xeon, PyTorch 2.14: forward by Fourier coefficients took
    0.85 to 2.8 times as long, the gradients 0.25 to 0.9 times.
    """
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def seen() -> bool:
    """Whether something is at work that is to see PyTorch's own operations: a compiler, an export,
    a transform of torch.func, forward-mode differentiation, a dispatch mode."""
    return observed() or transformed() or bool(plain_only())


def conv2d(x: Tensor, w: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The convolution of images [B, C, H, Wd] with kernels [O, C, kh, kw], without padding.

    Equal to `torch.nn.functional.conv2d` but for rounding, and as often differentiable.

    Shapes: [B, O, (H - kh) // stride[0] + 1, (Wd - kw) // stride[1] + 1].
    """
    if mapped(x, w):
        return F.conv2d(x, w, stride=stride)
    return _Convolution.apply(x, w, stride)


def input_gradient(g: Tensor, w: Tensor, stride: tuple[int, ...], size: torch.Size) -> Tensor:
    """The gradient of `conv2d` in images of this size [B, C, H, Wd]."""
    if mapped(g, w):
        return conv2d_input(size, w, g, stride)
    return _InputGradient.apply(g, w, stride, size)


def weight_gradient(g: Tensor, x: Tensor, stride: tuple[int, ...], size: torch.Size) -> Tensor:
    """The gradient of `conv2d` in kernels of this size [O, C, kh, kw]."""
    if mapped(g, x):
        return conv2d_weight(x, size, g, stride)
    return _WeightGradient.apply(g, x, stride, size)


def mapped(*tensors: Tensor) -> bool:
    """Whether backward runs for many gradients at once, with `is_grads_batched` or in a vmap."""
    return transformed() or any(torch._C._dispatch_keys(t).has(BATCHED) for t in tensors)


class _Convolution(torch.autograd.Function):
    """Linear in both arguments, so that its gradients and it are each other's derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        with full_precision(x):
            if multiplies_tiles(x.dtype):
                return F.conv2d(x, w, stride=stride)
            return correlate(x, w, stride)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_x, of_w, _ = ctx.needs_input_grad
        dx = input_gradient(g, w, ctx.stride, x.shape) if of_x else None
        dw = weight_gradient(g, x, ctx.stride, w.shape) if of_w else None
        return dx, dw, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, w: Tensor, stride: tuple[int, ...], size: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.stride = stride
        with full_precision(g):
            return correlate_input(g, w, stride, size)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, w = ctx.saved_tensors
        of_g, of_w, *_ = ctx.needs_input_grad
        dg = conv2d(h, w, ctx.stride) if of_g else None
        dw = weight_gradient(g, h, ctx.stride, w.shape) if of_w else None
        return dg, dw, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, stride: tuple[int, ...], size: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.stride = stride
        with full_precision(g):
            return correlate_weight(g, x, stride, size)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, x = ctx.saved_tensors
        of_g, of_x, *_ = ctx.needs_input_grad
        dg = conv2d(x, h, ctx.stride) if of_g else None
        dx = input_gradient(g, h, ctx.stride, x.shape) if of_x else None
        return dg, dx, None, None


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, on a CPU by fewer multiplications where kernels and channels are many.

    There `conv2d` of this file runs instead of PyTorch's, in float32 and bfloat16, if `Shape.pays`
    and not `seen`. The result is the same but for rounding. Arguments, parameters and their names
    are those of `torch.nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.by_fourier(input, input.shape, weight):
            return super()._conv_forward(input, weight, bias)
        dtype = computed_in(weight)
        if weight.dtype != dtype:  # a copy, so one whose phases forward and backward read in rows
            weight = weight.to(dtype, memory_format=torch.channels_last)
        y = conv2d(input.to(dtype), weight, self.stride)
        return y if bias is None else y + bias.to(dtype)[:, None, None]

    def by_fourier(self, like: Tensor, size: torch.Size, w: Tensor) -> bool:
        """Whether images of this size, otherwise like a tensor, are for `conv2d`."""
        if not (like.device.type == w.device.type == "cpu" and {type(like), type(w)} <= PLAIN):
            return False
        if seen():
            return False
        if any(self.padding) or self.dilation != (1, 1) or self.groups != 1:
            return False
        if len(size) != 4 or size[1] != w.shape[1]:
            return False
        if like.dtype != w.dtype and not torch.is_autocast_enabled("cpu"):
            return False
        dtype = computed_in(w)
        if not {like.dtype, w.dtype, dtype} <= {torch.float32, torch.bfloat16}:
            return False
        if dtype == torch.bfloat16 and not multiplies_bfloat16():
            return False
        return Shape.of(size, w.shape, self.stride).pays()
