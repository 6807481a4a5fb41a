"""Convolutions of large kernels on a CPU by few multiplications: products of Fourier coefficients.

A convolution of stride s is a sum of s*s convolutions of stride 1, one for every phase of rows and
columns: with x_pq[i, j] = x[s i + p, s j + q], and the taps of the kernel parted alike,

    y[o] = sum over p, q, c of x_pq[c] * w_pq[o, c]          (* is cross-correlation, valid part)

With m outputs and k taps a side, n = m + k - 1 points of x matter, and nothing that wraps round in
a discrete Fourier transform of length n reaches an output. So y = Y'((X x) . (Q w)), where X, Q and
Y are fixed matrices, ' is the transpose, and . is a product at every frequency, a matrix product
over channels. A real signal has one coefficient for each pair of opposite frequencies; the product
of two, a + bi and c + di, is three real ones, c (a + b), a (d - c) and b (c + d), whose sums belong
to X, Q and Y. All told R, about 1.5 n^2, real products replace m^2 k^2: for the paper's second
convolution on MNIST (m 6, k 5 or 4, n 10) 148 for each phase, in place of 729 on average.

Both gradients have the same form: dx = X'((Q w) . (Y g)) and dw = Q'((X x) . (Y g)).

Source: Mathieu, Henaff and LeCun 2014, "Fast Training of Convolutional Networks through FFTs"; the
    form in three matrices is that of Winograd 1980, "Arithmetic Complexity of Computations".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .kernels.launch import cdiv

WORKSPACE = 2**25
"""Bytes of coefficients of images and kernels held at a time: what a last-level cache holds."""

ADVANTAGE = 2.0
"""How many times fewer multiplications there must be. Forward and backward on a core with AVX-512
took, at 2 times fewer, 0.7 to 1.1 times as long as PyTorch's convolution; at 3 times, half."""

POINTS = 1024
"""Of a larger transform the matrices alone would cost too much."""


@dataclass(frozen=True)
class Axis:
    """A side of the images: what a convolution of `taps` taps and a stride does along it."""

    size: int
    taps: int
    stride: int

    @property
    def outputs(self) -> int:
        return (self.size - self.taps) // self.stride + 1

    @property
    def points(self) -> int:
        """Length of the transform of one phase."""
        return self.outputs + cdiv(self.taps, self.stride) - 1

    def taps_of(self, phase: int) -> int:
        return cdiv(self.taps - phase, self.stride)

    def points_of(self, phase: int) -> int:
        """Points of this phase that reach an output."""
        return self.outputs + self.taps_of(phase) - 1


