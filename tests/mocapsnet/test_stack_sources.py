"""Gradients of what layers of a reversible stack compute with: parametrized and computed weights,
attributes, and what they begin to read after the first call."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from mocapsnet import MomentumStack

from .stacks import Branch


class Symmetric(nn.Module):
    def forward(self, w):
        return w + w.T


class Scaled(nn.Module):
    """By a number and a tensor, which are plain attributes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.scale = 1.0
        self.context = None
        self.seen = None

    def forward(self, x):
        f = torch.tanh(self.linear(x)) * self.scale
        self.seen = f.detach()  # as attention maps are kept for a picture
        return f if self.context is None else f + self.context


def both(layers):
    """The same stack, reversible and stored, and an input."""
    torch.manual_seed(3)
    layers = [layer.double() for layer in layers]
    stacks = [MomentumStack(copy.deepcopy(layers), memory=m) for m in ("reversible", "stored")]
    return stacks, torch.randn(3, 4, dtype=torch.float64)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def grads(stack):
    return [p.grad for p in stack.parameters()]


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_under_the_cache_of_parametrizations(inside):
    layers = [Branch(4) for _ in range(3)]
    for layer in layers:
        parametrize.register_parametrization(layer.linear, "weight", Symmetric())
    found, x = both(layers)
    for stack in found:
        with parametrize.cached():
            head = stack.layers[0].linear  # also read outside of the stack, as tied weights are
            loss = head(stack(x)).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert parametrize._cache_enabled == 0 and not parametrize._cache
    same(grads(found[0]), grads(found[1]))


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["scale", "context"])
def test_attributes_are_those_of_the_call(name, shared, in_turn):
    tensors = torch.zeros(4).double(), torch.ones(4).double()
    values = {"scale": (1.0, -3.0), "context": tensors}[name]
    found, x = both([Scaled()] * 3 if shared else [Scaled(), Scaled()])
    for stack in found:
        outputs = []
        for value in values:
            for layer in stack.layers:
                setattr(layer, name, value)
            outputs.append(stack(x).square().sum())
            if in_turn:
                outputs.pop().backward()
        if outputs:
            sum(outputs).backward()
        assert all(getattr(layer, name) is values[1] for layer in stack.layers)
    same(grads(found[0]), grads(found[1]))


def test_a_tensor_attribute_changed_in_place_is_refused():
    (stack, _), x = both([Scaled()])
    stack.layers[0].context = torch.zeros(4).double()
    y = stack(x)
    stack.layers[0].context += 1
    with pytest.raises(RuntimeError, match="its tensor 'context' was changed in place between"):
        y.sum().backward()


class Rotated(nn.Module):
    """Keeps a table that grows with its inputs, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.length, self.table = 0, None

    def forward(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.table = torch.arange(len(x), dtype=torch.float64)[:, None].cos()
        return self.linear(x) * self.table[: len(x)]


def test_a_layer_may_keep_what_it_has_computed():
    found, x = both([Rotated(), Rotated()])
    for stack in found:
        stack(x[:1]).sum().backward()
        short = stack(x[:1])
        long = stack(x)
        with torch.no_grad():
            stack(torch.cat([x, x]))
        for layer in stack.layers:
            layer.last_loss = 3.5
        (short.square().sum() + long.square().sum()).backward()
        assert all(layer.length == 6 and layer.last_loss == 3.5 for layer in stack.layers)
    same(grads(found[0]), grads(found[1]))


class Recorded(nn.Module):
    """Notes its output where that has a gradient, as recorders of activations do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.activation = None

    def forward(self, x):
        h = self.linear(x)
        if h.requires_grad:
            self.activation = h.detach()
        return torch.tanh(h)


def test_a_layer_may_record_what_has_a_gradient():
    found, x = both([Recorded(), Recorded()])
    for stack in found:
        (stack(x).sum() + stack(2 * x).square().sum()).backward()
        assert all(layer.activation is not None for layer in stack.layers)
    same(grads(found[0]), grads(found[1]))


