"""Which layers a reversible stack refuses, and which it does not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mocapsnet import MomentumStack, ResidualStack

from .stacks import Branch, agree


class Skip(nn.Module):
    """post(x + g(x)), or what else `join` makes of x and g(x)."""

    def __init__(self, join, branch=None, post=None):
        super().__init__()
        self.join = join
        self.branch = nn.Linear(6, 6) if branch is None else branch
        self.post = nn.Identity() if post is None else post

    def forward(self, x):
        return self.post(self.join(x, self.branch(x)))


def plus(x, g):
    return x + g


def in_place_plus(x, g):
    g += x
    return g


def in_place_times(x, g):
    g *= x
    return g


def in_place_minus(x, g):
    g -= x
    return g


def encoder(**options):
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **options)


def conv():
    return nn.Conv2d(6, 6, 3, padding=1)


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.bias


SKIPS = {
    "post-norm encoder": encoder(),
    "pre-norm encoder": encoder(norm_first=True),
    "encoder in eval mode": encoder().eval(),
    "encoder without dropout": encoder(dropout=0.0, activation="gelu"),
    "plain": Skip(plus),
    "in place": Skip(in_place_plus),
    "in place on a view": Skip(lambda x, g: in_place_plus(x, g.flatten(1).view_as(x))),
    "relu": Skip(in_place_plus, post=nn.ReLU(inplace=True)),
    "scaled branch": Skip(lambda x, g: x + 0.1 * g),
    "minus": Skip(lambda x, g: x - g),
    "dropout": Skip(plus, post=nn.Dropout(0.5)),
    "norm and gelu": Skip(plus, post=nn.Sequential(nn.LayerNorm(6), nn.GELU())),
    "through views": Skip(lambda x, g: x.flatten(1).clone().double().view_as(g).float() + g),
    "of three": Skip(lambda x, g: torch.ones(6) + (g + (g.relu() + x))),
    "twice x": Skip(lambda x, g: x + x, nn.Identity()),
    "stack": ResidualStack([nn.Linear(6, 6)]),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_layer_with_its_own_skip_connection_is_refused(name):
    layer = SKIPS[name]
    x = torch.randn(2, 3, 6)
    stack = MomentumStack([nn.Linear(6, 6), layer])
    message = rf"layer 1 \({type(layer).__name__}\) contains a skip.*Return the branch g\(x\) alone"
    for _ in range(2):  # refused for good, not only once
        with pytest.raises(ValueError, match=message):
            stack(x)
    with torch.no_grad():
        stack(x)
    MomentumStack(stack.layers, memory="stored")(x)


def test_a_resnet_block_is_refused():
    branch = nn.Sequential(conv(), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), conv())
    block = Skip(in_place_plus, branch, nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="layer 0 .Skip. contains a skip"):
        MomentumStack([block])(torch.randn(2, 6, 4, 4))
    agree([branch], torch.randn(2, 6, 4, 4))


BRANCHES = {
    "relu": nn.ReLU(),
    "identity": nn.Identity(),
    "norm": nn.LayerNorm(6),
    "dropout": nn.Dropout(0.5),
    "x plus a constant": Skip(lambda x, g: x + torch.ones(6), nn.Identity()),
    "x plus a parameter": Skip(plus, Bias()),
    "skip inside of the branch": Skip(plus, post=nn.Linear(6, 6)),
    "pull towards g(x)": Skip(lambda x, g: g - x),
    "gate": Skip(lambda x, g: x * g.sigmoid()),
    "gate in place": Skip(in_place_times),
    "pull in place": Skip(in_place_minus),
    "tanh in place": Skip(lambda x, g: (g + x).flatten(1).tanh_().view_as(x)),
    "sum of two branches": Skip(lambda x, g: g + g.sin()),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_not_taken_for_a_skip_connection(name):
    x = torch.randn(2, 3, 6, requires_grad=True)
    MomentumStack([BRANCHES[name]])(x).sum().backward()
    assert x.grad is not None


def test_skip_connections_are_looked_for_once_per_layer():
    calls = []
    branch = Branch(6)
    branch.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stack = MomentumStack([branch, branch])
    x = torch.randn(3, 6)
    for _ in range(2):
        stack(x)
    assert calls == [False, True, False, False, False]
    copied = copy.deepcopy(stack)
    copied(x)  # its layer is another
    assert calls[5:] == [False, True, False]
    assert list(copied.probed) == [copied.layers[0]]


def scaled(factor):
    return lambda self, x: factor * nn.Linear.forward(self, x)


class Scaled(nn.Linear):
    forward = scaled(2)  # no pickle takes it


def test_a_stack_that_was_called_can_be_saved(tmp_path):
    stack, x = MomentumStack([Scaled(6, 6)]), torch.randn(3, 6, requires_grad=True)
    out = stack(x)
    torch.save(stack, tmp_path / "stack.pt")
    assert torch.equal(torch.load(tmp_path / "stack.pt", weights_only=False)(x), out)


class Counter(nn.Module):
    """Counts its calls in a buffer, in place or by a new one."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return x.sin()


CHANGERS = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm inside": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
    "instance norm": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "counter in place": lambda: Counter(True),
    "counter": lambda: Counter(False),
}


@pytest.mark.parametrize("name", CHANGERS)
def test_a_layer_that_changes_its_buffers_is_refused(name):
    x = torch.randn(2, 6, 6)
    stack = MomentumStack([nn.Linear(6, 6), CHANGERS[name]()])
    message = (
        rf"layer 1 \({type(stack.layers[1]).__name__}\) changes its buffers.*GroupNorm.*stored"
    )
    with pytest.raises(ValueError, match=message):
        stack(x)
    with torch.no_grad():
        stack(x)
    if "counter" not in name:
        stack.eval()(x).sum().backward()
        with pytest.raises(ValueError, match=message):  # also after a forward in eval mode
            stack.train()(x)


def test_a_layer_that_changes_its_arguments_in_place_is_refused():
    class Cache(nn.Module):
        def forward(self, x, cache):
            return x * cache.add_(1)

    with pytest.raises(ValueError, match=r"layer 0 \(Cache\) changes its input or another arg"):
        MomentumStack([Cache()])(torch.randn(3), None, torch.zeros(3))
    with pytest.raises(ValueError, match=r"layer 0 \(ReLU\) changes its input.*inplace=False"):
        MomentumStack([nn.ReLU(inplace=True)])(torch.randn(3, requires_grad=True))


@pytest.mark.parametrize("memory", ["reversible", "stored"])
def test_layers_that_change_the_shape_are_refused(memory):
    x = torch.randn(2, 6)
    for layer in (nn.Linear(6, 5), nn.Linear(6, 1)):  # 1 would be broadcast
        with pytest.raises(ValueError, match=r"layer 0 \(Linear\) maps shape \[2, 6\] to \[2, "):
            MomentumStack([layer], memory=memory)(x)
        with pytest.raises(ValueError, match="keep the shape"):
            ResidualStack([layer])(x)
    with pytest.raises(ValueError, match="layer 0 .LSTM. returned a tuple"):
        MomentumStack([nn.LSTM(6, 6)], memory=memory)(x)
    with pytest.raises(ValueError, match=r"v must have the shape of x, \[2, 6\]; got \[6\]"):
        MomentumStack([nn.Linear(6, 6)], memory=memory)(x, torch.zeros(6))
