"""Layers, inputs and comparisons for the tests of momentum stacks."""

import copy

import torch
from torch import nn

from mocapsnet import CapsuleLayer, MomentumStack


def layers(count, dtype=torch.float64, capsules=4, dim=3, seed=0):
    torch.manual_seed(seed)
    return [
        CapsuleLayer(capsules, dim, capsules, dim, sum_length=2.0).to(dtype) for _ in range(count)
    ]


def capsules(dtype=torch.float64, seed=1):
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(stack, x, g, v=None):
    x = x.clone().requires_grad_()
    v = None if v is None else v.clone().requires_grad_()
    stack.zero_grad()
    y = stack(x, v)
    y.backward(g)
    grads = [p.grad for p in stack.parameters()]
    return [y.detach(), x.grad, *grads] + ([] if v is None else [v.grad])


class Branch(nn.Module):
    """A layer of a residual network, with dropout if wanted."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(torch.tanh(self.linear(x)))


class Attention(nn.Module):
    """Reads a context [B, M, dim], or x itself; `options` holds a mask and a bias added to x."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, dropout=dropout, batch_first=True)

    def forward(self, x, context=None, *, options=None):
        options = {} if options is None else options
        x = x + options.get("position", 0)
        context = x if context is None else context
        mask = options.get("mask")
        return self.attention(x, context, context, attn_mask=mask, need_weights=False)[0]


def run(stack, x, g, args, kwargs):
    """Output, gradients of x, of the parameters and of (args, kwargs), and the next random number,
    from a fixed seed."""

    def leaf(t):
        t = t.detach().clone()
        return t.requires_grad_() if t.is_floating_point() else t

    x = leaf(x)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, leaf, (args, kwargs))
    stack.zero_grad()
    torch.manual_seed(7)
    y = stack(x, None, *args, **kwargs)
    following = torch.rand(1)
    y.backward(g)
    given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)]
    given = [t.grad for t in given if t.is_floating_point()]
    return [y.detach(), following, x.grad, *given, *(p.grad for p in stack.parameters())]


def agree(layers, x, *args, gamma=0.9, **kwargs):
    """Reversible and stored gradients are the same to 1e-9 in float64, twice in a row."""
    layers = [layer.double() for layer in layers]
    x = x.double()
    g = torch.randn(x.shape, dtype=x.dtype)
    stored = MomentumStack(copy.deepcopy(layers), gamma=gamma, memory="stored")
    reversible = MomentumStack(layers, gamma=gamma)
    want = run(stored, x, g, args, kwargs)
    assert all(t is not None for t in want)
    for _ in range(2):  # the second forward skips the look for skip connections
        for x_, y in zip(run(reversible, x, g, args, kwargs), want, strict=True):
            assert (x_ - y).norm() <= 1e-9 * y.norm() + 1e-14
