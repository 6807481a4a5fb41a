"""Stacks of residual layers: plain, and reversible with momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .depth import HIDDEN_LENGTH, capsule_layers
from .kernels import momentum_routing
from .kernels.momentum.schedule import Schedule, schedule
from .layers import CapsuleLayer
from .recompute import reversible, step
from .residual_checks import branch, checked_output, known, patched

if TYPE_CHECKING:
    from typing_extensions import Self


class CapsuleStack(nn.Module):
    """What residual stacks have in common: layers, and how to make capsule layers for them."""

    layers: nn.ModuleList

    def stream_weights(self, n: int) -> list[float]:
        """Weights of the outputs of the first n layers in the x that they make."""
        raise NotImplementedError

    @classmethod
    def of_capsules(
        cls,
        layers: int,
        capsules: int,
        dim: int,
        *,
        in_length: float = HIDDEN_LENGTH,
        kernel_size: int | tuple[int, int] | None = None,
        layer: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """A stack of capsule layers, drawn for its depth as `MoCapsNet` does.

        All outputs of the layers together start at most as long as what enters the stack. Of
        layers drawn one by one, `[CapsuleLayer(32, 8, 32, 8) for _ in range(200)]`, each adds its
        full length: such a stack is chaotic, and in float32 its gradients are noise, 43 % off
        (stored or reversible alike, batch 2), where they are within 1e-6 of float64 for this one.

        Args:
            layers: number of layers; capsules, dim: of each.
            in_length: root mean square length of the capsules that enter, in (0, 1); that of a
                default `CapsuleLayer`'s output unless given.
            kernel_size: of convolutional layers on states [B, H, Wd, capsules, dim] whose grid they
                keep, see `ConvCapsuleLayer`; None for dense layers and [B, capsules, dim].
            layer: options of every layer, as {"method": "sda"} or {"grid": (8, 8)}.
            options: of the stack.
        Raises: ValueError if an option is out of range.
        """
        stack = cls([], **options)
        stack.layers.extend(
            capsule_layers(
                stack.stream_weights, layers, capsules, dim, in_length, kernel_size, **(layer or {})
            )
        )
        return stack


class ResidualStack(CapsuleStack):
    """x <- x + layer(x, *args, **kwargs), layer after layer.

    `ResidualStack.of_capsules` makes one of capsule layers that starts well at any depth.

    Args:
        layers: modules that map a tensor to one of the same shape.
    Raises: ValueError if a layer changes the shape.
    Source: Gugglberger et al. 2021; equation 2 of the Momentum Capsule Networks paper.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def stream_weights(self, n: int) -> list[float]:
        return [1.0] * n

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = x + checked_output(layer(x, *args, **kwargs), x, n, layer)
        return x


