"""A reversible stack of any layers under functional_call, the transforms of torch.func,
forward-mode differentiation, export and tracing: what a stored stack gives."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mocapsnet import MomentumStack

from .stacks import Branch


class Shifted(Branch):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("shift", torch.zeros(dim))

    def forward(self, x):
        return super().forward(x + self.shift)


torch.manual_seed(0)
LAYERS = [Shifted(6).double() for _ in range(3)]
x, g = torch.randn(2, 2, 6, dtype=torch.float64)
weights = {
    f"layers.{n}.{name}": 1.1 * p.detach() + 0.1
    for n, layer in enumerate(LAYERS)
    for name, p in (*layer.named_parameters(), *layer.named_buffers())
}


def call(stack, tensors=weights, x=x):
    return functional_call(stack, tensors, (x,))


def other_tensors(stack):
    """Leaves, that stand in the layers during forward only."""
    leaves = {k: w.clone().requires_grad_("shift" not in k) for k, w in weights.items()}
    y = call(stack, leaves)
    return [y, *torch.autograd.grad(y, [w for w in leaves.values() if w.requires_grad], g)]


def computed_tensors(stack):
    """As in meta-learning: weights that are functions of others."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    y = call(stack, {k: w * scale if "shift" not in k else w for k, w in weights.items()})
    return torch.autograd.grad(y, scale, g)


def gradients_of_samples(stack):
    def loss(weights, x):
        return call(stack, weights, x[None]).square().sum()

    return list(vmap(grad(loss), in_dims=(None, 0))(weights, x).values())


def batched_gradients(stack):
    root = x.clone().requires_grad_()
    inputs = [root, *stack.parameters()]
    return torch.autograd.grad(stack(root), inputs, torch.stack([g, 2 * g]), is_grads_batched=True)


def tangent(stack):
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(stack(forward_ad.make_dual(x, g))).tangent]


WAYS = {
    "functional_call": other_tensors,
    "functional_call, computed": computed_tensors,
    "grad": lambda s: list(grad(lambda w: (call(s, w) * g).sum())(weights).values()),
    "gradients of samples": gradients_of_samples,
    "vmap": lambda s: [vmap(s)(x)],
    "vjp": lambda s: vjp(s, x)[1](g),
    "jvp": lambda s: jvp(s, (x,), (g,)),
    "jacrev": lambda s: [jacrev(s)(x)],
    "jacfwd": lambda s: [jacfwd(s)(x)],
    "hessian": lambda s: [hessian(lambda x: (s(x) * g).sum())(x)],
    "forward_ad": tangent,
    "is_grads_batched": batched_gradients,
    "export": lambda s: [torch.export.export(s, (x,)).module()(g)],
}


@pytest.mark.parametrize("way", WAYS)
def test_as_a_stored_stack(way):
    got, want = (
        WAYS[way](MomentumStack(LAYERS, memory=memory)) for memory in ("reversible", "stored")
    )
    assert len(got) > 0
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() and b.norm() > 0


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that tracing is old
def test_tracing():
    stack = MomentumStack([nn.Linear(6, 6).double() for _ in range(2)])
    assert torch.equal(torch.jit.trace(stack, x)(g), stack(g))


def test_tensors_lent_for_forward_are_gone_after_backward():
    stack = MomentumStack(LAYERS)
    before = [id(t) for t in (*stack.parameters(), *stack.buffers())]
    other_tensors(stack)
    assert before == [id(t) for t in (*stack.parameters(), *stack.buffers())]
