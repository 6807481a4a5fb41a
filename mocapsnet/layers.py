"""Capsule layers: one parameter, or none, and one call of a fused operation each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .kernels import checks, primary_capsules, routing, squash
from .kernels.checks import capsules_and_weight, routing_options
from .kernels.launch import full_precision
from .kernels.routing.reference import rounds


class PrimaryCapsules(nn.Module):
    """Groups the values of a feature map into squashed capsules.

    Args:
        dim: components per capsule.
        grouping: "channels", a capsule is `dim` neighbouring channels at one position; "pixels",
            `dim` values that follow each other in a feature map [C, H, Wd], mostly neighbouring
            pixels of one channel, as in the published code of Momentum Capsule Networks.
        backend: see `mocapsnet.kernels.primary_capsules`.
    Shapes: feature maps [B, C, H, Wd] -> capsules [B, C * H * Wd // dim, dim].
    Raises: ValueError if an option is unknown, or the values cannot be grouped by `dim`.
    """

    def __init__(self, dim: int, *, grouping: str = "channels", backend: str | None = None):
        super().__init__()
        checks.choice("grouping", grouping, ("channels", "pixels"))
        self.dim = dim
        self.grouping = grouping
        self.backend = backend

    def forward(self, features: Tensor) -> Tensor:
        if self.grouping == "channels":
            return primary_capsules(features, self.dim, backend=self.backend)
        checks.tensor("features", features, "B C H Wd")
        size = features.shape[1:].numel()
        if self.dim < 1 or size % self.dim:
            raise ValueError(
                f"the {size} values of a feature map {list(features.shape[1:])} "
                f"cannot be grouped into capsules of dim={self.dim}"
            )
        grouped = features.reshape(features.shape[0], size // self.dim, self.dim)
        return squash(grouped, backend=self.backend)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grouping={self.grouping!r}"


class RoutingLayer(nn.Module):
    """What capsule layers have in common: a weight, a bias perhaps, and how routing is done.

    Args:
        shape: of the weight [..., N, K, J, D].
        votes: that an output capsule gets, for `init="length"`.
        others: as for `CapsuleLayer`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        votes: float,
        *,
        iterations: int,
        method: str,
        routing_grad: str,
        bias: bool,
        init: str,
        in_length: float,
        sum_length: float,
        backend: str | None,
        sda_mean: str = "input",
        sda_scale: str = "paper",
        bias_init: float = 0.0,
    ):
        super().__init__()
        _, K, J, D = sizes = shape[-4:]
        if min(sizes) < 1:
            raise ValueError(
                f"in_capsules, in_dim, out_capsules and out_dim must be positive; got {sizes}"
            )
        routing_options(iterations, method, routing_grad, sda_mean, sda_scale)
        if init not in ("length", "paper"):
            raise ValueError(f"init must be 'length' or 'paper'; got {init!r}")
        if min(in_length, sum_length) <= 0:
            raise ValueError(
                f"in_length and sum_length must be positive; got {in_length} and {sum_length}"
            )
        self.iterations = iterations
        self.method = method
        self.routing_grad = routing_grad
        self.sda_mean = sda_mean
        self.sda_scale = sda_scale
        self.bias_init = bias_init
        self.backend = backend
        self.std = 0.01
        if init == "length":
            rounds = iterations if method == "rba" else 1
            self.std = weight_std((votes, K, J, D), in_length, sum_length, rounds)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(J, D)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init)


