"""The convolutional network: sizes, presets, what it computes, saving and loading."""

import dataclasses

import pytest
import torch
from torch import nn

import mocapsnet
from mocapsnet import (
    CapsNet,
    CapsuleLoss,
    ConvMoCapsNet,
    ConvMoCapsNetConfig,
    MoCapsNet,
    MomentumStack,
)
from mocapsnet.conv_model import PRESETS
from mocapsnet.model import CapsNetConfig, build_model

TINY = dict(stem=(8, 8), capsules=4, capsule_dim=4, stage_strides=(1,), class_dim=4)


def tiny(shape=(1, 8, 8), classes=3, **options):
    torch.manual_seed(0)
    return ConvMoCapsNet(shape, classes, **(TINY | options))


def images(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_suits_its_size_and_sizes_near_it(size):
    for side in (size, size + size // 4 + 1):
        config = ConvMoCapsNetConfig.preset((3, side, side), 10)
        assert config == ConvMoCapsNetConfig.preset((3, side, side), 10, size)
        assert 3 <= min(map(min, config.grids)) <= max(map(max, config.grids)) <= 20
    given = ConvMoCapsNetConfig.preset((3, size, size), 10, blocks=4, capsules=2)
    assert (given.blocks, given.capsules) == (4, 2)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((1, 8, 8), {}),
        ((3, 11, 9), dict(stem_stride=2, stem=(8,), stage_strides=(2, 1), blocks=0, window=1)),
        ((3, 17, 20), dict(stem_stride=4, stem=(6,), stem_blocks=2, stage_strides=(2,), window=3)),
        ((1, 33, 40), dict(backbone="resnet18", backbone_stage=1, stage_strides=(2,))),
    ],
)
def test_the_sizes_told_are_those_of_the_layers(shape, options):
    model = tiny(shape, **options)
    seen = []
    model.convolutions[-2].register_forward_hook(lambda m, u, y: seen.append(tuple(y.shape[1:])))
    for stack in model.stages:
        if isinstance(stack, MomentumStack):
            stack.register_forward_hook(lambda m, u, y: seen.append(tuple(y.shape[1:3])))
    out = model(images(2, *shape))
    assert out.lengths.shape == (2, 3) and out.capsules.shape == (2, 3, 4)
    assert out.reconstruction is None
    assert seen[0] == model.config.features
    assert [model.config.features[1:], *seen[1:]] == model.config.grids


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=2), "window must be odd; got 2"),
        (dict(stem=()), "stem must be integers of at least 1"),
        (dict(stage_strides=(1, 0)), "stage_strides must be integers of at least 1"),
        (dict(blocks=-1), "blocks must be at least 0"),
        (dict(stem_blocks=0), "stem_blocks must be at least 1"),
        (dict(decoder=(0,)), "every width must be at least 1"),
        (dict(backbone="vgg"), "backbone must be one of None, 'resnet18'"),
        (dict(backbone="resnet18", backbone_stage=5), "backbone_stage must be one of"),
        (dict(gamma=1.0), "gamma must lie between 0 and 1"),
        (
            dict(stem=(8, 8, 8)),
            "images of 8x8 pixels are too small: they make grids of 2x2 to 2x2 capsules, where "
            "windows have 3x3; use images of at least 9x9 pixels",
        ),
        (dict(stage_strides=(1, 2)), "grids of 4x4 to 4x4 to 2x2 capsules"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_the_smallest_size_told_is_the_smallest_that_works():
    with pytest.raises(ValueError, match="at least 9x9"):
        ConvMoCapsNetConfig((1, 8, 8), 3, stem=(8, 8, 8), stage_strides=(1,))
    ConvMoCapsNetConfig((1, 9, 9), 3, stem=(8, 8, 8), stage_strides=(1,))
    with pytest.raises(ValueError, match="preset must be one of 8, 32, 64, 224; got 16"):
        ConvMoCapsNetConfig.preset((3, 16, 16), 10, 16)


def test_reversible_gradients_are_those_of_stored_activations():
    model, stored = tiny(blocks=3).double(), tiny(blocks=3, memory="stored").double()
    x, labels = images(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    for m in (model, stored):
        CapsuleLoss()(m(x, labels), x, labels).total.backward()
    for a, b in zip(model.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_samples_do_not_see_one_another():
    model = tiny(backbone="resnet18", backbone_stage=1, shape=(1, 16, 16))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not list(model.buffers())
    x = images(3, 1, 16, 16)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(x).lengths[1:2], model(x[1:2]).lengths)


def test_votes_see_the_position():
    """The same capsules at other places of the last grid make other class capsules."""
    model = tiny()
    features = images(1, 16, 4, 4)
    assert not torch.allclose(model.route(features), model.route(features.flip(3)), atol=1e-3)


def test_lengths_at_the_start():
    """Through ten stages and layers no capsules vanish or saturate."""
    torch.manual_seed(0)
    model = ConvMoCapsNet(**vars(ConvMoCapsNetConfig.preset((3, 32, 32), 10, blocks=4)))
    seen = []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, u, y: seen.append(y))
    with torch.no_grad():
        lengths = model(images(2, 3, 32, 32)).lengths
    for capsules in seen:
        assert 0.1 < capsules.square().sum(-1).mean().sqrt() < 0.8
    assert 0.05 < lengths.mean() < 0.6


def test_it_learns_and_draws(tmp_path):
    """Three classes of a bright corner each; with a decoder that draws them."""
    model = tiny(decoder=(16,))
    labels = torch.arange(48) % 3
    pixels = 0.1 * torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for k, (y, x) in enumerate([(0, 0), (0, 5), (5, 5)]):
        pixels[labels == k, :, y : y + 3, x : x + 3] += 0.8
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    given = model.preprocessing(pixels)
    losses = []
    for _ in range(40):
        loss = CapsuleLoss()(model(given, labels), pixels, labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.class_names = ("a", "b", "c")
    found = model.predict(pixels)
    assert (found.labels == labels).float().mean() > 0.95
    loaded = mocapsnet.load(model.save_pretrained(tmp_path / "model"))
    assert type(loaded) is ConvMoCapsNet and loaded.config == model.config
    again = loaded.predict(pixels)
    assert torch.equal(again.lengths, found.lengths) and again.names == found.names
    assert torch.equal(again.reconstruction, found.reconstruction)


def test_without_a_decoder_there_is_no_reconstruction(tmp_path):
    model = tiny()
    x, labels = images(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    found = model.predict(torch.rand(2, 1, 8, 8))
    assert found.reconstruction is None and found.capsules.shape == (2, 3, 4)
    parts = CapsuleLoss()(model(x, labels), x, labels)
    assert parts.total == parts.margin and parts.reconstruction == 0
    with pytest.raises(ValueError, match="labels must be class indices"):
        model(x, labels.float())
    loaded = mocapsnet.load(model.save_pretrained(tmp_path / "model"))
    assert loaded.decoder is None


def test_networks_are_not_taken_for_one_another(tmp_path):
    folder = tiny().save_pretrained(tmp_path / "model")
    assert type(CapsNet.from_pretrained(folder)) is ConvMoCapsNet
    with pytest.raises(ValueError, match="it holds a ConvMoCapsNet, not a MoCapsNet"):
        MoCapsNet.from_pretrained(folder)
    small = dict(capsules=4, capsule_dim=4, channels=8, kernel_size=3, decoder=(8,))
    other = MoCapsNet((1, 8, 8), 3, **small).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it holds a MoCapsNet, not a ConvMoCapsNet"):
        ConvMoCapsNet.from_pretrained(other)

    class Mine(ConvMoCapsNet):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine
    config = ConvMoCapsNetConfig((1, 8, 8), 3, **TINY)
    assert type(build_model("conv-mocapsnet", config)) is ConvMoCapsNet
    with pytest.raises(ValueError, match="mocapsnet is built from a CapsNetConfig; got a ConvMo"):
        build_model("mocapsnet", config)
    with pytest.raises(ValueError, match="conv-mocapsnet is built from a ConvMoCapsNetConfig"):
        build_model("conv-mocapsnet", CapsNetConfig((1, 8, 8), 3, **small))
    with pytest.raises(ValueError, match="model must be one of .*conv-mocapsnet.*got 'cnn5'"):
        build_model("cnn5", config)


def test_a_backbone_needs_torchvision(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"resnet34 needs torchvision: pip install"):
        tiny((3, 32, 32), backbone="resnet34", backbone_stage=1)


def test_a_configuration_says_all_about_a_network():
    model = tiny(blocks=2)
    again = ConvMoCapsNet(**dataclasses.asdict(model.config))
    again.load_state_dict(model.state_dict())
    x = images(2, 1, 8, 8)
    assert torch.equal(model(x).lengths, again(x).lengths)
