"""Whatever changes what calling a capsule layer means is noticed by the fused stack: its output and
gradients are those of the plain loop."""

import types

import pytest
import torch
from torch import nn
from torch.nn.modules import module
from torch.nn.utils import parametrizations, parametrize, prune

from mocapsnet import CapsuleLayer, MoCapsNet, MomentumStack

from .stacks import capsules, layers


class Scale(nn.Module):
    def forward(self, W):
        return 1.5 * W


def own_forward(layer, _):
    plain = layer.forward
    layer.forward = lambda u: 2 * plain(u)


def own_call(layer, _):
    plain = layer._call_impl
    layer._call_impl = lambda u: 2 * plain(u)


def low_rank(layer, _):
    """As LoRA does: parameters of its own, found through the layer, and a new forward."""
    layer.down = nn.Parameter(torch.randn(12, 2, dtype=torch.float64))
    layer.up = nn.Parameter(torch.randn(2, 12, dtype=torch.float64))
    plain = type(layer).forward

    def forward(self, u):
        return plain(self, u) + (u.flatten(1) @ self.down @ self.up).view_as(u)

    layer.forward = types.MethodType(forward, layer)


def patched_class(layer, monkeypatch):
    plain = CapsuleLayer.forward
    monkeypatch.setattr(CapsuleLayer, "forward", lambda self, u: 2 * plain(self, u))


def patched_call(layer, monkeypatch):
    plain = nn.Module.__call__
    double = lambda self, u: 2 * plain(self, u)  # noqa: E731
    monkeypatch.setattr(CapsuleLayer, "__call__", double, raising=False)


def subclass(layer, _):
    class Twice(CapsuleLayer):
        def forward(self, u):
            return 2 * super().forward(u)

    layer.__class__ = Twice


def global_hook(layer, monkeypatch):
    def double(m, _, output):
        return 2 * output if m is layer else None

    monkeypatch.setitem(module._global_forward_hooks, -1, double)


def global_pre_hook(layer, monkeypatch):
    def double(m, inputs):
        return (2 * inputs[0],) if m is layer else None

    monkeypatch.setitem(module._global_forward_pre_hooks, -1, double)


def weight_norm(layer, _):
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


CHANGES = {
    "a forward of its own": own_forward,
    "a call of its own": own_call,
    "low-rank adapter": low_rank,
    "the class's forward": patched_class,
    "the class's call": patched_call,
    "a subclass": subclass,
    "a global hook": global_hook,
    "a global hook before": global_pre_hook,
    "hook": lambda layer, _: layer.register_forward_hook(lambda m, u, v: 2 * v),
    "hook before": lambda layer, _: layer.register_forward_pre_hook(lambda m, u: (2 * u[0],)),
    "backward hook": lambda layer, _: layer.register_full_backward_hook(
        lambda m, du, dv: (2 * du[0],)
    ),
    "backward hook before": lambda layer, _: layer.register_full_backward_pre_hook(
        lambda m, dv: (2 * dv[0],)
    ),
    "a parametrization": lambda layer, _: parametrize.register_parametrization(
        layer, "weight", Scale()
    ),
    "weight norm": weight_norm,
    "pruning": lambda layer, _: prune.l1_unstructured(layer, "weight", 0.5),
}


def results(stack):
    stack.zero_grad()
    x = capsules().requires_grad_()
    out = stack(x)
    out.backward(capsules(seed=3))
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())]


@pytest.mark.parametrize("name", CHANGES)
def test_changed_calls_are_noticed(name, monkeypatch):
    made = layers(3)
    stack = MomentumStack(made)
    plain = results(stack)  # once fused
    CHANGES[name](made[1], monkeypatch)
    got = results(stack)
    stack.memory = "stored"
    want = results(stack)
    assert not torch.equal(got[1], plain[1])
    for a, b in zip(got, want, strict=True):
        assert b is not None and (a - b).norm() <= 1e-9 * b.norm()


def test_compiled_code_notices_a_forward_that_is_replaced_later():
    made = layers(3)
    stack = MomentumStack(made)
    compiled = torch.compile(stack, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(capsules()), stack(capsules()))
        own_forward(made[1], None)
        assert torch.equal(compiled(capsules()), stack(capsules()))


def test_a_compiled_layer_is_called(monkeypatch):
    made, calls = layers(2), []
    made[1].compile(backend="eager")
    compiled = made[1]._compiled_call_impl
    made[1]._compiled_call_impl = lambda u: (calls.append(u), compiled(u))[1]
    with torch.no_grad():
        MomentumStack(made)(capsules())
    assert len(calls) == 1


def test_offloading_to_the_cpu_by_accelerate():
    """Weights are on the meta device but for the time of a layer's call."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = MoCapsNet(
        (1, 12, 10), 7, channels=16, capsules=6, capsule_dim=4, kernel_size=3, decoder=(12,)
    )
    images = torch.randn(4, 1, 12, 10)
    want = model(images)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.stack.parameters())
    with torch.no_grad():
        got = model(images)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    lengths = model(images).lengths  # with gradients, which would not reach the weights
    torch.testing.assert_close(lengths, want.lengths, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="other parameters than it has between calls.*offload"):
        lengths.sum().backward()
