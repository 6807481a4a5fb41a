"""Which stacks run as one fused operation, and that they compute what the layers would."""

import pytest
import torch
from torch import nn

from mocapsnet import CapsuleLayer, MomentumStack, reversible
from mocapsnet.benchmarks.memory import activation_bytes


def layers(count, **options):
    torch.manual_seed(0)
    options = dict(sum_length=2.0) | options
    return [CapsuleLayer(4, 3, 4, 3, **options).double() for _ in range(count)]


def capsules(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused operation."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return momentum_routing(*args, **kwargs)

    momentum_routing = reversible.momentum_routing
    monkeypatch.setattr(reversible, "momentum_routing", counted)
    return calls


class Twice(CapsuleLayer):
    def forward(self, u):
        return 2 * super().forward(u)


def hooked(kind):
    made = layers(2)
    getattr(made[1], kind)(lambda *_: None)
    return made


def with_options(**options):
    return layers(1) + layers(1, **options)


OTHERS = {
    "a subclass": lambda: layers(1) + [Twice(4, 3, 4, 3).double()],
    "a hook": lambda: hooked("register_forward_hook"),
    "a backward hook": lambda: hooked("register_full_backward_hook"),
    "another module": lambda: [*layers(1), nn.Tanh()],
    "other iterations": lambda: with_options(iterations=2),
    "a bias": lambda: with_options(bias=True),
    "the reference": lambda: layers(2, backend="reference"),
    "the published scale": lambda: layers(2, method="sda", sda_scale="published"),
    "a mean over the batch": lambda: layers(2, method="sda", sda_mean="batch"),
    "another dtype": lambda: [layers(1)[0], layers(1)[0].float()],
    "nothing": lambda: [],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_stacks_call_their_layers(name, fused):
    MomentumStack(OTHERS[name]())(capsules().requires_grad_()).sum().backward()
    assert not fused


def test_stored_memory_calls_its_layers(fused):
    MomentumStack(layers(2), memory="stored")(capsules())
    assert not fused


@pytest.mark.parametrize("velocity", ["network", "block"])
@pytest.mark.parametrize(
    "method, routing_grad", [("rba", "final"), ("rba", "full"), ("sda", "full")]
)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_equals_layer_by_layer(bias, method, routing_grad, velocity, fused):
    """The same bits forward; gradients to 1e-9 of those that layers give one after the other."""
    made = layers(5, method=method, routing_grad=routing_grad, bias=bias)
    for layer in made if bias else []:
        nn.init.normal_(layer.bias)
    options = dict(gamma=0.8, velocity=velocity, anchor_every=3)
    results = []
    for memory in ("reversible", "stored"):
        stack = MomentumStack(made, memory=memory, **options)
        stack.zero_grad()
        x, v = capsules().requires_grad_(), capsules(2).requires_grad_()
        out = stack(x, v)
        out.backward(capsules(3))
        results.append([out.detach(), x.grad, v.grad, *(p.grad for p in stack.parameters())])
        with torch.no_grad():
            assert torch.equal(stack(x, v), out)
    assert len(fused) == 2
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_the_network_compiles_as_one_graph(fused):
    stack = MomentumStack(layers(3))
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    results = []
    for run in (stack, compiled):
        x = capsules().requires_grad_()
        out = run(x)
        results.append([out.detach(), *torch.autograd.grad(out, [x, *stack.parameters()], out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_stay_parameters_of_their_layers():
    stack = MomentumStack(layers(3))
    assert list(stack.state_dict()) == [f"layers.{n}.weight" for n in range(3)]
    stack(capsules()).sum().backward()
    assert all(layer.weight.grad.shape == layer.weight.shape for layer in stack.layers)


@pytest.mark.slow
def test_activation_memory_does_not_grow_with_depth(device):
    """In forward and backward, beyond weight gradients and anchors; the benchmark has 1,000."""
    ten, hundred = (activation_bytes(depth, 128, device) for depth in (10, 100))
    assert ten > 0
    # 5 MB are allowed for 1,000 layers; an x stored for each of these 90 would take 12 MB
    assert abs(hundred - ten) <= 0.5e6
