"""The momentum stack: against Algorithm 1, reversible against stored, and what memory it keeps."""

import pytest
import torch
from torch import nn

from mocapsnet import CapsuleLayer, MomentumStack, ResidualStack

from .stacks import Branch, agree, capsules, gradients, layers


def test_forward_is_algorithm_1():
    stack = MomentumStack(layers(5), gamma=0.8)
    x = capsules()
    with torch.no_grad():
        expected, v = x, torch.zeros_like(x)
        for layer in stack.layers:
            v = 0.8 * v + (1 - 0.8) * layer(expected)
            expected = expected + v
        assert torch.equal(stack(x), expected)
    assert torch.equal(stack(x).detach(), expected)  # same code with and without gradients


def test_velocity_block_restarts_every_two_layers():
    stack = MomentumStack(layers(5), gamma=0.8, velocity="block")
    x = capsules()
    with torch.no_grad():
        expected, v = x, torch.zeros_like(x)
        for n, layer in enumerate(stack.layers):
            v = torch.zeros_like(x) if n % 2 == 0 else v
            v = 0.8 * v + (1 - 0.8) * layer(expected)
            expected = expected + v
        torch.testing.assert_close(stack(x), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("velocity", ["network", "block"])
@pytest.mark.parametrize("anchor_every", [None, 3])  # 3 divides neither 16 nor the block of 2
@pytest.mark.parametrize("depth", [1, 2, 16])
def test_reversible_gradients_equal_stored_ones(depth, anchor_every, velocity):
    g, v = capsules(seed=2), capsules(seed=3)
    options = dict(velocity=velocity, anchor_every=anchor_every)
    stored = MomentumStack(layers(depth), memory="stored", **options)
    reversible = MomentumStack(layers(depth), memory="reversible", **options)
    for given in (None, v):
        want = gradients(stored, capsules(), g, given)
        for x, y in zip(gradients(reversible, capsules(), g, given), want, strict=True):
            assert (x - y).norm() <= 1e-9 * y.norm()


def test_anchors_bound_the_error_in_float32():
    """At gamma 0.5 forty layers amplify a rounding by 1e12 and more; three layers by 27."""
    truth = gradients(MomentumStack(layers(40), gamma=0.5, memory="stored"), capsules(), capsules())

    def error(**options):
        stack = MomentumStack(layers(40, torch.float32), gamma=0.5, **options)
        got = gradients(stack, capsules(torch.float32), capsules(torch.float32))
        return max(float((x - y).norm() / y.norm()) for x, y in zip(got, truth, strict=True))

    assert MomentumStack([], gamma=0.5).spacing(torch.float32) == 3
    assert error() < 1e-4  # 27 roundings of 6e-8 and those of 40 layers
    assert error(anchor_every=40) > 1e-2  # what the anchors are for


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("depth", [2, 40])
def test_float64_gradients_are_exact_to_1e_9(depth, gamma):
    agree([Branch(6) for _ in range(depth)], torch.randn(3, 6), gamma=gamma)


def test_spacing_follows_from_gamma_dtype_and_target():
    for dtype, target in ((torch.float32, 2**-17), (torch.float64, 2**-40)):
        for gamma in (0.5, 0.9, 0.99):
            n = MomentumStack([], gamma=gamma).spacing(dtype)
            eps = torch.finfo(dtype).eps
            growth = (2 - gamma) / gamma
            assert eps * growth**n <= target * (1 + 1e-9) < eps * growth ** (n + 1)
    stack = MomentumStack([], gamma=0.9)
    assert stack.spacing(torch.bfloat16) == stack.spacing(torch.float32) == 20  # state is float32
    assert MomentumStack([], gamma=1e-9).spacing(torch.float32) == 1
    given = MomentumStack([], anchor_every=5)
    assert stack.anchor_every is None and given.anchor_every == given.spacing(torch.float64) == 5


def test_gradcheck_through_the_stack():
    stack = MomentumStack(
        [CapsuleLayer(2, 2, 2, 2, routing_grad="full").double() for _ in range(2)]
    )
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(stack.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: stack(x), (x, *parameters))


def test_no_layers_is_the_identity():
    x = capsules().requires_grad_()
    MomentumStack([])(x).backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(ResidualStack([])(x), x)


def test_a_layer_used_twice_gets_the_sum_of_its_gradients():
    shared = layers(1) * 3
    want = gradients(MomentumStack(shared, memory="stored"), capsules(), capsules())
    got = gradients(MomentumStack(shared), capsules(), capsules())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_frozen_parameters_get_no_gradient():
    stack = MomentumStack(layers(3))
    stack.layers[1].weight.requires_grad_(False)
    x = capsules().requires_grad_()
    stack(x).sum().backward()
    assert stack.layers[1].weight.grad is None
    assert stack.layers[0].weight.grad is not None and x.grad is not None


def test_state_is_float32_under_low_precision():
    stack = MomentumStack(layers(2, torch.float32))
    assert stack(capsules(torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stack(capsules(torch.float32)).dtype == torch.float32


def saved_bytes(stack, x):
    """Bytes of distinct tensors that the graph of stack(x) keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stack(x)
    return sum(kept.values())


def test_reversible_memory_does_not_grow_with_depth():
    x = capsules(torch.float32).requires_grad_()
    state = 2 * x.numel() * x.element_size()
    for depth in (2, 10, 20):
        assert saved_bytes(MomentumStack(layers(depth, torch.float32)), x) == state
    stack = MomentumStack(layers(21, torch.float32))
    assert saved_bytes(stack, x) == 2 * state  # one anchor more
    x = capsules().requires_grad_()
    state *= 2
    stored = [saved_bytes(MomentumStack(layers(d), memory="stored"), x) for d in (2, 10)]
    assert stored[1] > 4 * stored[0] > 4 * state


def test_memory_of_other_layers_is_anchors_and_random_states_of_those_that_drew():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    module = [Branch(6), Branch(6, dropout=0.5), Branch(6)]
    stack = MomentumStack(module * 4).double()
    # the first call looks for skip connections, and shows no hook what it saves for that
    assert saved_bytes(stack, x) == saved_bytes(stack, x) == 2 * x.numel() * x.element_size()
    random = stack(x).grad_fn.random
    assert list(random) == [1, 4, 7, 10] and all(len(states) == 1 for states in random.values())


@pytest.mark.parametrize("power", [1, 2])  # the first derivative of power 1 is constant in y
def test_double_backward_is_an_error(power):
    stack = MomentumStack(layers(2))
    x = capsules().requires_grad_()
    (grad,) = torch.autograd.grad(stack(x).pow(power).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(stack(x).pow(power).sum(), x)
    assert torch.equal(grad, want)
    with pytest.raises(RuntimeError, match='no double backward.*memory="stored"'):
        grad.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gamma=0.0), "gamma must lie between 0 and 1.*cannot be inverted"),
        (dict(gamma=1.0), "gamma = 1 ignores the layers"),
        (dict(memory="none"), "memory must be"),
        (dict(velocity="layer"), "velocity must be"),
        (dict(anchor_every=0), "anchor_every must be at least 1"),
        (dict(block_layers=0), "block_layers must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumStack([nn.Identity()], **options)
