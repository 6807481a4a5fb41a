"""Stacks of capsule layers that are drawn for their depth."""

import copy

import pytest
import torch

from mocapsnet import CapsuleLayer, MomentumStack, ResidualStack
from mocapsnet.depth import HIDDEN_LENGTH

DEPTH = 200


def rms_length(capsules):
    return capsules.square().sum(-1).mean().sqrt()


def entering(capsules, dim, length=HIDDEN_LENGTH):
    x = torch.randn(2, capsules, dim, generator=torch.Generator().manual_seed(0))
    return x * length / rms_length(x)


def worst_error(stack, memory):
    """Of float32 gradients, relative to float64 without reversing."""

    def gradients(stack, dtype):
        root = x.to(dtype).requires_grad_()
        return torch.autograd.grad(stack(root), [root, *stack.parameters()], g.to(dtype))

    x, g = entering(8, 4), torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(stack).double()
    exact.memory = "stored"
    truth = gradients(exact, torch.float64)
    stack.memory = memory
    pairs = zip(gradients(stack, torch.float32), truth, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("memory", ["reversible", "stored"])
def test_200_layers_are_no_chaos(memory):
    torch.manual_seed(0)
    drawn_alone = MomentumStack([CapsuleLayer(8, 4, 8, 4) for _ in range(DEPTH)])
    for_the_depth = MomentumStack.of_capsules(DEPTH, 8, 4)
    assert worst_error(for_the_depth, memory) < 2e-6  # 17 roundings; measured: 7e-7
    assert worst_error(drawn_alone, memory) > 1e-3  # what the scale is for


@pytest.mark.parametrize("in_length", [HIDDEN_LENGTH, 0.8])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: ResidualStack.of_capsules(DEPTH, 16, 8, **options),
        lambda **options: MomentumStack.of_capsules(DEPTH, 16, 8, gamma=0.7, **options),
        lambda **options: MomentumStack.of_capsules(
            DEPTH, 16, 8, velocity="block", block_layers=5, **options
        ),
    ],
    ids=["residual", "momentum", "blocks of five"],
)
def test_outputs_end_to_end_are_as_long_as_the_input(make, in_length):
    torch.manual_seed(0)
    stack, x, outputs = make(in_length=in_length), entering(16, 8, in_length), []
    stack.memory = "stored"
    for layer in stack.layers:
        layer.register_forward_hook(lambda m, u, f: outputs.append(f))
    with torch.no_grad():
        y = stack(x)
    weights = stack.stream_weights(DEPTH)
    total = sum(w * f for w, f in zip(weights, outputs, strict=True))
    torch.testing.assert_close(x + total, y)
    end_to_end = sum(w * rms_length(f) for w, f in zip(weights, outputs, strict=True))
    # couplings that are not quite equal lengthen sums, and some capsules enter longer than others
    assert 0.5 * in_length < end_to_end < 2 * in_length


def test_options_reach_the_stack_and_its_layers():
    stack = MomentumStack.of_capsules(
        3, 4, 2, gamma=0.7, memory="stored", layer=dict(method="sda", iterations=2, bias=True)
    )
    assert (len(stack.layers), stack.gamma, stack.memory) == (3, 0.7, "stored")
    for layer in stack.layers:
        assert layer.weight.shape == (4, 2, 4, 2)
        assert (layer.method, layer.iterations, layer.bias is None) == ("sda", 2, False)
    assert len(ResidualStack.of_capsules(0, 4, 2).layers) == 0


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((-1, 4, 2), {}, "layers must be at least 0"),
        ((2, 4, 2), dict(in_length=1.0), "in_length must lie between 0 and 1"),
        ((2, 4, 0), {}, "must be positive"),
        ((2, 4, 2), dict(gamma=1.0), "gamma must lie between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MomentumStack.of_capsules(*arguments, **options)