class Counted(nn.Module):
    """Behaves by a text and a mask, and counts its calls where no module sees it."""

    def __init__(self, calls):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), [calls]

    def forward(self, x, kind="photo", mask=None):
        self.calls[0].append(kind)
        self.shape = tuple(x.shape)
        x = x if mask is None else x * mask
        return self.linear(x if kind == "photo" else -x)


def test_kinds_of_calls_in_turn_are_looked_at_once():
    calls = []
    stack, x = MomentumStack([Counted(calls)]), torch.randn(3, 4)
    mask = torch.ones(3, 4)
    ways = [("photo", None), ("sketch", None), ("photo", mask), ("photo", mask.requires_grad_())]
    for n in range(3):
        for way in ways:
            for batch in (x, x[:2]):
                calls.clear()
                kind, mask = way[0], None if way[1] is None else way[1][: len(batch)]
                stack(batch, None, kind, mask).sum().backward()
                assert len(calls) == 2 or (n == 0 and len(calls) == 3)


def test_two_calls_of_a_layer_that_keeps_what_it_computed():
    found, x = both([Scaled(), Scaled()])
    for stack in found:
        (stack(x).square().sum() + stack(2 * x).square().sum()).backward()
    same(grads(found[0]), grads(found[1]))


def test_a_gradient_that_is_lost_later_is_refused_in_backward():
    (stack, _), x = both([Scaled(), Scaled()])
    encoder = nn.Linear(4, 4).double()
    for layer in stack.layers:
        layer.context = encoder(x).detach()
    stack(x).sum().backward()
    for layer in stack.layers:
        layer.context = encoder(x)
    with pytest.raises(ValueError, match="neither its parameter nor an argument of the stack"):
        stack(x).square().sum().backward()


class Skipped(nn.Module):
    """Drops its branch by Python's random numbers, which no second call repeats."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.p = 0.0

    def forward(self, x):
        if self.p and random.random() < self.p:
            return 0 * x
        return self.linear(x)


def test_a_layer_is_looked_at_again_where_a_number_is_no_longer_zero():
    (stack, _), x = both([Skipped(), Skipped()])
    stack(x).sum().backward()
    stack.layers[1].p = 0.5
    with pytest.raises(ValueError, match="layer 1 .* draws random numbers from Python's random"):
        for _ in range(20):
            stack(x).sum().backward()


def test_an_empty_batch_is_no_look():
    (stack, _), x = both([Skipped()])
    stack.layers[0].p = 0.5
    layer = stack.layers[0]
    layer.forward = lambda x: Skipped.forward(layer, x) if len(x) else layer.linear(x)
    stack(x[:0]).sum().backward()
    with pytest.raises(ValueError, match="draws random numbers"):
        stack(x).sum().backward()


def test_weights_that_are_computed_have_their_gradients_once():
    """Tied within a layer, scaled as in meta-learning, with hooks and kept gradients."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    found, x = both([Two(), Two()])
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    results = []
    for stack in found:
        w.grad = s.grad = None
        weights = {name: p.detach() * s for name, p in stack.named_parameters()}
        weights |= {"layers.0.a.weight": w, "layers.0.b.weight": w.t()}
        kept = weights["layers.1.a.weight"]
        kept.retain_grad()
        calls = []
        weights["layers.1.b.weight"].register_hook(lambda g, calls=calls: calls.append(1) or 2 * g)
        functional_call(stack, weights, (x,)).square().sum().backward()
        assert len(calls) == 1
        results.append([w.grad.clone(), s.grad.clone(), kept.grad])
    same(*results)


def test_operations_may_be_counted_in_forward_alone():
    (stack, stored), x = both([Branch(4), Branch(4)])
    for one in (stack, stored):
        with FlopCounterMode(display=False):
            y = one(x)
        y.square().sum().backward()
    same(grads(stack), grads(stored))
