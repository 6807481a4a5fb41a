"""Capsule networks the way they are published, in plain PyTorch: the baselines to beat."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocapsnet.kernels.squash.reference import squash
from mocapsnet.layers import CapsuleLayer
from mocapsnet.model import CapsNet
from mocapsnet.reversible import ResidualStack

Routing = Callable[[Tensor, Tensor, int], Tensor]


def broadcast_matmul(u: Tensor, W: Tensor, iterations: int = 3) -> Tensor:
    """Votes by a broadcast matrix product, which copies W once per sample. [B, J, D]"""
    W = W.transpose(1, 2).unsqueeze(0).expand(len(u), -1, -1, -1, -1)  # [B, N, J, K, D]
    return route((u[:, :, None, None] @ W).squeeze(3), iterations)


def einsum(u: Tensor, W: Tensor, iterations: int = 3) -> Tensor:
    """Votes by einsum, without the copies. [B, J, D]"""
    return route(torch.einsum("bnk,nkjd->bnjd", u, W), iterations)


def route(u_hat: Tensor, iterations: int) -> Tensor:
    """Procedure 1 of Sabour et al. 2017; the gradient is that of `routing_grad="final"`."""
    votes = u_hat.detach()
    b = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        v = squash((b.softmax(-1).unsqueeze(-1) * votes).sum(1))
        b = b + (votes * v.unsqueeze(1)).sum(-1)
    return squash((b.softmax(-1).unsqueeze(-1) * u_hat).sum(1))


class PublishedCapsuleLayer(nn.Module):
    """`layer` with its own weight, routed by one of the functions above."""

    def __init__(self, layer: CapsuleLayer, routing: Routing):
        super().__init__()
        self.weight = layer.weight
        self.iterations = layer.iterations
        self.routing = routing

    def forward(self, u: Tensor) -> Tensor:
        return self.routing(u, self.weight, self.iterations)


def make_eager(model: CapsNet, routing: Routing) -> None:
    """Lets a model convolve and route in plain PyTorch; parameters and results stay the same."""
    model.convolutions = plain_convolutions(model.convolutions)
    model.primary.backend = "reference"
    layers: Any = getattr(model.stack, "layers", model.stack)
    for name in ("first", "last"):
        setattr(model, name, PublishedCapsuleLayer(getattr(model, name), routing))
    for n, layer in enumerate(layers):
        layers[n] = PublishedCapsuleLayer(layer, routing)


def plain_convolutions(layers: nn.Sequential) -> nn.Sequential:
    """The same layers with the same parameters, each convolution PyTorch's own."""
    return nn.Sequential(*(plain(x) if isinstance(x, nn.Conv2d) else x for x in layers))


def plain(layer: nn.Conv2d) -> nn.Conv2d:
    """PyTorch's layer with the parameters of this one, which does not pad."""
    height, width = layer.kernel_size
    own = nn.Conv2d(layer.in_channels, layer.out_channels, (height, width), device="meta")
    own.stride = layer.stride
    own.weight, own.bias = layer.weight, layer.bias
    return own


class CheckpointedStack(nn.Module):
    """A residual stack that keeps the input of every block of two layers and computes it again."""

    def __init__(self, stack: ResidualStack):
        super().__init__()
        layers = list(stack.layers)
        self.blocks = nn.ModuleList(
            ResidualStack(layers[n : n + 2]) for n in range(0, len(layers), 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x
