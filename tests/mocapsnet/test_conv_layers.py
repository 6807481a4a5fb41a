"""Convolutional capsule layers: their shapes, initial lengths, and reversible stacks of them."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mocapsnet import ConvCapsuleLayer, MomentumStack, ResidualStack
from mocapsnet.conv_layers import mean_taps
from mocapsnet.depth import HIDDEN_LENGTH
from mocapsnet.kernels import routing
from mocapsnet.residual_checks import known

from .stacks import gradients


def grid(*shape, length=0.5, dtype=torch.float32, seed=0):
    """Capsules [B, H, Wd, N, K] of this root mean square length, alike at neighbouring places."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    u = u + u.roll(1, 1) + u.roll(1, 2)
    return (u * length / rms_length(u)).to(dtype)


def rms_length(capsules):
    return capsules.square().sum(-1).mean().sqrt()


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), (7, 6)),
        (dict(stride=2), (4, 3)),  # odd and even sizes, divided and rounded up
        (dict(kernel_size=(3, 5), stride=(1, 2)), (7, 3)),
        (dict(kernel_size=2, padding=0), (6, 5)),
        (dict(kernel_size=(7, 6), padding=0), (1, 1)),  # a dense layer
    ],
)
def test_shapes(options, shape):
    layer = ConvCapsuleLayer(3, 4, 5, 6, bias=True, **options)
    assert layer(grid(2, 7, 6, 3, 4)).shape == (2, *shape, 5, 6)
    assert layer.bias.shape == (5, 6)
    assert f"stride={layer.stride}" in repr(layer)


def test_a_window_of_the_whole_grid_is_a_dense_layer():
    layer = ConvCapsuleLayer(3, 4, 5, 6, kernel_size=(2, 3), padding=0, method="sda").double()
    u = grid(2, 2, 3, 3, 4, dtype=torch.float64)
    want = routing(u.flatten(1, 3), layer.weight.flatten(0, 2), method="sda")
    torch.testing.assert_close(layer(u)[:, 0, 0], want)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kernel_size=2), "padding='same' needs an odd kernel_size; got 2"),
        (dict(kernel_size=0), "kernel_size must be an integer of at least 1, or two"),
        (dict(stride=(1, 2, 3)), "stride must be"),
        (dict(padding=-1), "padding must be an integer of at least 0"),
        (dict(padding="valid"), "padding must be"),
        (dict(init="zero"), "init must be"),
        (dict(sum_length=0), "in_length and sum_length must be positive"),
        (dict(method="em"), "method must be"),
        (dict(kernel_size=5, padding=0, grid=(4, 9)), "a grid of 4 places with padding=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvCapsuleLayer(3, 4, 5, 6, **options)


@pytest.mark.parametrize(
    "size, kernel, stride, padding", [(8, 3, 1, 1), (7, 5, 2, 2), (4, 4, 3, 0)]
)
def test_mean_taps_counts_places_within_the_grid(size, kernel, stride, padding):
    inside = torch.zeros(size + 2 * padding)
    inside[padding : padding + size] = 1
    want = inside.unfold(0, kernel, stride).sum(1).mean()
    assert mean_taps(size, kernel, stride, padding) == pytest.approx(float(want))
    assert mean_taps(None, kernel, stride, padding) == kernel


@pytest.mark.parametrize("stride", [1, 2])
def test_weighted_sums_have_the_length_asked_for(stride):
    """Over a small grid on average with `grid`; without, at the places inside."""
    torch.manual_seed(0)
    u = grid(16, 6, 6, 8, 8, length=0.4)
    options = dict(stride=stride, in_length=0.4, sum_length=0.7, iterations=3)

    def sums(layer):
        length = layer(u).norm(dim=-1)
        return (length / (1 - length)).sqrt()  # before squash

    whole = sums(ConvCapsuleLayer(8, 8, 8, 8, grid=(6, 6), **options))
    assert 0.65 < whole.square().mean().sqrt() < 0.78
    inner = sums(ConvCapsuleLayer(8, 8, 8, 8, **options))[:, 1:-1, 1:-1]
    assert 0.65 < inner.square().mean().sqrt() < 0.78


@pytest.mark.parametrize("make", [MomentumStack, ResidualStack])
def test_twenty_layers_keep_the_length_of_their_input(make):
    torch.manual_seed(0)
    stack = make.of_capsules(20, 8, 8, kernel_size=3, layer={"grid": (6, 6)})
    x, outputs = grid(4, 6, 6, 8, 8, length=HIDDEN_LENGTH), []
    for layer in stack.layers:
        layer.register_forward_hook(lambda m, u, f: outputs.append(f))
    with torch.no_grad():
        y = stack(x)
    # independent outputs that would make the input's length if laid end to end add 1 / 20 of it
    assert 0.98 < rms_length(y) / rms_length(x) < 1.1
    end_to_end = sum(
        w * rms_length(f) for w, f in zip(stack.stream_weights(20), outputs, strict=True)
    )
    assert 0.5 * HIDDEN_LENGTH < end_to_end < 2 * HIDDEN_LENGTH


def stack_of(depth, memory, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layers = [ConvCapsuleLayer(3, 4, 3, 4, sum_length=2.0, bias=True) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer.bias, std=0.3)
    return MomentumStack(layers, memory=memory, **options).to(dtype)


@pytest.mark.parametrize("velocity", ["network", "block"])
def test_reversible_gradients_equal_stored_ones(velocity):
    x, g, v = (grid(2, 4, 3, 3, 4, dtype=torch.float64, seed=n) for n in range(3))
    options = dict(velocity=velocity, gamma=0.8, anchor_every=3)
    want = gradients(stack_of(7, "stored", **options), x, g, v)
    got = gradients(stack_of(7, "reversible", **options), x, g, v)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_anchors_bound_the_error_in_float32():
    """At gamma 0.5 forty layers amplify a rounding by 1e12 and more; three layers by 27."""
    x, g = grid(2, 3, 3, 3, 4), grid(2, 3, 3, 3, 4, seed=1)
    truth = gradients(stack_of(40, "stored", gamma=0.5), x.double(), g.double())

    def error(**options):
        got = gradients(stack_of(40, "reversible", torch.float32, gamma=0.5, **options), x, g)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True))

    assert error() < 1e-4
    assert error(anchor_every=40) > 1e-2