class MomentumStack(CapsuleStack):
    """v <- gamma v + (1 - gamma) layer(x);  x <- x + v, layer after layer; invertible.

    With `memory="reversible"` forward keeps no activations: backward reconstructs every layer's
    input from the final x and v, calls the layer again and differentiates it alone. x and v are
    float32 or wider whatever the input's dtype; a layer whose weights are all bfloat16 or float16
    is given x in that dtype. Dividing by gamma multiplies rounding errors;
    anchors, a stored (x, v) every so many layers, bound the error at any depth, see `spacing`.

    Layers may be any modules that return the branch alone, without x added. The second call
    repeats autocast and the random numbers of PyTorch's default generators (dropout); parameters
    and buffers may have been replaced since the first, as `torch.func.functional_call` does, but
    not changed, and neither may training mode and hooks. Numbers, texts and tensors that layers
    have as attributes are those of the first call. A tensor that a layer reads and that needs a
    gradient must be its parameter or an argument of forward. The first forward that records
    gradients calls each layer once more, and so does one where the layer or its arguments are of
    another kind since (a number that was zero, a text, a hook): what does not repeat itself, or has
    a skip connection of its own, is refused. Under the transforms of torch.func, forward-mode
    differentiation, tracing and export, which do not see backward, such layers are called as with
    `memory="stored"`.

    Anchors bound what the reversal adds. Where the layers themselves make a chaotic stack, as 200
    capsule layers do that were each drawn alone, gradients in float32 are noise however they are
    computed; `MomentumStack.of_capsules` makes a stack of capsule layers drawn for its depth.

    Args:
        layers: modules that map a tensor to one of the same shape.
        gamma: momentum, between 0 and 1, both excluded.
        memory: "reversible", or "stored" where autograd keeps all activations; the gradients are
            the same up to rounding.
        anchor_every: layers between anchors, or None: `spacing` chooses.
        velocity: "network", one v through all layers, as in the paper's Algorithm 1; "block", v
            is set to zero after every `block_layers` layers, as in the published code.
        block_layers: layers per block, for velocity "block".
    Shapes: x [...] -> x [...]; float32 or wider.
    Raises: ValueError if an option is out of range or a layer changes the shape. Reversible, with
        gradients: ValueError if a layer changes its buffers or arguments, adds x itself, or returns
        another output when called again, and in backward if its gradient would be lost;
        RuntimeError on double backward, or if parameters, buffers, modes or hooks changed, or
        tensors among the attributes in place, between forward and backward.
    Source: Algorithms 1 and 2 of the Momentum Capsule Networks paper; Sander et al. 2021.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        gamma: float = 0.9,
        memory: str = "reversible",
        anchor_every: int | None = None,
        velocity: str = "network",
        block_layers: int = 2,
    ):
        super().__init__()
        if not 0 < gamma < 1:
            raise ValueError(
                f"gamma must lie between 0 and 1, both excluded; got {gamma}: gamma = 0 cannot be "
                "inverted (use ResidualStack) and gamma = 1 ignores the layers"
            )
        if memory not in ("reversible", "stored"):
            raise ValueError(f"memory must be 'reversible' or 'stored'; got {memory!r}")
        if velocity not in ("network", "block"):
            raise ValueError(f"velocity must be 'network' or 'block'; got {velocity!r}")
        if anchor_every is not None and anchor_every < 1:
            raise ValueError(f"anchor_every must be at least 1, or None; got {anchor_every}")
        if block_layers < 1:
            raise ValueError(f"block_layers must be at least 1; got {block_layers}")
        self.layers = nn.ModuleList(layers)
        self.gamma = gamma
        self.memory = memory
        self.anchor_every = anchor_every
        self.velocity = velocity
        self.block_layers = block_layers
        # layers that bear a second call, and the kinds of calls that were looked at
        self.probed: dict[nn.Module, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, or a pickle: layers that are others, and not yet probed."""
        return self.__dict__ | {"probed": {}}

    def forward(self, x: Tensor, v: Tensor | None = None, /, *args: Any, **kwargs: Any) -> Tensor:
        """Maps x to x; `v` is the initial velocity, zero if None.

        Every layer is called as layer(x, *args, **kwargs). Tensors in them, also within tuples,
        lists and dicts, get their gradient, summed over the layers.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        v = torch.zeros_like(x) if v is None else v.to(dtype)
        if v.shape != x.shape:
            raise ValueError(
                f"v must have the shape of x, {list(x.shape)}; got {list(v.shape)}. A layer's "
                "first extra argument comes after v: stack(x, None, argument)"
            )
        if self.memory == "reversible" and not (args or kwargs):
            alike = self.capsule_layers(x)
            if alike:
                return self.fused(alike, x, v)
        if self.memory == "reversible" and torch.is_grad_enabled() and len(self.layers) > 0:
            run = reversible
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                run = torch.compiler.disable(run)
            return run(self, x, v, args, kwargs)
        return self.stored(x, v, args, kwargs)

    def stored(self, x: Tensor, v: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The plain loop; autograd keeps what it wants to."""
        plan = self.plan(x.dtype)
        for n, layer in enumerate(self.layers):
            x, v = step(plan, n, x, v, branch(n, layer, x, args, kwargs))
        return x

    def capsule_layers(self, x: Tensor) -> list[CapsuleLayer]:
        """The layers, if one fused operation can run them all for this x; else none."""
        layers = [layer for layer in self.layers if isinstance(layer, CapsuleLayer)]
        if not layers or len(layers) < len(self.layers):
            return []
        if patched() or not all(map(known, layers)):
            return []
        first = layers[0]
        fits = (
            all(layer.options == first.options for layer in layers)
            and first.weight.shape == (*x.shape[1:], *x.shape[1:])
            and torch.promote_types(first.weight.dtype, x.dtype) == x.dtype
            and first.backend != "reference"
            and (first.sda_mean, first.sda_scale) == ("input", "paper")
        )
        return layers if fits else []

    def fused(self, layers: list[CapsuleLayer], x: Tensor, v: Tensor) -> Tensor:
        """The whole stack by `momentum_routing`."""
        first = layers[0]
        return momentum_routing(
            x,
            v,
            [layer.weight for layer in layers],
            gamma=self.gamma,
            anchor_every=self.spacing(x.dtype),
            block_layers=self.block_layers if self.velocity == "block" else 0,
            iterations=first.iterations,
            method=first.method,
            routing_grad=first.routing_grad,
            biases=[layer.bias for layer in layers if layer.bias is not None],
            backend=first.backend,
        )

    def stream_weights(self, n: int) -> list[float]:
        """A layer's output reaches x with weight 1 - gamma^k, k steps later.

        With velocity "block" the weight stops growing at the end of its block.
        """
        block = self.block_layers if self.velocity == "block" else max(n, 1)
        ends = [min(n, m - m % block + block) for m in range(n)]
        return [1 - self.gamma ** (end - m) for m, end in enumerate(ends)]

    def plan(self, dtype: torch.dtype) -> Schedule:
        """gamma, anchors and restarts of the velocity, for an x of this dtype."""
        block = self.block_layers if self.velocity == "block" else 0
        return schedule(len(self.layers), self.gamma, self.spacing(dtype), block)

    def spacing(self, dtype: torch.dtype) -> int:
        """Layers between anchors for an x of this dtype: `anchor_every`, or what bounds the error.

        Going back a layer, an error of v is divided by gamma, and what it does to x comes back
        through the layer: for layers that stretch differences by at most 1 (Lipschitz constant),
        errors grow by up to (1 + (1 - gamma)) / gamma. So the spacing is the largest n with
        eps(dtype) ((2 - gamma) / gamma)^n <= target, the relative error of a reconstructed state.
        float32: target 2^-17 = 7.6e-6, amplification 64. float64 is chosen for exact gradients:
        target 2^-40 = 9.1e-13, amplification 4096, which leaves a factor of 1000 before gradients
        are off by 1e-9. `mocapsnet benchmark reversal` measures what comes of it.

        gamma      0.5   0.9   0.99
        float32      3    20    207
        float64      7    41    415
        """
        if self.anchor_every is not None:
            return self.anchor_every
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        target = 2**-17 if eps > 2**-40 else 2**-40
        growth = (2 - self.gamma) / self.gamma
        return max(1, int(math.log2(target / eps) / math.log2(growth)))

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, memory={self.memory!r}, velocity={self.velocity!r}"
