"""Stacks of residual layers: plain, and reversible with momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ResidualStack(nn.Module):
    """x <- x + layer(x), layer after layer.

    Args:
        layers: modules that map a tensor to one of the same shape.
    Source: Gugglberger et al. 2021; equation 2 of the Momentum Capsule Networks paper.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class MomentumStack(nn.Module):
    """v <- gamma v + (1 - gamma) layer(x);  x <- x + v, layer after layer; invertible.

    With `memory="reversible"` forward keeps no activations: backward reconstructs every layer's
    input from the final x and v, then differentiates that layer alone. Dividing by gamma
    multiplies rounding errors by 1 / gamma per layer, so x and v are float32 or wider whatever the
    input's dtype, and anchors, a stored (x, v) every `anchor_every` layers, bound the error at any
    depth. Layers must be deterministic functions of their input and parameters: dropout in
    training mode would differ between forward and reconstruction.

    Args:
        layers: modules that map a tensor to one of the same shape.
        gamma: momentum, between 0 and 1, both excluded.
        memory: "reversible", or "stored" where autograd keeps all activations; the gradients are
            the same up to rounding.
        anchor_every: layers between anchors, or None: as many as amplify an error at most 64
            times, log(64) / log(1 / gamma), which is 39 for gamma = 0.9.
        velocity: "network", one v through all layers, as in the paper's Algorithm 1; "block", v
            is set to zero after every `block_layers` layers, as in the published code.
        block_layers: layers per block, for velocity "block".
    Shapes: x [...] -> x [...]; float32 or wider.
    Raises: ValueError if an option is out of range; RuntimeError on double backward.
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
        self.anchor_every = anchor_every or max(1, int(math.log(64) / -math.log(gamma)))
        self.velocity = velocity
        self.block_layers = block_layers

    def forward(self, x: Tensor, v: Tensor | None = None) -> Tensor:
        """Maps x to x; `v` is the initial velocity, zero if None."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        v = torch.zeros_like(x) if v is None else v.to(dtype)
        if self.memory == "reversible" and torch.is_grad_enabled() and len(self.layers) > 0:
            parameters = [p for p in self.layers.parameters() if p.requires_grad]
            return _Reversible.apply(x, v, self, parameters, *parameters)
        for n in range(len(self.layers)):
            x, v = self.step(n, x, v)
        return x

    def step(self, n: int, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Layer n of Algorithm 1."""
        f = self.layers[n](x)
        v = (1 - self.gamma) * f if self.resets(n) else self.gamma * v + (1 - self.gamma) * f
        return x + v, v

    def resets(self, n: int) -> bool:
        """Whether v is set to zero before layer n; the first block keeps the initial velocity."""
        return self.velocity == "block" and n > 0 and n % self.block_layers == 0

    def anchored(self, n: int) -> bool:
        """Whether forward stores (x, v) after layer n."""
        end = n + 1 == len(self.layers)
        return end or (n + 1) % self.anchor_every == 0 or self.resets(n + 1)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, memory={self.memory!r}, velocity={self.velocity!r}"


class _Reversible(torch.autograd.Function):
    """The whole stack as one node of the graph; parameter gradients are returned, in order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, stack: MomentumStack, parameters: list[Tensor], *_: Tensor
    ) -> Tensor:
        ctx.stack = stack
        ctx.parameters = parameters
        anchors = []
        for n in range(len(stack.layers)):
            x, v = stack.step(n, x, v)
            if stack.anchored(n):
                anchors += [x, v]
        ctx.save_for_backward(*anchors)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        stack, gamma = ctx.stack, ctx.stack.gamma
        anchors = list(ctx.saved_tensors)
        gradients: dict[Tensor, Tensor] = {}
        grad_v = torch.zeros_like(grad_x)
        for n in reversed(range(len(stack.layers))):
            if stack.anchored(n):
                v, x = anchors.pop(), anchors.pop()
            layer = stack.layers[n]
            with torch.enable_grad():
                x = (x - v).detach().requires_grad_()
                f = layer(x)
            grad_v = grad_v + grad_x
            inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(f, inputs, (1 - gamma) * grad_v, allow_unused=True)
            for parameter, grad in zip(inputs[1:], grads[1:], strict=True):
                if grad is not None:
                    so_far = gradients.get(parameter)
                    gradients[parameter] = grad if so_far is None else so_far + grad
            x = x.detach()
            if not stack.resets(n):
                v = (v - (1 - gamma) * f.detach()) / gamma
            grad_x = grad_x if grads[0] is None else grad_x + grads[0]
            grad_v = torch.zeros_like(grad_v) if stack.resets(n) else gamma * grad_v
        return grad_x, grad_v, None, None, *(gradients.get(p) for p in ctx.parameters)
