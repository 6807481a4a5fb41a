"""The networks, their configuration and initialisation."""

import math

import pytest
import torch

from mocapsnet import (
    CapsNet,
    CapsNetConfig,
    CapsuleLayer,
    CapsuleLoss,
    MoCapsNet,
    MomentumStack,
    PrimaryCapsules,
    ResCapsNet,
    ResidualStack,
    build_model,
)
from mocapsnet.depth import branch_length

SMALL = dict(channels=16, capsules=6, capsule_dim=4, class_dim=5, kernel_size=3, decoder=(12, 20))
MODELS = [CapsNet, ResCapsNet, MoCapsNet]


def images(count=4, shape=(1, 12, 10), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def rms_length(capsules):
    return capsules.square().sum(-1).mean().sqrt().item()


def test_the_paper_s_network():
    model = MoCapsNet((1, 28, 28), 10)
    assert [tuple(c.weight.shape) for c in model.convolutions if hasattr(c, "weight")] == [
        (256, 1, 9, 9),
        (256, 256, 9, 9),
    ]
    assert model.convolutions[2].stride == (2, 2)
    assert model.first.weight.shape == (1152, 8, 32, 8)
    assert [layer.weight.shape for layer in model.stack.layers] == [(32, 8, 32, 8)] * 2
    assert model.last.weight.shape == (32, 8, 10, 16)
    assert [m.out_features for m in model.decoder.layers if hasattr(m, "out_features")] == [
        512,
        1024,
        784,
    ]
    assert CapsNetConfig((3, 32, 32), 100).primary_capsules == 2048
    assert isinstance(model.stack, MomentumStack) and model.stack.gamma == 0.9
    assert isinstance(ResCapsNet((1, 28, 28), 10, **SMALL).stack, ResidualStack)


def test_convolutions_start_with_equal_weights_that_keep_the_mean_square():
    torch.manual_seed(0)
    model = CapsNet((1, 20, 20), 10, channels=64, kernel_size=5)
    first, second = model.convolutions[0].weight, model.convolutions[2].weight
    assert first.std().item() == pytest.approx(second.std().item(), rel=0.05)
    features = model.convolutions(images(8, (1, 20, 20)))
    assert features.square().mean().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("shape, stride", [((1, 12, 10), 2), ((3, 9, 14), 1)])  # not square
def test_shapes_ranges_and_gradients(model_class, shape, stride):
    model = model_class(shape, 7, blocks=2, stride=stride, **SMALL)
    labels = torch.tensor([0, 3, 6, 3])
    output = model(images(4, shape), labels)
    assert output.lengths.shape == (4, 7)
    assert output.capsules.shape == (4, 7, 5)
    assert output.reconstruction.shape == (4, *shape)
    assert ((output.lengths >= 0) & (output.lengths < 1)).all()
    assert ((output.reconstruction >= 0) & (output.reconstruction <= 1)).all()
    torch.testing.assert_close(output.lengths, output.capsules.norm(dim=-1))
    CapsuleLoss()(output, torch.rand(4, *shape), labels).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_decoder_sees_the_labelled_capsule_or_the_longest():
    model = MoCapsNet((1, 12, 10), 7, **SMALL)
    x = images()
    predicted = model(x)
    longest = predicted.lengths.argmax(1)
    assert torch.equal(model(x, longest).reconstruction, predicted.reconstruction)
    assert not torch.equal(model(x, (longest + 1) % 7).reconstruction, predicted.reconstruction)


def test_blocks_zero_is_the_plain_network():
    torch.manual_seed(0)
    models = [m((1, 12, 10), 7, blocks=0, **SMALL) for m in MODELS]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        assert torch.equal(model(images()).lengths, models[0](images()).lengths)


def test_build_model_uses_every_field_of_the_configuration():
    config = CapsNetConfig(
        (1, 12, 10),
        7,
        blocks=3,
        iterations=2,
        method="sda",
        routing_grad="full",
        sda_mean="batch",
        sda_scale="published",
        bias=0.1,
        gamma=0.7,
        velocity="block",
        memory="stored",
        anchor_every=5,
        routing_backend="reference",
        **SMALL,
    )
    model = build_model("mocapsnet", config)
    assert model.config == config
    stack = model.stack
    assert (stack.gamma, stack.velocity, stack.memory, stack.anchor_every) == (
        0.7,
        "block",
        "stored",
        5,
    )
    for layer in [model.first, *stack.layers, model.last]:
        assert (layer.iterations, layer.method, layer.routing_grad) == (2, "sda", "full")
        assert (layer.sda_mean, layer.sda_scale) == ("batch", "published")
        assert layer.backend == "reference"
        assert torch.equal(layer.bias, torch.full(layer.weight.shape[2:], 0.1))
    with pytest.raises(ValueError, match="model must be one of capsnet, rescapsnet, mocapsnet"):
        build_model("resnet", config)


def test_autocast_lowers_the_convolutions_only():
    model = MoCapsNet((1, 12, 10), 7, **SMALL)
    dtypes = {}

    def watch(name):
        return lambda module, args, output: dtypes.update({name: output.dtype})

    for name in ("convolutions", "primary", "first", "stack", "last", "decoder"):
        getattr(model, name).register_forward_hook(watch(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images())
        CapsuleLoss()(output, torch.rand(4, 1, 12, 10), torch.arange(4)).total.backward()
    assert dtypes.pop("convolutions") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("smooth", [False, True])
def test_lengths_at_the_start(smooth):
    """Every layer starts near the length it was drawn for, whatever the images look like.

    Wanted: 0.89 for primary capsules (8 / 9), squash(0.5) = 0.2 in hidden layers, squash(0.35) =
    0.11 for classes. Couplings that are not quite equal lengthen sums; a factor of two is allowed.
    """
    torch.manual_seed(0)
    x = torch.randn(16, 1, 28, 28)
    if smooth:
        x = torch.nn.functional.interpolate(x[..., :7, :7], size=(28, 28), mode="bilinear")
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    model = MoCapsNet((1, 28, 28), 10, channels=64)
    lengths = {}
    for name, module in model.named_modules():
        if isinstance(module, CapsuleLayer | PrimaryCapsules):
            module.register_forward_hook(
                lambda m, args, out, name=name: lengths.update({name: rms_length(out)})
            )
    with torch.no_grad():
        model(x)
    assert lengths["primary"] == pytest.approx(8 / 9, abs=0.1)
    for name in ("first", "stack.layers.0", "stack.layers.1"):
        assert 0.1 < lengths[name] < 0.4, name
    assert 0.05 < lengths["last"] < 0.25


@pytest.mark.parametrize("blocks", [1, 4, 20])
@pytest.mark.parametrize(
    "network, options",
    [(ResCapsNet, {}), (MoCapsNet, {}), (MoCapsNet, {"velocity": "block"})],
)
def test_a_deep_stack_starts_by_keeping_its_input(network, options, blocks):
    """Its outputs, with their weights in the last x, are together no longer than what enters it."""
    torch.manual_seed(0)
    model = network((1, 28, 28), 10, blocks=blocks, channels=64, **options)
    outputs, ends = [], {}
    for layer in model.stack.layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out.detach()))
    model.stack.register_forward_hook(lambda m, args, out: ends.update(x=args[0], y=out))
    model.stack.memory = "stored"  # the reversible one runs all layers in one operation
    with torch.no_grad():
        model(torch.randn(16, 1, 28, 28))
    entering, leaving = rms_length(ends["x"]), rms_length(ends["y"])
    weights = model.stack.stream_weights(2 * blocks)
    total = sum(w * out for w, out in zip(weights, outputs, strict=True))
    torch.testing.assert_close(ends["x"] + total, ends["y"])
    # couplings that are not quite equal lengthen sums: a factor of two is allowed, as above
    end_to_end = sum(w * rms_length(out) for w, out in zip(weights, outputs, strict=True))
    assert 0.2 * entering < end_to_end < 2 * entering
    assert entering < leaving < 2 * entering
    if network is MoCapsNet and blocks == 1:  # no need to be modest: outputs are of full length
        assert branch_length(model.stack.stream_weights, 2, 0.2) == 0.2


