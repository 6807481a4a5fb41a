"""Networks saved to folders and read from there, and what they predict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mocapsnet
from mocapsnet import (
    CapsNet,
    MoCapsNet,
    ModelCard,
    Preprocessing,
    ResCapsNet,
    load,
    onnx_export,
)
from mocapsnet.preprocessing import normalise

SHAPE = (1, 12, 10)
SMALL = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))
KEPT = Path(__file__).with_name("kept")


def network(model_class=MoCapsNet, shape=SHAPE, **options):
    torch.manual_seed(0)
    model = model_class(shape, 3, **SMALL | options)
    model.class_names = ["ant", "bee", "cat"]
    return model


def pixels(count=5, shape=SHAPE):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def assert_same(a, b):
    assert a.names == b.names
    for one, other in zip(a, b, strict=True):
        assert one == other if isinstance(one, list) else torch.equal(one, other)


@pytest.mark.parametrize(
    "model_class, options",
    [
        (CapsNet, dict(blocks=0)),
        (ResCapsNet, dict(blocks=2, method="sda", iterations=2)),
        (MoCapsNet, dict(gamma=0.7, velocity="block", grouping="pixels", anchor_every=3)),
    ],
)
def test_saved_and_loaded(model_class, options, tmp_path):
    model = network(model_class, **options)
    model.preprocessing = Preprocessing("fixed", (0.25,), (0.5,))
    folder = model.save_pretrained(tmp_path / "deep" / "model")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    state = torch.get_rng_state()
    for loaded in (model_class.from_pretrained(folder), CapsNet.from_pretrained(folder)):
        assert type(loaded) is model_class
        assert loaded.config == model.config and loaded.preprocessing == model.preprocessing
        assert loaded.class_names == ("ant", "bee", "cat") and not loaded.training
        assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
        assert_same(loaded.predict(pixels()), model.predict(pixels()))
    assert_same(load(folder).predict(pixels()), model.predict(pixels()))
    assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing


def test_what_predict_returns(tmp_path):
    model = network().train()
    images = (pixels() * 255).to(torch.uint8)
    found = model.predict(images, batch_size=2)
    assert model.training
    expected = model.eval()(normalise(images.float() / 255))
    torch.testing.assert_close(found.lengths, expected.lengths)
    torch.testing.assert_close(found.capsules, expected.capsules)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction)
    assert torch.equal(found.labels, expected.lengths.argmax(1))
    assert found.names == [["ant", "bee", "cat"][k] for k in found.labels]
    assert torch.equal(found.pixels, images / 255)
    assert not found.lengths.requires_grad

    path = tmp_path / "image.png"
    Image.fromarray(images[0, 0].numpy()).save(path)
    one = model.predict(path)
    assert one.lengths.shape == (1, 3) and one.names == found.names[:1]
    torch.testing.assert_close(one.lengths, found.lengths[:1])
    assert torch.equal(model.predict([path, images[1]]).labels, found.labels[:2])
    assert model.predict(images[:0]).lengths.shape == (0, 3)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        model.predict(images, batch_size=0)
    double = network().double().predict(images)
    assert double.lengths.dtype == torch.float64
    torch.testing.assert_close(double.lengths.float(), found.lengths)


def test_class_names_are_one_for_each_class():
    model = MoCapsNet(SHAPE, 3, **SMALL)
    assert model.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="one for each of 3 classes; got 2"):
        model.class_names = ["ant", "bee"]
    with pytest.raises(ValueError, match="must be a sequence of strings; got 'abc'"):
        model.class_names = "abc"
    with pytest.raises(ValueError, match="must be a sequence of strings"):
        model.class_names = [1, 2, 3]


def test_a_format_that_was_released_is_read_for_ever():
    """Written by format 1. If this fails, read both formats; do not write the folder again."""
    loaded = load(KEPT / "format-1")
    expected = load_file(KEPT / "expected.safetensors")
    assert type(loaded) is MoCapsNet and loaded.class_names == ("ant", "bee", "cat")
    assert loaded.preprocessing == Preprocessing("image")
    found = loaded.predict(expected["pixels"])
    torch.testing.assert_close(found.lengths, expected["lengths"])
    torch.testing.assert_close(found.reconstruction, expected["reconstruction"])


def changed(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = config[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(format=99, library="mocapsnet 9.0"), "format 99, written by mocapsnet 9.0.*upgrade"),
        (dict(format=None), "no format's version"),
        (dict(model=None), "config.json is damaged: it has no model"),
        (dict(class_names=None), "config.json is damaged: it has no class_names"),
        (dict(preprocessing=None), "config.json is damaged: it has no preprocessing"),
        (dict(model="vgg"), "model must be one of capsnet, rescapsnet, mocapsnet, .*got 'vgg'"),
        (dict(network={"depth": 3}), "config.json: .*unexpected keyword argument 'depth'"),
        (dict(network={"gamma": 2}), "config.json: gamma must lie between 0 and 1"),
        (dict(network={"classes": 4}), "one for each of 4 classes; got 3"),
        (dict(network={"capsules": 5}), r"first.weight is \[24, 4, 4, 4\] there, and \[24, 4, 5"),
        (dict(network={"decoder": 6}), "config.json: "),
        (dict(network="none"), "config.json: "),
        (dict(preprocessing={"crop": 1}), "config.json: .*'crop'"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(changes, message, tmp_path):
    folder = network().save_pretrained(tmp_path)
    changed(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_option_that_is_missing_has_its_default_only_in_older_formats(tmp_path):
    folder = network().save_pretrained(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["network"]["bias"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json is damaged: it has no network.bias"):
        load(folder)
    path.write_text(json.dumps(config | {"format": 1}))
    assert load(folder).config.bias is None


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = network().save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["network"]["gamma"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="damaged: it has no network.gamma"):
        load(folder)
    (folder / "config.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="config.json is damaged"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist"):
        load(folder)
    network().save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "last.weight"}, weights)
    with pytest.raises(ValueError, match=r"last.weight is missing there, and \[4, 4, 3, 4\]"):
        load(folder)
    torch.save({"a": torch.ones(1)}, weights)  # a pickle is not read
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        load(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "none")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="a run without a trained network yet"):
        load(tmp_path / "run")


def test_classes_that_do_not_fit_and_derived_ones(tmp_path):
    class Mine(MoCapsNet):
        pass

    folder = network(Mine).save_pretrained(tmp_path)
    assert type(load(folder)) is MoCapsNet
    assert type(Mine.from_pretrained(folder)) is Mine
    with pytest.raises(ValueError, match="holds a MoCapsNet, not a ResCapsNet"):
        ResCapsNet.from_pretrained(folder)


class Inverted(Preprocessing):
    def __call__(self, pixels):
        return super().__call__(1 - pixels)


def of_one_iteration(model):
    model.first.iterations = model.last.iterations = 1


CHANGES = {
    "preprocessing is a Inverted, which no file describes": lambda m: setattr(
        m, "preprocessing", Inverted()
    ),
    r"first.iterations is 1, and 3 by its config; build the network": of_one_iteration,
    r"decoder.layers.0.weight is missing in the network": lambda m: setattr(m, "decoder", None),
    r"stack.gamma is 0.1, and 0.9 by its config": lambda m: setattr(m.stack, "gamma", 0.1),
    r"last.weight is \[4, 4, 5, 4\] in the network, and \[4, 4, 3, 4\]": lambda m: setattr(
        m, "last", mocapsnet.CapsuleLayer(4, 4, 5, 4)
    ),
    r"primary.grouping is pixels, and channels by its config": lambda m: setattr(
        m, "primary", mocapsnet.PrimaryCapsules(4, grouping="pixels")
    ),
    r"convolutions.1 is a SiLU, and a ReLU by its config": lambda m: m.convolutions.__setitem__(
        1, torch.nn.SiLU()
    ),
    r"convolutions.3 is in the network, and not by its config": lambda m: m.convolutions.append(
        torch.nn.Tanh()
    ),
}


def test_modules_that_change_no_output_are_saved_without(tmp_path):
    class Mine(MoCapsNet):
        def __init__(self, image_shape, classes, margin=0.4, **options):
            super().__init__(image_shape, classes, **options)
            self.loss = mocapsnet.CapsuleLoss(margin)

    model = network()
    model.loss = mocapsnet.CapsuleLoss()
    model.probe = torch.nn.Identity()
    want = model.eval().predict(pixels()).lengths
    assert torch.equal(load(model.save_pretrained(tmp_path)).predict(pixels()).lengths, want)
    network(Mine).save_pretrained(tmp_path)
    resnet = mocapsnet.ResNet18((1, 24, 24), 3)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(resnet).save_pretrained(tmp_path)
    assert type(load(tmp_path)) is mocapsnet.ResNet18


@pytest.mark.parametrize("said", CHANGES)
def test_what_no_file_would_describe_is_not_written(said, tmp_path):
    model = network()
    folder = model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    CHANGES[said](model)
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_preprocessing_of_one_s_own_is_exported():
    """As it is in the graph."""
    model = network().eval()
    model.preprocessing = Inverted()
    graph = onnx_export._Graph(onnx_export._plain(model))
    torch.testing.assert_close(graph(pixels())[0], model.predict(pixels()).lengths)
    model.stack.gamma = 0.1
    with pytest.raises(ValueError, match="stack.gamma is 0.1, and 0.9 by its config"):
        onnx_export._plain(model)


def test_a_folder_is_whole_whatever_is_asked_to_be_written(tmp_path):
    folder = network().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = network(gamma=0.5)
    for card in (ModelCard(picture="no.png"), ModelCard(accuracy="none")):
        with pytest.raises((OSError, ValueError)):
            other.save_pretrained(folder, card)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    torch.manual_seed(0)
    numbers = MoCapsNet(SHAPE, np.int64(3), **SMALL | dict(capsules=np.int32(4)))
    card = ModelCard("digits", accuracy=torch.tensor(0.5), validation_accuracy=np.float32(0.25))
    found = load(numbers.save_pretrained(folder, card))
    assert_same(found.predict(pixels()), numbers.predict(pixels()))
    text = (folder / "README.md").read_text()
    assert "| 50.00% |" in text and "| 25.00% |" in text and '"value": 0.5' in text


def test_a_derived_network_with_arguments_of_its_own_is_saved_as_ours(tmp_path):
    class Mine(MoCapsNet):
        def __init__(self):
            super().__init__(SHAPE, 3, **SMALL)

    class Counting(MoCapsNet):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.spread = float(
                self.last.weight.detach().std()
            )  # of numbers that are not there on "meta"

    assert load(network(Counting).save_pretrained(tmp_path)).config == network().config
    model = Mine()
    found = load(model.save_pretrained(tmp_path))
    assert type(found) is MoCapsNet
    assert torch.equal(found.predict(pixels()).lengths, model.predict(pixels()).lengths)


def test_the_machine_s_backend_is_not_saved(tmp_path):
    model = network(routing_backend="reference")
    assert load(model.save_pretrained(tmp_path)).config.routing_backend is None


def test_a_folder_that_holds_a_network_may_hold_other_folders(tmp_path):
    network().save_pretrained(tmp_path)
    for name in ("checkpoints", "model"):
        (tmp_path / name).mkdir()
    assert CapsNet.from_pretrained(tmp_path).class_names == ("ant", "bee", "cat")
    assert load(tmp_path).class_names == ("ant", "bee", "cat")


def test_a_run_s_network_is_found(tmp_path):
    network().save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text("{}")  # the run's own
    assert load(tmp_path).class_names == ("ant", "bee", "cat")
    assert CapsNet.from_pretrained(tmp_path).class_names == ("ant", "bee", "cat")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "config.json").write_text('{"format": 99, "options": {}}')
    with pytest.raises(ValueError, match="config.json is of a run, whose network is in its folder"):
        CapsNet.from_pretrained(tmp_path)


def test_the_model_card(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    picture = tmp_path / "sheet.png"
    Image.new("L", (4, 4)).save(picture)
    card = ModelCard("mnist", 0.9916, 5, "mocapsnet train --dataset mnist", picture)
    folder = network().save_pretrained(tmp_path / "model", card)
    text = (folder / "README.md").read_text()
    for part in (
        "# MoCapsNet on mnist",
        "| test accuracy | 99.16% |",
        "| classes | ant, bee, cat |",
        "```sh\nmocapsnet train --dataset mnist\n```",
        "(reconstructions.png)",
        'mocapsnet.load("FOLDER")',
    ):
        assert part in text
    assert (folder / "reconstructions.png").read_bytes() == picture.read_bytes()
    metadata = hub.ModelCard(text).data
    assert metadata.library_name == "mocapsnet" and metadata.pipeline_tag == "image-classification"
    (result,) = metadata.eval_results
    assert (result.dataset_name, result.metric_type) == ("mnist", "accuracy")
    assert result.metric_value == 0.9916
    plain = (network().save_pretrained(tmp_path / "plain") / "README.md").read_text()
    assert "None" not in plain and "Trained by" not in plain and hub.ModelCard(plain).data.tags


def test_names_of_the_files_are_the_hub_s():
    constants = pytest.importorskip("huggingface_hub.constants")
    from mocapsnet import pretrained

    assert pretrained.CONFIG == constants.CONFIG_NAME
    assert pretrained.WEIGHTS == constants.SAFETENSORS_SINGLE_FILE


def test_from_and_to_the_hub(tmp_path, monkeypatch):
    """What is asked of huggingface_hub; the Hub itself is not reached."""
    hub = pytest.importorskip("huggingface_hub")
    folder, asked = network().save_pretrained(tmp_path / "fetched"), []
    monkeypatch.chdir(tmp_path)

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name == "some/missing":
            raise OSError("404")
        return str(folder)

    class HfApi:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, name, **options):
            asked.append((name, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            assert load(folder_path).class_names == ("ant", "bee", "cat")
            return "address"

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "HfApi", HfApi)
    loaded = MoCapsNet.from_pretrained("some/one", revision="v2", local_files_only=True)
    assert_same(loaded.predict(pixels()), network().predict(pixels()))
    name, options = asked.pop()
    assert name == "some/one" and options["revision"] == "v2" and options["local_files_only"]
    assert options["allow_patterns"] == ["config.json", "model.safetensors"]
    with pytest.raises(
        ValueError, match="some/missing is not a folder here, and could not be.*404"
    ):
        CapsNet.from_pretrained("some/missing")
    with pytest.raises(ValueError, match="not a folder here, nor the name of a model on the Hub"):
        CapsNet.from_pretrained("runs/a/b")
    assert network().push_to_hub("some/one", private=True, token="t") == "address"
    assert asked[1:] == ["t", ("some/one", {"private": True, "exist_ok": True})]


def test_without_huggingface_hub_only_the_hub_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load(network().save_pretrained(tmp_path)).predict(pixels()).names
    for use in (
        lambda: CapsNet.from_pretrained("some/one"),
        lambda: network().push_to_hub("some/one"),
    ):
        with pytest.raises(ImportError, match=r'pip install "mocapsnet\[hub\]"'):
            use()


def test_without_pillow_only_files_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert network().predict(pixels()).names
    with pytest.raises(ImportError, match="reading image files needs Pillow"):
        network().predict("image.png")


@pytest.mark.slow
def test_importing_and_predicting_imports_none_of_the_extras(tmp_path):
    network().save_pretrained(tmp_path)
    code = (
        "import sys, torch, mocapsnet; model = mocapsnet.load(sys.argv[1]);"
        "model.predict(torch.rand(12, 10));"
        "names = {'PIL', 'huggingface_hub', 'onnx', 'torchvision', 'accelerate'};"
        "found = names & sys.modules.keys(); assert not found, found"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)


def test_public_names():
    assert mocapsnet.load is load and mocapsnet.Predictions._fields[:3] == (
        "labels",
        "names",
        "lengths",
    )