class CapsuleLayer(RoutingLayer):
    """A fully connected capsule layer with dynamic routing.

    With `init="length"` the transformation matrices are drawn from a normal distribution whose
    standard deviation makes the root mean square length of the weighted sums s, before squash,
    close to `sum_length` when the input capsules have root mean square length `in_length`; see
    `weight_std`. Layers of a deep residual stack should start the more modestly the more they are,
    as `MomentumStack.of_capsules` makes them. With `init="paper"` the standard deviation is 0.01
    whatever the shape; squash is quadratic near zero, so stacked layers then start with vanishing
    capsules and do not train.

    Args:
        in_capsules: N, in_dim: K, out_capsules: J, out_dim: D.
        iterations, method, routing_grad, sda_mean, sda_scale, backend: see
            `mocapsnet.kernels.routing`.
        bias: adds a learned vector [J, D] to the weighted sums; `bias_init` is the value of all its
            components at the start.
        init: "length" or "paper".
        in_length: expected root mean square length of the input capsules, in (0, 1] as a rule.
        sum_length: wanted root mean square length of the weighted sums.
    Shapes: capsules [B, N, K] -> [B, J, D]; `weight` is [N, K, J, D].
    Raises: ValueError if a size or a length is not positive, or an option is unknown.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        iterations: int = 3,
        method: str = "rba",
        routing_grad: str = "final",
        sda_mean: str = "input",
        sda_scale: str = "paper",
        bias: bool = False,
        bias_init: float = 0.0,
        init: str = "length",
        in_length: float = 0.5,
        sum_length: float = 0.5,
        backend: str | None = None,
    ):
        super().__init__(
            (in_capsules, in_dim, out_capsules, out_dim),
            in_capsules,
            iterations=iterations,
            method=method,
            routing_grad=routing_grad,
            bias=bias,
            init=init,
            in_length=in_length,
            sum_length=sum_length,
            backend=backend,
            sda_mean=sda_mean,
            sda_scale=sda_scale,
            bias_init=bias_init,
        )

    def forward(self, u: Tensor) -> Tensor:
        return routing(
            u,
            self.weight,
            iterations=self.iterations,
            method=self.method,
            routing_grad=self.routing_grad,
            bias=self.bias,
            sda_mean=self.sda_mean,
            sda_scale=self.sda_scale,
            backend=self.backend,
        )

    @torch.no_grad()
    def couplings(self, u: Tensor) -> Tensor:
        """Couplings of every routing iteration [iterations, B, N, J] for capsules u [B, N, K].

        By the reference: all votes [B, N, J, D] are in memory at once.
        """
        capsules_and_weight(u, self.weight)
        dtype = torch.promote_types(u.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        modes = (self.iterations, self.method, self.routing_grad, bias)
        with full_precision(u):
            sda = (self.sda_mean, self.sda_scale)
            steps = rounds(u.to(dtype), self.weight.to(dtype), *modes, *sda)
            return torch.stack([c for c, _ in steps])

    @property
    def options(self) -> tuple[object, ...]:
        """All that layers must have in common to be run by one fused operation."""
        modes = (self.iterations, self.method, self.routing_grad, self.sda_mean, self.sda_scale)
        return (*modes, self.backend, self.weight.shape, self.weight.dtype, self.bias is None)

    def extra_repr(self) -> str:
        N, K, J, D = self.weight.shape
        return (
            f"{N} x {K} -> {J} x {D}, iterations={self.iterations}, method={self.method!r}, "
            f"routing_grad={self.routing_grad!r}"
        )


def squashed(length: float) -> float:
    """Length of a vector after squash."""
    return length**2 / (1 + length**2)


def unsquashed(length: float) -> float:
    """Length, of a vector, that squash makes this one, below 1."""
    return math.sqrt(length / (1 - length))


def weight_std(
    shape: tuple[float, int, int, int], in_length: float, sum_length: float, iterations: int
) -> float:
    """Standard deviation of W [N, K, J, D] that gives weighted sums of length `sum_length`.

    N is the number of votes an output capsule gets, on average where that is not the same for all.
    With equal couplings 1 / J, E|s|^2 = N D (std * in_length / J)^2 =: t^2. Further iterations of
    routing by agreement lengthen s: to first order a coupling grows by (u_hat_ij . V_j) (1 - 1/J)
    / J, which adds to s the covariance of the votes times V, and that is t^2 (J - 1) / D times V.
    So s(r) = t + t^2 (J - 1) / D (|v(1)| + ... + |v(r - 1)|) grows with t, and the t that makes
    s(R) equal to `sum_length` is found by bisection.
    """
    N, _, J, D = shape
    low, high = 0.0, sum_length
    for _ in range(60):
        t = (low + high) / 2
        s, V = t, 0.0
        for _ in range(iterations - 1):
            V += squashed(s)
            s = t + t**2 * (J - 1) / D * V
        low, high = (t, high) if s < sum_length else (low, t)
    return high * J / (in_length * math.sqrt(N * D))