@lru_cache(64)
def frequencies(rows: int, columns: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Those of a real signal of two dimensions: with real coefficients, and with complex ones."""
    real, pairs = [], []
    for f in range(rows):
        for g in range(columns):
            opposite = (-f % rows, -g % columns)
            if opposite == (f, g):
                real.append((f, g))
            elif (f, g) < opposite:
                pairs.append((f, g))
    return real, pairs


@lru_cache(64)
def matrices(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """X, Q and Y [R, rows, columns] for signals of so many points, R real products."""
    with torch.inference_mode(False), torch.no_grad():  # kept: calls of any mode will use them
        i = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None]
        j = torch.arange(columns, dtype=torch.float64, device="cpu")
        x, q, y = [], [], []
        real, pairs = frequencies(rows, columns)
        for f, g in real:
            c = torch.cos(2 * math.pi * (f * i / rows + g * j / columns))
            x.append(c)
            q.append(c)
            y.append(c / (rows * columns))
        for f, g in pairs:
            angle = 2 * math.pi * (f * i / rows + g * j / columns)
            c, s = torch.cos(angle), torch.sin(angle)
            # a + bi = c - si for x; c + di = c + si, the conjugate, for w: a correlation
            x += [c - s, c, -s]
            q += [c, s - c, c + s]
            # of c(a+b), a(d-c), b(c+d): real part first less third, imaginary first plus second
            y += [2 * t / (rows * columns) for t in (c - s, -s, -c)]
        X, Q, Y = (torch.stack(rows_of).to(dtype) for rows_of in (x, q, y))
        return X, Q, Y


@dataclass(frozen=True)
class Shape:
    """One convolution without padding: images [B, C, ...], kernels [O, C, ...]."""

    B: int
    C: int
    O: int  # noqa: E741
    height: Axis
    width: Axis

    @classmethod
    def of(cls, images: torch.Size, kernels: torch.Size, stride: tuple[int, ...]) -> Shape:
        sides = zip(images[2:], kernels[2:], stride, strict=True)
        height, width = (Axis(*side) for side in sides)
        return cls(images[0], kernels[1], kernels[0], height, width)

    @property
    def outputs(self) -> int:
        return self.height.outputs * self.width.outputs

    @property
    def products(self) -> int:
        """R, the real products of a phase."""
        real, pairs = frequencies(self.height.points, self.width.points)
        return len(real) + 3 * len(pairs)

    def pays(self) -> bool:
        """Whether there are so many fewer multiplications, those of the three matrices counted."""
        if min(self.B, self.C, self.O, self.outputs, self.height.outputs) < 1:
            return False
        h, w = self.height, self.width
        if h.points * w.points > POINTS:
            return False
        phases = h.stride * w.stride
        taps = cdiv(h.taps, h.stride) * cdiv(w.taps, w.stride)
        each = self.B * self.O + self.B * h.points * w.points + self.O * taps
        few = self.products * (phases * self.C * each + self.B * self.O * self.outputs)
        return ADVANTAGE * few <= self.B * self.C * self.O * self.outputs * h.taps * w.taps

    def parts(self, itemsize: int) -> Iterator[Part]:
        """Phase by phase, as many channels at a time as WORKSPACE holds."""
        channels = max(1, WORKSPACE // (self.products * (self.B + self.O) * itemsize))
        channels = cdiv(self.C, cdiv(self.C, channels))
        for p in range(min(self.height.stride, self.height.taps)):
            for q in range(min(self.width.stride, self.width.taps)):
                for c in range(0, self.C, channels):
                    yield Part(self, p, q, slice(c, min(c + channels, self.C)))

    def output_matrix(self, dtype: torch.dtype) -> Tensor:
        """Y [R, outputs]."""
        y = matrices(self.height.points, self.width.points, dtype)[2]
        return y[:, : self.height.outputs, : self.width.outputs].flatten(1)

    def gradient_coefficients(self, g: Tensor) -> Tensor:
        """Y g [R, B, O] of a gradient [B, O, ...]."""
        flat = g.permute(2, 3, 0, 1).reshape(self.outputs, -1)
        return (self.output_matrix(g.dtype) @ flat).view(-1, self.B, self.O)


@dataclass(frozen=True)
class Part:
    """Some channels of one phase."""

    shape: Shape
    p: int
    q: int
    channels: slice

    @property
    def points(self) -> tuple[int, int]:
        return self.shape.height.points_of(self.p), self.shape.width.points_of(self.q)

    @property
    def taps(self) -> tuple[int, int]:
        return self.shape.height.taps_of(self.p), self.shape.width.taps_of(self.q)

    def of_images(self, x: Tensor) -> Tensor:
        """The part of images [B, C, ...], as [B, channels, *points]."""
        s, t = self.shape.height.stride, self.shape.width.stride
        h, w = self.points
        return x[:, self.channels, self.p :: s, self.q :: t][:, :, :h, :w]

    def of_kernels(self, w: Tensor) -> Tensor:
        """The part of kernels [O, C, ...], as [O, channels, *taps]."""
        s, t = self.shape.height.stride, self.shape.width.stride
        return w[:, self.channels, self.p :: s, self.q :: t]

    def matrix(self, which: int, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        whole = matrices(self.shape.height.points, self.shape.width.points, dtype)[which]
        return whole[:, : sides[0], : sides[1]].flatten(1)

    def image_coefficients(self, x: Tensor) -> Tensor:
        """X x [R, B, channels]."""
        some = self.of_images(x)
        flat = some.permute(2, 3, 0, 1).reshape(math.prod(self.points), -1)
        return (self.matrix(0, self.points, x.dtype) @ flat).view(-1, *some.shape[:2])

    def kernel_coefficients(self, w: Tensor) -> Tensor:
        """Q w [R, O, channels]."""
        some = self.of_kernels(w)
        flat = some.permute(2, 3, 0, 1).reshape(math.prod(self.taps), -1)
        return (self.matrix(1, self.taps, w.dtype) @ flat).view(-1, *some.shape[:2])

    def images(self, coefficients: Tensor) -> Tensor:
        """X' of coefficients [R, B, channels], as [B, channels, *points]."""
        flat = self.matrix(0, self.points, coefficients.dtype).t() @ coefficients.flatten(1)
        return flat.view(*self.points, *coefficients.shape[1:]).permute(2, 3, 0, 1)

    def kernels(self, coefficients: Tensor) -> Tensor:
        """Q' of coefficients [R, O, channels], as [O, channels, *taps]."""
        flat = self.matrix(1, self.taps, coefficients.dtype).t() @ coefficients.flatten(1)
        return flat.view(*self.taps, *coefficients.shape[1:]).permute(2, 3, 0, 1)


def correlate(x: Tensor, w: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The convolution [B, O, ...], channels last; parts are added up in float32 at least."""
    shape = Shape.of(x.shape, w.shape, stride)
    total: Tensor | None = None
    for part in shape.parts(x.element_size()):
        products = torch.bmm(
            part.image_coefficients(x), part.kernel_coefficients(w).transpose(1, 2)
        )
        if total is None:
            total = products.to(torch.promote_types(x.dtype, torch.float32))
        else:
            total += products
    assert total is not None
    flat = shape.output_matrix(total.dtype).t() @ total.flatten(1)
    y = flat.view(shape.height.outputs, shape.width.outputs, shape.B, -1).permute(2, 3, 0, 1)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def correlate_input(g: Tensor, w: Tensor, stride: tuple[int, ...], size: torch.Size) -> Tensor:
    """The gradient in images of this size, channels last."""
    shape = Shape.of(size, w.shape, stride)
    coefficients = shape.gradient_coefficients(g)
    dx = g.new_zeros(shape.B, *size[2:], shape.C).permute(0, 3, 1, 2)
    for part in shape.parts(g.element_size()):
        products = torch.bmm(coefficients, part.kernel_coefficients(w))
        part.of_images(dx).copy_(part.images(products))
    return dx


def correlate_weight(g: Tensor, x: Tensor, stride: tuple[int, ...], size: torch.Size) -> Tensor:
    """The gradient in kernels of this size."""
    shape = Shape.of(x.shape, size, stride)
    coefficients = shape.gradient_coefficients(g)
    O, C, h, w = size  # noqa: E741
    dw = g.new_empty(h, w, O, C).permute(2, 3, 0, 1)  # as products have it; transposed once
    for part in shape.parts(g.element_size()):
        products = torch.bmm(coefficients.transpose(1, 2), part.image_coefficients(x))
        part.of_kernels(dw).copy_(part.kernels(products))
    return dw.reshape(O * C, h * w).contiguous().view(size)