def kept_and_peak(depth, memory="reversible"):
    """Bytes that autograd keeps of a forward pass, and that the backward pass holds at most,
    parameters and their gradients aside, as counted by PyTorch's profiler of memory."""
    stack = stack_of(depth, memory, torch.float32, anchor_every=100)
    x = grid(2, 8, 8, 3, 4).requires_grad_()
    stack(x).sum().backward()  # the first call may look for skip connections
    stack.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = stack(x)
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as watch:
        y.sum().backward()
    changes = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    gradients = sum(p.grad.nbytes for p in stack.parameters())
    return sum(kept.values()), peak - gradients


def test_a_layer_more_adds_only_parameters_and_gradients():
    x = grid(2, 8, 8, 3, 4)
    (few, peak), (many, higher) = kept_and_peak(2), kept_and_peak(20)
    assert few == many == 2 * x.nbytes  # one anchor
    assert abs(higher - peak) <= 0.1 * peak
    assert kept_and_peak(20, "stored")[0] > 20 * x.nbytes


def test_stacks_know_convolutional_layers_until_they_are_changed(monkeypatch):
    layer = ConvCapsuleLayer(3, 4, 3, 4)
    assert known(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not known(layer)
    handle.remove()
    assert known(layer)
    stack = MomentumStack([layer])
    stack(grid(2, 3, 3, 3, 4).requires_grad_())
    assert not stack.probed  # no second call was needed
    forward = ConvCapsuleLayer.forward
    monkeypatch.setattr(ConvCapsuleLayer, "forward", lambda self, u: 2 * forward(self, u))
    stack(grid(2, 3, 3, 3, 4).requires_grad_())
    assert stack.probed


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_is_no_parameter_is_not_forgotten(name):
    """As in a replica of DataParallel, and where another network makes it."""
    layer = ConvCapsuleLayer(4, 3, 4, 3, bias=True)
    made = getattr(layer, name).detach().clone().requires_grad_()
    delattr(layer, name)
    setattr(layer, name, made)
    stack = MomentumStack([layer])
    with pytest.raises(ValueError, match='gradient.* would be lost.* memory="stored"'):
        stack(grid(2, 3, 3, 4, 3).requires_grad_()).sum().backward()
    stack.memory = "stored"
    stack(grid(2, 3, 3, 4, 3)).sum().backward()
    assert made.grad.abs().max() > 0


def test_a_layer_that_changes_the_grid_is_refused_by_a_stack():
    with pytest.raises(ValueError, match=r"maps shape \[2, 4, 4, 3, 4\] to \[2, 2, 2, 3, 4\]"):
        MomentumStack([ConvCapsuleLayer(3, 4, 3, 4, stride=2)])(grid(2, 4, 4, 3, 4))


def test_layers_move_copy_and_load():
    layer = ConvCapsuleLayer(3, 4, 5, 6, bias=True)
    other = ConvCapsuleLayer(3, 4, 5, 6, bias=True)
    other.load_state_dict(copy.deepcopy(layer).state_dict())
    u = grid(1, 3, 3, 3, 4)
    assert torch.equal(layer(u), other(u))
