"""Networks and stacks with weights in bfloat16 and float16: streams and outputs stay float32."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mocapsnet import CapsNet, CapsuleLayer, CapsuleLoss, MoCapsNet, MomentumStack, ResCapsNet

from .stacks import Attention, Branch, run

SMALL = dict(channels=16, capsules=6, capsule_dim=4, class_dim=5, kernel_size=3, decoder=(12, 20))
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("network", [CapsNet, ResCapsNet, MoCapsNet])
def test_a_network_in_half_precision(network, half):
    torch.manual_seed(0)
    model = network((1, 12, 10), 7, **SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(half))  # then what differs is how it computes
    low = copy.deepcopy(model).to(half)
    images, pixels = torch.randn(4, 1, 12, 10), torch.rand(4, 1, 12, 10)
    labels = torch.arange(4)
    want, got = model(images, labels), low(images, labels)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 8 * torch.finfo(half).eps * b.norm()  # 2 convolutions, 3 layers
    assert torch.equal(low(images.to(half), labels).lengths, got.lengths)
    CapsuleLoss()(got, pixels, labels).total.backward()
    CapsuleLoss()(want, pixels, labels).total.backward()
    for a, b in zip(low.parameters(), model.parameters(), strict=True):
        assert a.grad.dtype == half and (a.grad - b.grad).norm() < 0.1 * b.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_given_in_the_dtype_of_the_weights(dtype):
    model = MoCapsNet((1, 12, 10), 7, **SMALL).to(dtype)
    output = model(torch.randn(4, 1, 12, 10, dtype=torch.float64))
    assert {t.dtype for t in output} == {dtype}


STACKS = {
    "branches": lambda: [Branch(6), Branch(6, dropout=0.5)],
    "attention": lambda: [Attention(6) for _ in range(2)],
    "norm": lambda: [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2)],
    "without parameters": lambda: [nn.Tanh(), Branch(6)],
}


@pytest.mark.parametrize("given", [torch.float32, "half"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_in_half_precision_adds_up_in_float32(name, half, given):
    torch.manual_seed(0)
    made = [layer.to(half) for layer in STACKS[name]()]
    seen = []
    for layer in made:
        layer.register_forward_hook(lambda m, inputs, f: seen.append((inputs[0].dtype, f.dtype)))
    x, g = torch.randn(2, 3, 6).to(half if given == "half" else given), torch.randn(2, 3, 6)
    results = []
    for memory in ("reversible", "stored"):
        stack = MomentumStack(made, memory=memory)
        results.append(run(stack, x, g, (), {}))
    assert results[0][0].dtype == torch.float32
    kinds = {(half, half)} | ({(torch.float32,) * 2} if name == "without parameters" else set())
    assert set(seen) == kinds
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][2:], results[1][2:], strict=True):
        # a reconstructed x at a tie may be given to the layer as the half next to it
        assert a.dtype == b.dtype and (a.float() - b.float()).norm() <= 2**-7 * b.float().norm()


def test_small_steps_are_not_lost():
    """In bfloat16 x + v would round each of these steps away."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.size = nn.Parameter(torch.tensor(1e-3))

        def forward(self, x):
            return self.size.expand_as(x) + 0 * x

    stack = MomentumStack([Step().bfloat16() for _ in range(100)], gamma=0.5)
    y = stack(torch.ones(3, dtype=torch.bfloat16))
    torch.testing.assert_close(y, torch.full((3,), 1.099), rtol=1e-3, atol=0)


def test_mixed_layers_are_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6).bfloat16()

        def forward(self, x):
            assert x.dtype == torch.float32
            return self.linear(self.norm(x).bfloat16())

    MomentumStack([Mixed()])(torch.randn(3, 6)).sum().backward()


def test_capsule_layers_take_the_stream_as_it_is():
    made = [CapsuleLayer(4, 3, 4, 3, sum_length=2.0).bfloat16() for _ in range(2)]
    other = [CapsuleLayer(4, 3, 4, 3, iterations=2).bfloat16()]  # not fused
    x, g = torch.randn(2, 2, 4, 3)
    for layers in (made, made + other):
        got, want = (
            run(MomentumStack(layers, memory=m), x, g, (), {}) for m in ("reversible", "stored")
        )
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and (a - b).norm() <= 2**-7 * b.norm()


@pytest.mark.parametrize("colours", [1, 3])
def test_features_are_channels_last_where_convolutions_are_faster_so(colours):
    """In 16 bits, of weights or by autocast, and on GPUs; not in float32 on a CPU."""
    model, images = CapsNet((colours, 12, 10), 7, **SMALL), torch.randn(2, colours, 12, 10)
    want = model.features(images)
    assert want.is_contiguous()

    def in_bfloat16():
        with torch.autocast("cpu", torch.bfloat16):
            return model.features(images)

    compiled = torch.compile(in_bfloat16, fullgraph=True, backend="aot_eager")
    low = copy.deepcopy(model).bfloat16()
    for got in (in_bfloat16(), compiled(), low.features(images)):
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous(memory_format=torch.channels_last) and not got.is_contiguous()
        assert (got - want).norm() < 4 * torch.finfo(torch.bfloat16).eps * want.norm()
    with FakeTensorMode(), torch.device("cuda"):  # needs none
        got = CapsNet((colours, 12, 10), 7, **SMALL).features(torch.empty(2, colours, 12, 10))
    assert got.is_contiguous(memory_format=torch.channels_last) and not got.is_contiguous()
