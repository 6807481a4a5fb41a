"""Layers that do not compute the same again, or whose gradients would get lost, are refused; what
changes between forward and backward is kept or refused."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mocapsnet import CapsuleLayer, MomentumStack
from mocapsnet.probe import repeats

from .stacks import Branch, agree, run


class Calls(nn.Module):
    """A linear layer whose output `change` changes."""

    def __init__(self, change, **attributes):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.change = change
        self.n = 0
        vars(self).update(attributes)

    def forward(self, x):
        return self.change(self, self.linear(x).tanh())


def count(layer, f):
    layer.n += 1
    return f


def counted(layer, f):
    layer.n += 1
    return f * (1 + layer.n)


def private(generator):
    return lambda layer, f: f * torch.rand(f.shape, generator=generator)


NUMPY, TORCH = np.random.default_rng(0), torch.Generator()
DRAWS = "draws random numbers from Python's random, numpy"
ANOTHER = "returns another output when it is called again"

CHANGERS = {
    "random": (lambda layer, f: f * random.random(), DRAWS),
    "a rare draw": (lambda layer, f: f * (random.random() > 1e-9), DRAWS),
    "numpy": (lambda layer, f: f * np.random.rand(), DRAWS),
    "a generator of numpy": (lambda layer, f: f * NUMPY.random(), ANOTHER),
    "a little noise": (lambda layer, f: f * (1 + 1e-3 * NUMPY.random()), ANOTHER),
    "a private generator": (private(TORCH), ANOTHER),
    "a counter": (counted, "changes its attribute 'n' whenever it is called"),
    "a counter without effect yet": (count, "changes its attribute 'n' whenever it is called"),
    "grad mode": (lambda layer, f: f * (1 + torch.is_grad_enabled()), ANOTHER),
}


@pytest.mark.parametrize("name", CHANGERS)
def test_a_layer_that_does_not_repeat_itself_is_refused(name):
    change, message = CHANGERS[name]
    stack = MomentumStack([Branch(6), Calls(change)])
    for _ in range(2):  # refused for good, not only once
        with pytest.raises(ValueError, match=rf"layer 1 \(Calls\) {message}.*memory=.stored."):
            stack(torch.randn(3, 6))
    with torch.no_grad():
        stack(torch.randn(3, 6))


@pytest.mark.parametrize(
    "own",
    [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)],
    ids=lambda own: type(own).__module__ + "." + type(own).__name__,
)
def test_a_draw_from_a_generator_of_the_layer_is_seen_without_effect(own):
    def draw(layer, f):
        if isinstance(own, torch.Generator):
            torch.rand((), generator=own)
        else:
            own.random()
        return f

    draw.__name__ = "draw"
    with pytest.raises(ValueError, match=DRAWS):
        MomentumStack([Calls(draw, own=own)])(torch.randn(3, 6))


def test_a_draw_of_another_thread_is_no_reason_to_refuse():
    stack = MomentumStack([Branch(6)])
    calls = []

    def once(m, x, f):
        calls.append(f)
        if len(calls) == 2:
            random.random()

    stack.layers[0].register_forward_hook(once)
    stack(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 4  # forward, the second call, a third as the second draws, backward


def test_what_a_layer_may_remember():
    def length(layer, f):
        layer.n = len(f)
        return f

    agree([Calls(length), Calls(lambda layer, f: f)], torch.randn(3, 6))


def test_outputs_that_are_taken_for_the_same():
    f = torch.randn(1000)
    other = f + 1e-3 * torch.randn(1000)
    assert repeats(f, f.clone(), None)
    assert repeats(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), None)
    assert repeats(f, f * (1 + 1e-6), lambda: other)  # added up in another order
    assert repeats(f, other, lambda: f.clone())  # another kernel where gradients are recorded
    assert not repeats(f, other, lambda: other)
    assert not repeats(f, f + 0.1, lambda: f.clone())


def outside():
    w = torch.randn(6, requires_grad=True)
    return lambda layer, f: f * w


def computed_outside():
    w = torch.randn(6, requires_grad=True).exp()
    return lambda layer, f: f * w


def module_outside():
    linear = nn.Linear(6, 6)
    return lambda layer, f: linear(f)


@pytest.mark.parametrize("make", [outside, computed_outside, module_outside])
def test_a_tensor_read_by_closure_is_refused_in_backward(make):
    stack = MomentumStack([Branch(6), Calls(make())])
    for _ in range(2):
        y = stack(torch.randn(3, 6))
        with pytest.raises(
            ValueError, match=r"layer 1 \(Calls\) computes with a tensor \[6.*neither.*parameter"
        ):
            y.sum().backward()


def test_constants_read_by_closure_are_fine():
    w = torch.randn(6).double()
    agree([Calls(lambda layer, f: f * w)], torch.randn(3, 6))


def evaluate(stack):
    stack.eval()


def hook(stack):
    stack.layers[1].linear.register_forward_hook(lambda m, x, f: 2 * f)


def forward(stack):
    stack.layers[1].forward = lambda x: x


def replace(stack):
    stack.layers[1].linear = nn.Linear(6, 6)


@pytest.mark.parametrize("change", [evaluate, hook, forward, replace])
def test_changes_between_forward_and_backward_are_refused(change):
    stack = MomentumStack([Branch(6), Branch(6)])
    y = stack(torch.randn(3, 6))
    change(stack)
    with pytest.raises(RuntimeError, match="was changed between forward and backward"):
        y.sum().backward()
    stack(torch.randn(3, 6)).sum().backward()


def test_a_buffer_changed_between_forward_and_backward_is_refused():
    stack = MomentumStack([nn.BatchNorm1d(6).eval()])
    y = stack(torch.randn(3, 6))
    stack.layers[0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="parameters or buffers.*were changed"):
        y.sum().backward()


def test_freezing_between_forward_and_backward_is_refused():
    stack = MomentumStack([Branch(6)])
    y = stack(torch.randn(3, 6))
    stack.requires_grad_(False)
    with pytest.raises(RuntimeError, match="were changed between.*requires_grad_"):
        y.sum().backward()


def test_options_and_layers_changed_after_forward_are_those_of_forward():
    stack, x, g = MomentumStack([Branch(6).double() for _ in range(4)]), *torch.randn(2, 3, 6)
    x, g = x.double(), g.double()
    stack.memory = "stored"
    want = run(stack, x, g, (), {})
    stack.memory = "reversible"
    x.requires_grad_()
    stack.zero_grad()
    y = stack(x)
    parameters = list(stack.parameters())
    stack.gamma, stack.velocity, stack.anchor_every = 0.3, "block", 1
    del stack.layers[2]
    y.backward(g)
    for a, b in zip([x.grad, *(p.grad for p in parameters)], [want[2], *want[3:]], strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_a_layer_is_looked_at_again_in_another_mode():
    change = lambda layer, f: f * NUMPY.random() if layer.training else f  # noqa: E731
    stack = MomentumStack([Calls(change)]).eval()
    stack(torch.randn(3, 6)).sum().backward()
    with pytest.raises(ValueError, match=ANOTHER):
        stack.train()(torch.randn(3, 6))


def test_a_parametrization_added_later_gets_gradients():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, W):
            return self.scale * W

    layers = [CapsuleLayer(4, 3, 4, 3, sum_length=2.0).double() for _ in range(2)]
    stack, x, g = MomentumStack(layers), *torch.randn(2, 2, 4, 3, dtype=torch.float64)
    stack(x).sum().backward()
    nn.utils.parametrize.register_parametrization(layers[0], "weight", Scale())
    got = run(stack, x, g, (), {})
    stack.memory = "stored"
    for a, b in zip(got, run(stack, x, g, (), {}), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()