def test_paper_initialisation():
    torch.manual_seed(0)
    model = MoCapsNet((1, 28, 28), 10, init="paper")
    weight = model.first.weight
    assert abs(weight.std().item() - 0.01) < 3 * 0.01 / math.sqrt(2 * weight.numel())


def test_state_dict_names_each_layer():
    names = list(MoCapsNet((1, 12, 10), 7, **SMALL).state_dict())
    assert "first.weight" in names and "stack.layers.1.weight" in names and "last.weight" in names


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image_shape=(1, 16, 28)), "16x28 pixels are too small.*at least 17x17"),
        (dict(image_shape=(28, 28)), r"image_shape must be \(channels, height, width\)"),
        (dict(classes=0), "classes must be at least 1"),
        (dict(blocks=-1), "blocks must be at least 0"),
        (dict(channels=100), "channels must be a multiple of capsule_dim=8"),
        (dict(gamma=1.5), "gamma must lie between 0 and 1"),
        (dict(init="zero"), "init must be 'length' or 'paper'"),
        (dict(method="em"), "method must be one of 'rba', 'sda'"),
    ],
)
def test_bad_configurations_are_named(options, message):
    arguments = dict(image_shape=(1, 28, 28), classes=10) | options
    with pytest.raises(ValueError, match=message):
        MoCapsNet(arguments.pop("image_shape"), arguments.pop("classes"), **arguments)


def test_wrong_images_are_named():
    model = MoCapsNet((1, 12, 10), 7, **SMALL)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 12, 10\]; got \[4, 1, 10, 12\]"):
        model(images(shape=(1, 10, 12)))


def test_layers_validate_their_sizes():
    with pytest.raises(ValueError, match="must be positive"):
        CapsuleLayer(4, 0, 4, 4)
    with pytest.raises(ValueError, match="in_length and sum_length must be positive"):
        CapsuleLayer(4, 4, 4, 4, in_length=0)
    with pytest.raises(ValueError, match="cannot be grouped into capsules of dim=5"):
        PrimaryCapsules(5)(torch.randn(2, 8, 3, 3))
