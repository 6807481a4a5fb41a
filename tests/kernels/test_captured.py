"""What launches Triton kernels neither reads tensors nor makes some of numbers of the host, so that
a CUDA graph can capture it; see ../train/fake_graph.py."""

from __future__ import annotations

import pytest
import torch

from mocapsnet.kernels import momentum_routing, primary_capsules, routing, squash, votes
from mocapsnet.kernels.launch import recording

from ..train.fake_graph import Functions, Operations, Refused, under

pytest.importorskip("triton")

MODES = [(method, grad) for method in ("rba", "sda") for grad in ("final", "full")]


def leaves(*shapes, device):
    return [torch.rand(shape, device=device, requires_grad=True) for shape in shapes]


def captured(call, *inputs):
    """The launches of a call and its backward pass, none of which is made."""
    with recording() as launches, Functions(), under(Operations()):
        out = call(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return launches


def test_single_operations(device):
    u, W = leaves((2, 3, 4), (3, 4, 5, 6), device=device)
    assert len(captured(lambda s: squash(s, backend="triton"), u)) == 2
    assert len(captured(lambda u, W: votes(u, W, backend="triton"), u, W)) >= 2
    (features,) = leaves((2, 8, 3, 3), device=device)
    assert len(captured(lambda f: primary_capsules(f, 4, backend="triton"), features)) == 2


# On chip, and streamed in two ways: few samples, and a batch that tensor cores take.
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (4, 1152, 8, 32, 8), (128, 1152, 8, 32, 8)])
@pytest.mark.parametrize(("method", "routing_grad"), MODES)
def test_routing(shape, method, routing_grad, device):
    B, N, K, J, D = shape
    inputs = leaves((B, N, K), (N, K, J, D), (J, D), device=device)
    options = dict(method=method, routing_grad=routing_grad, backend="triton")
    assert len(captured(lambda u, W, b: routing(u, W, bias=b, **options), *inputs)) >= 2


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 64, 32)], ids=["on chip", "layer by layer"])
@pytest.mark.parametrize(("method", "routing_grad"), MODES)
def test_momentum_routing(shape, method, routing_grad, device):
    B, J, D = shape
    x, v, *weights = leaves(shape, shape, *[(J, D, J, D)] * 3, device=device)
    options = dict(method=method, routing_grad=routing_grad, anchor_every=2, backend="triton")

    def call(x, v, *weights):
        return momentum_routing(x, v, weights, **options)

    if shape[1] == 4:  # the table of the weights' addresses is not there before the first call
        from mocapsnet.kernels.momentum.triton import addresses

        addresses.cache_clear()  # nor one of weights that lay there before
        with pytest.raises(Refused, match="tensor"):
            captured(call, x, v, *weights)
        with recording():
            call(x, v, *weights)
    assert len(captured(call, x, v, *weights)) >= 4
