"""A capsule layer whose output capsules see a window of the grid: convolutional capsules."""

from __future__ import annotations

from torch import Tensor

from .kernels import checks, conv_routing
from .layers import RoutingLayer

Pair = int | tuple[int, int]


class ConvCapsuleLayer(RoutingLayer):
    """A convolutional capsule layer with dynamic routing.

    At every place of the output grid, the kh kw N capsules of a window of the input are routed to J
    capsules, by transformation matrices that all places share. Windows may reach over the edge of
    the grid; nothing there casts a vote.

    Initial weights are drawn as by `CapsuleLayer`: votes of matrices that were drawn independently
    add up to a mean square of as many votes as there are, so `weight_std` holds with kh kw N in the
    place of N. However alike neighbouring capsules are, no matrix is used twice in a window. At
    the edge of a padded grid windows hold fewer capsules: of 3x3 windows, 6 of 9 places at a side
    and 4 at a corner, so that sums there are shorter by sqrt(6 / 9) = 0.82 and 0.67. With `grid`
    the mean over the output places of the number of votes stands for kh kw N, and the root mean
    square length over the grid is what was asked for; without, that of places inside is. (An 8x8
    grid has 7.6 of 9 votes on average, a 4x4 grid 6.3.)

    Args:
        in_capsules: N, in_dim: K, out_capsules: J, out_dim: D.
        kernel_size, stride: height and width of the window and of its steps, or one for both.
        padding: places added around the grid, or "same", (kernel_size - 1) / 2 for odd windows,
            which keeps the grid with stride 1 and otherwise divides it, rounded up.
        iterations, method, routing_grad, backend: see `mocapsnet.kernels.conv_routing`.
        bias: adds a learned vector [J, D] to the weighted sums, zero at the start.
        init, in_length, sum_length: see `CapsuleLayer`.
        grid: height and width of the inputs that the lengths are meant for; None for large ones.
    Shapes: capsules [B, H, Wd, N, K] -> [B, H', Wd', J, D]; `weight` is [kh, kw, N, K, J, D].
    Raises: ValueError if a size or a length is not positive, or an option is unknown.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | str = "same",
        iterations: int = 3,
        method: str = "rba",
        routing_grad: str = "final",
        bias: bool = False,
        init: str = "length",
        in_length: float = 0.5,
        sum_length: float = 0.5,
        grid: tuple[int, int] | None = None,
        backend: str | None = None,
    ):
        window = checks.pair("kernel_size", kernel_size, 1)
        steps = checks.pair("stride", stride, 1)
        if padding == "same":
            if any(k % 2 == 0 for k in window):
                raise ValueError(
                    f"padding='same' needs an odd kernel_size; got {kernel_size}: give padding in "
                    "places, for example 0"
                )
            around = (window[0] // 2, window[1] // 2)
        else:
            around = checks.pair("padding", padding, 0)
        votes = float(in_capsules)
        for axis in (0, 1):
            size = None if grid is None else grid[axis]
            votes *= mean_taps(size, window[axis], steps[axis], around[axis])
        super().__init__(
            (*window, in_capsules, in_dim, out_capsules, out_dim),
            votes,
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=bias,
            init=init,
            in_length=in_length,
            sum_length=sum_length,
            backend=backend,
        )
        self.stride = steps
        self.padding = around

    def forward(self, u: Tensor) -> Tensor:
        return conv_routing(
            u,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            iterations=self.iterations,
            method=self.method,
            routing_grad=self.routing_grad,
            bias=self.bias,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        kh, kw, N, K, J, D = self.weight.shape
        return (
            f"{N} x {K} -> {J} x {D}, kernel_size={(kh, kw)}, stride={self.stride}, "
            f"padding={self.padding}, iterations={self.iterations}, method={self.method!r}, "
            f"routing_grad={self.routing_grad!r}"
        )


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Places of the output along an axis of `size` places; below 1 if a window does not fit."""
    return (size + 2 * padding - kernel) // stride + 1


def mean_taps(size: int | None, kernel: int, stride: int, padding: int) -> float:
    """How many of a window's places lie within the grid, along one axis, on average.

    Raises: ValueError if no window fits in.
    """
    if size is None:
        return kernel
    count = output_size(size, kernel, stride, padding)
    if size < 1 or count < 1:
        raise ValueError(
            f"a grid of {size} places with padding={padding} is smaller than a window of {kernel}"
        )
    starts = [n * stride - padding for n in range(count)]
    return sum(max(0, min(s + kernel, size) - max(s, 0)) for s in starts) / count
