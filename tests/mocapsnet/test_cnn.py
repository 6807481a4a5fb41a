"""The plain convolutional network: as many parameters, logits and loss, saved and read."""

import pytest
import torch
import torchvision
from torch.nn import functional as F

from mocapsnet import (
    CNN,
    CapsNet,
    CNNLoss,
    MoCapsNet,
    ResCapsNet,
    ResNet18,
    build_model,
    load,
    onnx_export,
)

SMALL = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))


def network(shape=(1, 12, 10), **options):
    torch.manual_seed(0)
    return CNN(shape, 3, **SMALL | options)


@pytest.mark.parametrize(
    "options",
    [
        {},  # the paper's, on MNIST
        dict(blocks=8, bias=0.1),  # more than the convolutions' share; biases count
        dict(channels=32, decoder=(128, 256)),
        dict(kernel_size=3, stride=1, decoder=()),
    ],
)
def test_as_many_parameters_as_mocapsnet(options):
    cnn, capsules = (model((1, 28, 28), 10, **options) for model in (CNN, MoCapsNet))
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (cnn, capsules))
    width = cnn.dense[2].out_features
    a_unit = cnn.dense[2].in_features + 1 + 10
    assert width > 200  # where the capsules' parameters went
    assert abs(ours - theirs) <= a_unit / 2
    assert abs(ours / theirs - 1) < 0.002


def test_probabilities_logits_and_loss():
    model = network().eval()
    images, labels = torch.randn(5, 1, 12, 10), torch.tensor([0, 2, 1, 1, 0])
    out = model(images, labels)
    features = model.convolutions(images)
    hidden = F.relu(F.linear(F.relu(features).flatten(1), *model.dense[2].parameters()))
    logits = F.linear(hidden, *model.dense[4].parameters())
    torch.testing.assert_close(out.capsules.squeeze(2), logits)
    torch.testing.assert_close(out.lengths.sum(1), torch.ones(5))
    assert torch.equal(out.lengths.argmax(1), logits.argmax(1))
    assert out.reconstruction is None
    loss = CNNLoss()(out, torch.rand(5, 1, 12, 10), labels)
    torch.testing.assert_close(loss.total, F.cross_entropy(logits, labels, reduction="sum"))
    assert loss.margin is loss.total and loss.reconstruction == 0
    each = CNNLoss().margin.each(out.lengths, labels)
    torch.testing.assert_close(each, F.cross_entropy(logits, labels, reduction="none"))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(CNNLoss()(out, images, labels.to(dtype)).total, loss.total)
    # Mixed images: shares of the classes, here all of one.
    shares = F.one_hot(labels, 3).float()
    torch.testing.assert_close(CNNLoss()(out, images, shares).total, loss.total)
    torch.testing.assert_close(CNNLoss().margin.each(out.lengths, shares), each)
    # Far from what a softmax in float32 can tell from zero.
    sure = torch.tensor([[[0.0], [200.0], [0.0]]])
    sure = out._replace(lengths=sure.squeeze(2).softmax(1), capsules=sure)
    assert CNNLoss()(sure, images[:1], labels[:1]).total == 200


def test_wrong_images_and_labels_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 12, 10\]"):
        network()(torch.randn(2, 1, 10, 12))
    with pytest.raises(ValueError, match="labels"):
        network()(torch.randn(2, 1, 12, 10), torch.zeros(3, dtype=torch.int64))


def test_half_precision_answers_in_float32():
    out = network().bfloat16()(torch.randn(2, 1, 12, 10))
    assert out.lengths.dtype == out.capsules.dtype == torch.float32


def test_saved_loaded_and_exported(tmp_path):
    model = network(shape=(3, 12, 10)).eval()
    model.class_names = ("ant", "bee", "cat")
    model.save_pretrained(tmp_path / "model")
    pixels = torch.rand(4, 3, 12, 10)
    loaded = load(tmp_path / "model")
    assert type(loaded) is CNN is type(CapsNet.from_pretrained(tmp_path / "model"))
    found = loaded.predict(pixels)
    assert torch.equal(found.lengths, model.predict(pixels).lengths)
    assert found.reconstruction is None and set(found.names) <= set(model.class_names)
    with pytest.raises(ValueError, match="it holds a CNN, not a ResCapsNet"):
        ResCapsNet.from_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "convolutional network" in card and "routing" not in card
    exported = onnx_export._Graph(onnx_export._plain(model))(pixels)
    assert onnx_export.outputs(model) == ["lengths", "capsules"] and len(exported) == 2
    torch.testing.assert_close(exported[0], found.lengths)


def test_resnet18_is_torchvisions():
    torch.manual_seed(0)
    model = ResNet18((3, 40, 40), 7).eval()
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), model.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(model(images).capsules.squeeze(2), theirs(images))
    assert model(images).lengths.sum(1).sub(1).abs().max() < 1e-6
    assert ResNet18((1, 8, 8), 7)(torch.randn(2, 1, 8, 8)).lengths.shape == (2, 7)
    with pytest.raises(ValueError, match=r"classes must be at least 1; got 0"):
        ResNet18((3, 8, 8), 0)


def test_prediction_leaves_the_mode_of_every_module():
    """As of normalisation that is kept from learning while the rest is trained."""
    model = ResNet18((1, 8, 8), 3).train()
    frozen = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in frozen:
        m.eval()
    modes = [m.training for m in model.modules()]
    model.predict(torch.rand(2, 1, 8, 8))
    assert [m.training for m in model.modules()] == modes and len(frozen) == 20


class Merging(torch.nn.BatchNorm2d):
    """Does something when its mode changes, as adapters do that merge their weights."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_prediction_goes_back_to_training_as_modules_do():
    model = ResNet18((1, 8, 8), 3).train()
    model.added = Merging(1)
    model.predict(torch.rand(2, 1, 8, 8))
    assert model.added.training and not model.added.merged


def test_resnet18_saved_loaded_and_exported(tmp_path):
    model = ResNet18((3, 20, 20), 4).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    pixels = torch.rand(2, 3, 20, 20)
    assert type(loaded) is ResNet18
    found = loaded.predict(pixels)
    assert torch.equal(found.lengths, model.predict(pixels).lengths)
    exported = onnx_export._Graph(onnx_export._plain(model))(pixels)
    torch.testing.assert_close(exported[0], found.lengths)


@pytest.mark.filterwarnings("ignore")  # torch.ao's, of what replaces it
def test_dynamically_quantised():
    model = network().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    images = torch.randn(2, 1, 12, 10)
    difference = quantised(images).lengths - model(images).lengths
    assert 0 < difference.abs().max() < 0.1


def test_built_by_name():
    model = network()
    assert type(build_model("cnn", model.config)) is CNN
    with pytest.raises(ValueError, match="one of .*, resnet18; got .vgg."):
        build_model("vgg", model.config)
