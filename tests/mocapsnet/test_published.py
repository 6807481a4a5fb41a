"""Networks of the published code compute here what its description says, written out again."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mocapsnet import CapsNet, MoCapsNet, MomentumStack, Preprocessing, ResCapsNet, load
from mocapsnet.published import TwiceSkippedStack, load_published

CHANNELS, K, J, CLASSES, D, KERNEL = 16, 4, 5, 3, 6, 3
ITERATIONS, GAMMA = 3, 0.8


def weights(colours=1, side=12, blocks=2, momentum=True, block_scale=1.0, sda=False):
    """A state dict with that code's names and layouts, drawn so that outputs are far from zero."""
    generator = torch.Generator().manual_seed(0)
    N = CHANNELS // K * ((side - 2 * (KERNEL - 1)) // 2) ** 2

    def draw(*shape, scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    inside = "0.network." if momentum else ""
    state = {
        "conv1.weight": draw(CHANNELS, colours, KERNEL, KERNEL, scale=0.5),
        "conv1.bias": draw(CHANNELS, scale=0.1),
        "primary.conv.weight": draw(CHANNELS, CHANNELS, KERNEL, KERNEL, scale=0.1),
        "primary.conv.bias": draw(CHANNELS, scale=0.1),
        "caps1.W": draw(1, J, N, K, K, scale=0.3),
        "caps2.W": draw(1, CLASSES, J, D, K, scale=0.5),
    }
    for b in range(blocks):
        for k in range(2):
            name = f"blocks.{b}.functions.{inside}{k}.0.W"
            state[name] = draw(1, J, J, K, K, scale=block_scale)
    for name in [name for name in state if sda and name.endswith(".W")]:
        W = state[name]
        state[name[:-1] + "bias"] = 0.1 + draw(1, W.shape[1], W.shape[3], scale=0.05)
    sizes = [CLASSES * D, 7, 8, colours * side * side]
    for n, (size_in, size_out) in zip((0, 2, 4), zip(sizes, sizes[1:], strict=False), strict=True):
        state[f"decoder.{n}.weight"] = draw(size_out, size_in, scale=0.5)
        state[f"decoder.{n}.bias"] = draw(size_out, scale=0.1)
    return state


def squash(s):
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s / (square.sqrt() + 1e-8)


def capsules(state, name, u):
    """Votes [B, J, N, D], softmax over the output capsules, the last sum without an update.

    With a bias, scaled-distance agreement, whose parenthesis ends too early.
    """
    u_hat = torch.einsum("jndk,bnk->bjnd", state[f"{name}.W"][0], u)
    b = torch.zeros_like(u_hat[..., 0])
    if f"{name}.bias" in state:
        length = u_hat.norm(dim=-1, keepdim=True)
        u_hat = u_hat / length * torch.minimum(length, u.norm(dim=-1)[:, None, :, None])
        for _ in range(ITERATIONS):
            v = squash((b.softmax(1).unsqueeze(-1) * u_hat).sum(2) + state[f"{name}.bias"])
            d = (v.unsqueeze(2) - u_hat).norm(dim=-1)
            m = d.mean().item()
            b = (math.log(0.9 * (d.shape[1] - 1)) - math.log(1 - 0.9) / (0.5 * m - m)) * d
        return v
    for _ in range(ITERATIONS - 1):
        v = squash((b.softmax(1).unsqueeze(-1) * u_hat).sum(2))
        b = b + torch.einsum("bjnd,bjd->bjn", u_hat, v)
    return squash((b.softmax(1).unsqueeze(-1) * u_hat).sum(2))


def their_network(state, images, blocks, momentum, residual):
    """Lengths, capsules, reconstruction."""
    x = F.conv2d(images, state["conv1.weight"], state["conv1.bias"]).relu()
    x = F.conv2d(x, state["primary.conv.weight"], state["primary.conv.bias"], stride=2)
    x = capsules(state, "caps1", squash(x.reshape(len(x), -1, K)))
    for b in range(blocks):
        if momentum:
            y, v = x, torch.zeros_like(x)
            for k in range(2):
                f = capsules(state, f"blocks.{b}.functions.0.network.{k}.0", y)
                v = GAMMA * v + (1 - GAMMA) * f
                y = y + v
            x = x + y if residual else y
            continue
        for k in range(2):
            f = capsules(state, f"blocks.{b}.functions.{k}.0", x)
            x = x + f if residual else f
    out = capsules(state, "caps2", x)
    lengths = out.norm(dim=-1)
    y = (out * F.one_hot(lengths.argmax(1), CLASSES).unsqueeze(-1)).flatten(1)
    for n in (0, 2, 4):
        y = y @ state[f"decoder.{n}.weight"].T + state[f"decoder.{n}.bias"]
        y = y.relu() if n < 4 else y.sigmoid()
    return lengths, out, y.view_as(images)


@pytest.mark.parametrize("colours, side", [(1, 12), (3, 14)])
@pytest.mark.parametrize(
    "momentum, residual, model_class",
    [
        (True, True, MoCapsNet),
        (True, False, MoCapsNet),
        (False, True, ResCapsNet),
        (False, False, CapsNet),
    ],
)
@pytest.mark.parametrize("sda", [False, True])
def test_the_same_outputs(momentum, residual, model_class, colours, side, sda, tmp_path):
    blocks = 2
    # Without a skip connection capsules shrink from layer to layer, unless weights are large.
    state = weights(colours, side, blocks, momentum, block_scale=1.0 if residual else 2.5, sda=sda)
    torch.save({name: w.float() for name, w in state.items()}, tmp_path / "0.5_now.pth.tar")
    model = load_published(tmp_path / "0.5_now.pth.tar", residual=residual, gamma=GAMMA)
    assert type(model) is model_class and not model.training
    assert model.config.method == ("sda" if sda else "rba")
    torch.manual_seed(0)
    pixels = torch.rand(4, colours, side, side, dtype=torch.float64)
    mean, std = (0.1307, 0.3081) if colours == 1 else (0.5, 0.5)
    expected = their_network(state, (pixels - mean) / std, blocks, momentum, residual)
    assert expected[0].max() > (0.3 if residual or not sda else 0.08)  # votes are shortened
    assert (expected[1][0] - expected[1][1]).abs().max() > 1e-3  # not what the biases make alone
    for found in (model.predict(pixels), load(model.save_pretrained(tmp_path)).predict(pixels)):
        for name, other in zip(("lengths", "capsules", "reconstruction"), expected, strict=True):
            torch.testing.assert_close(getattr(found, name).double(), other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sda", [False, True])
def test_a_state_dict_of_several_devices_in_float64(sda):
    """DataParallel puts "module." in front of every name."""
    state = weights(sda=sda)
    model = load_published({f"module.{name}": w for name, w in state.items()}, gamma=GAMMA)
    assert model.config.skip == "twice" and len(model.stack.blocks) == 2
    images = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    expected = their_network(state, images, 2, True, True)
    found = model(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)  # that code's epsilon in squash
    before = {name: w.clone() for name, w in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(w, before[name]) for name, w in state.items())


def test_twice_skipped_blocks_train_in_either_memory():
    torch.manual_seed(0)
    options = dict(channels=8, kernel_size=3, capsules=4, decoder=(8,), blocks=3)
    model = MoCapsNet((1, 12, 12), 3, skip="twice", velocity="block", **options).double()
    other = MoCapsNet((1, 12, 12), 3, skip="twice", velocity="block", memory="stored", **options)
    other.double().load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    for network in (model, other):
        network(images).lengths.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert all(p.grad.abs().max() > 0 for p in model.stack.parameters())
    once = MoCapsNet((1, 12, 12), 3, velocity="block", **options)
    for a, b in zip(model.stack.layers, once.stack.layers, strict=True):
        assert a.std == b.std
    assert model.last.std == once.last.std
    x = torch.rand(2, 4, 8, dtype=torch.float64)
    y = x
    for n in range(0, 6, 2):
        v = 0.1 * model.stack.layers[n](y)
        w = 0.9 * v + 0.1 * model.stack.layers[n + 1](y + v)
        y = 2 * y + v + w
    torch.testing.assert_close(model.stack(x), y)
    with pytest.raises(ValueError, match="skip='twice' needs velocity='block'"):
        MoCapsNet((1, 12, 12), 3, skip="twice", **options)
    with pytest.raises(ValueError, match="skip must be one of 'once', 'twice'"):
        MoCapsNet((1, 12, 12), 3, skip="thrice", **options)


@pytest.mark.parametrize("twice", [False, True])
def test_reversal_over_one_block_adds_no_error_at_any_depth(twice):
    """Where the velocity starts anew in every block, so does the error of going back."""
    torch.manual_seed(0)
    base = MomentumStack.of_capsules(40, 6, 4, velocity="block")
    x, dy = torch.rand(3, 6, 4) - 0.5, torch.randn(3, 6, 4)

    def gradients(memory, dtype):
        stack = copy.deepcopy(base)
        stack.memory = memory
        stack = (TwiceSkippedStack(stack) if twice else stack).to(dtype)
        given = x.to(dtype, copy=True).requires_grad_()
        stack(given).backward(dy.to(dtype))
        parts = [given.grad, *(p.grad for p in stack.parameters())]
        return torch.cat([part.flatten().double() for part in parts])

    true = gradients("stored", torch.float64)
    stored, reversible = (
        (gradients(memory, torch.float32) - true).norm() for memory in ("stored", "reversible")
    )
    assert reversible < 2 * stored and stored < 1e-6 * true.norm()


def test_preprocessing_that_is_given_is_kept():
    model = load_published(weights(), preprocessing=Preprocessing("none"))
    assert model.preprocessing == Preprocessing("none")


def test_what_is_no_such_checkpoint_is_refused(tmp_path):
    state = weights()
    with pytest.raises(ValueError, match="it has no 'caps2.W'"):
        load_published({name: w for name, w in state.items() if name != "caps2.W"})
    with pytest.raises(ValueError, match="extra.weight is not known"):
        load_published(state | {"extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="it has no 'caps2.bias'"):
        load_published(state | {"caps1.bias": torch.ones(1, J, K)})
    with pytest.raises(ValueError, match="caps2.bias is not known"):
        load_published(state | {"caps2.bias": torch.ones(1, CLASSES, D)})
    with pytest.raises(ValueError, match="sizes do not fit"):
        load_published(state | {"caps1.W": torch.ones(1, J, 7, K, K)})
    path = tmp_path / "model.pth.tar"
    torch.save(nn.Linear(2, 2), path)  # a whole module, which only unpickling could read
    with pytest.raises(ValueError, match="model.pth.tar cannot be read"):
        load_published(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="model.pth.tar holds no state dict"):
        load_published(path)
    for wrapped in ({"state_dict": state}, {"epoch": 3, **state}):
        with pytest.raises(ValueError, match="checkpoint holds no state dict"):
            load_published(wrapped)
    with pytest.raises(ValueError, match="none.pth.tar cannot be read"):
        load_published(tmp_path / "none.pth.tar")


def test_an_empty_batch_of_pixels_grouped():
    from mocapsnet import PrimaryCapsules

    for grouping in ("channels", "pixels"):
        layer = PrimaryCapsules(4, grouping=grouping)
        assert layer(torch.zeros(0, 8, 3, 2)).shape == (0, 12, 4)
    with pytest.raises(ValueError, match="the 9 values of a feature map"):
        PrimaryCapsules(4, grouping="pixels")(torch.zeros(0, 1, 3, 3))


def test_pixels_grouped_are_traced_and_exported_for_any_batch():
    from mocapsnet import PrimaryCapsules

    layer, x = PrimaryCapsules(4, grouping="pixels"), torch.randn(3, 8, 3, 2)
    other = torch.randn(5, 8, 3, 2)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=False).module()
    for made in (torch.jit.trace(layer, x), exported):
        torch.testing.assert_close(made(other), layer(other))
