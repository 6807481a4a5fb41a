"""What capsule layers tell of themselves."""

import pytest
import torch

from mocapsnet import CapsNet, CapsuleLayer, MoCapsNet, ResCapsNet, inspect_layers
from mocapsnet.kernels import votes
from mocapsnet.kernels.squash.reference import squash

SMALL = dict(blocks=2, capsules=4, capsule_dim=4, channels=8, kernel_size=3, decoder=(8,))


@pytest.mark.parametrize("method", ["rba", "sda"])
def test_couplings_are_those_that_make_the_output(method):
    torch.manual_seed(0)
    layer = CapsuleLayer(5, 3, 4, 2, method=method, bias=True, iterations=3).double()
    torch.nn.init.normal_(layer.bias)
    u = torch.randn(6, 5, 3, dtype=torch.float64)
    c = layer.couplings(u)
    assert c.shape == (3, 6, 5, 4)
    torch.testing.assert_close(c.sum(-1), torch.ones(3, 6, 5, dtype=torch.float64))
    assert torch.equal(c[0], torch.full_like(c[0], 1 / 4))
    if method == "rba":
        s = torch.einsum("bnj,bnjd->bjd", c[-1], votes(u, layer.weight)) + layer.bias
        torch.testing.assert_close(squash(s), layer(u))
    with pytest.raises(ValueError, match="must agree in N and K"):
        layer.couplings(u[:, :2])


@pytest.mark.parametrize("network", [CapsNet, ResCapsNet, MoCapsNet])
def test_every_layer_of_a_network_is_recorded(network):
    torch.manual_seed(0)
    model = network((1, 12, 10), 7, **SMALL).eval()
    images = torch.randn(3, 1, 12, 10)
    records = inspect_layers(model, images)
    stack = [f"stack.layers.{n}" for n in range(4)]
    if network is CapsNet:
        stack = [f"stack.{n}" for n in range(4)]
    assert list(records) == ["first", *stack, "last"]
    for name, record in records.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer(record.u), record.v)
        assert torch.equal(layer.couplings(record.u), record.couplings)
    torch.testing.assert_close(records["last"].v, model(images).capsules)
    assert not any(m._forward_hooks for m in model.modules())
