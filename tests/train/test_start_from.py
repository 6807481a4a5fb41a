"""`--start-from`: what is taken of a trained network, what is drawn anew, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mocapsnet
from mocapsnet import CNN, ConvMoCapsNet, MoCapsNet, Preprocessing, ResNet18
from mocapsnet.train import checkpoints
from mocapsnet.train.errors import InputError
from mocapsnet.train.start_from import take_weights

from .helpers import TINY, assert_same_run, raising, rows
from .test_folder import pixels, write

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]
SMALL = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))


def network(kind: type = MoCapsNet, classes: int = 3, **options: object) -> mocapsnet.CapsNet:
    torch.manual_seed(classes)
    model = kind((1, 12, 10), classes, **SMALL | options)
    model.preprocessing = Preprocessing("fixed", (0.25,), (0.5,))
    return model


def test_a_training_goes_on_with_the_weights_of_another(train: Train, command: Command) -> None:
    first = train("first", "--epochs", "3")
    words = ["train", *TINY, "--epochs", "2", "--seed", "1"]
    code, output, errors = command(*words, "--start-from", "first", "--out", "second")
    assert code == 0, errors
    assert "\nstarting with the weights of first\n" in output
    at_start = json.loads(Path("second/start.json").read_text())
    fresh = json.loads((first / "start.json").read_text())
    assert at_start["margin"] < fresh["margin"]  # of another batch
    config = json.loads(Path("second/config.json").read_text())
    assert config["options"]["start_from"] == str(Path("first").absolute())
    # What it began with is in its checkpoints, and needed no more.
    first.rename("elsewhere")
    assert command("evaluate", "second", "--device", "cpu")[0] == 0
    assert command("train", "--resume", "second")[0] == 0
    # Bit for bit the same, also from the folder of the network alone.
    code, _, errors = command(*words, "--start-from", "elsewhere/model", "--out", "third")
    assert code == 0, errors
    assert_same_run(Path("second"), Path("third"))
    assert rows(Path("second"))[0]["train_loss"] < rows(Path("elsewhere"))[0]["train_loss"]
    code, _, errors = command(*words, "--start-from", "nowhere", "--out", "fourth")
    assert code == 2 and "--start-from nowhere is not a folder" in errors
    code, _, errors = command(*words, "--channels", "8", "--start-from", "third", "--out", "fifth")
    assert code == 2 and "does not fit this network: --channels 16 there, 8 here" in errors
    assert not Path("fourth").exists() and not Path("fifth").exists()


@pytest.mark.parametrize(
    "kind, options, anew",
    [
        (MoCapsNet, {}, ["decoder", "last"]),
        (ConvMoCapsNet, None, ["last"]),
        (CNN, {}, ["dense"]),
        (ResNet18, None, ["dense"]),
    ],
)
def test_other_classes(kind: type, options: dict | None, anew: list[str], tmp_path: Path) -> None:
    def made(classes: int) -> mocapsnet.CapsNet:
        if options is not None:
            return network(kind, classes)
        torch.manual_seed(classes)
        return kind((1, 24, 24), classes)

    other, model = made(3), made(5)
    folder = str(other.save_pretrained(tmp_path))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    told = take_weights(model, folder)
    assert "classes: 3 there, 5 here" in told and ", but for the " in told
    theirs = load_file(tmp_path / "model.safetensors")
    for name, w in model.state_dict().items():
        source = before if name.partition(".")[0] in anew else theirs
        assert torch.equal(w, source[name]), name
    assert any(not torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_as_many_classes_of_other_names_are_other_classes(tmp_path: Path) -> None:
    other, model = network(), network()
    other.class_names = ("ant", "bee", "cat")
    folder = str(other.save_pretrained(tmp_path))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(1)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for names, anew in ((("ant", "cat", "bee"), True), (("ant", "bee", "cat"), False)):
        model.class_names = names
        told = take_weights(model, folder)
        assert ("but for the class capsules and the decoder" in told) == anew
        for part in ("last.weight", "decoder.layers.0.weight"):
            assert torch.equal(model.state_dict()[part], before[part]) == anew
        assert not torch.equal(model.first.weight, before["first.weight"])


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = str(network(gamma=0.5).save_pretrained(tmp_path / "model"))
    model = network()
    assert take_weights(model, folder).endswith("(--gamma 0.5 there, 0.9 here)")
    for change, said in (
        (lambda: network(capsules=5), "first.weight does not fit this network: --capsules 4 there"),
        (lambda: network(blocks=2), "stack.layers.2.weight does not fit"),
        (lambda: network(mocapsnet.ResCapsNet), "holds a MoCapsNet, not a ResCapsNet"),
        (lambda: MoCapsNet((1, 12, 10), 3, **SMALL), "its images were normalised otherwise, by"),
    ):
        other = change()
        before = {name: w.clone() for name, w in other.state_dict().items()}
        with pytest.raises(InputError, match=said):
            take_weights(other, folder)
        assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())


def test_the_weights_are_taken_by_a_run_that_was_killed_before_it_had_any(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("first", "--epochs", "1")
    words = ["train", *TINY, "--epochs", "1", "--start-from", "first"]
    assert command(*words, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", raising(OSError(28, "disk full")))
        assert command(*words, "--out", "second")[0] == 1
    code, output, errors = command("train", "--resume", "second")
    assert code == 0 and "starting with the weights of" in output, errors
    assert_same_run(Path("whole"), Path("second"))


def test_a_larger_network_does_not_fit(tmp_path: Path) -> None:
    for options, said in (
        (dict(blocks=2), "stack.layers.2.weight does not fit this network: --blocks 2 there, 1"),
        (dict(bias=0.1), "does not fit this network: --bias 0.1 there, None here"),
    ):
        folder = str(network(**options).save_pretrained(tmp_path / str(options)))
        with pytest.raises(InputError, match=said):
            take_weights(network(), folder)
    folder = str(network(decoder=(6, 6)).save_pretrained(tmp_path / "decoder"))
    assert "but for the decoder" in take_weights(network(), folder)


def test_images_that_the_first_weights_were_trained_on_are_told(command: Command) -> None:
    for split in ("photos", "split/train", "split/test"):
        for name in ("ant", "bee"):
            for i in range(10):
                write(Path(split, name, f"{i}.png"), pixels(8, 8))
    small = ["--kernel-size", "3", *TINY, "--dataset", "folder"]
    seen = "was trained on some of what are {} images now"

    def start(data: str, *options: str, base: str = "first") -> str:
        out = f"run-{len(list(Path().glob('run-*')))}"
        words = ["--data-dir", data, "--start-from", base, "--epochs", "1", "--out", out]
        code, _, errors = command("train", *small, *words, *options)
        assert code == 0, errors
        return errors

    for data, out, options in (("photos", "first", []), ("split", "other", [])):
        words = ["--data-dir", data, "--epochs", "1", "--out", out, *options]
        assert command("train", *small, *words)[0] == 0
    assert start("photos") == "" and start("split") == ""
    assert start("split", "--validation-share", "0.2") == ""
    told = start("split", "--validation-share", "0.2", base="other")
    assert seen.format("validation") in told and seen.format("test") not in told
    for options in (["--split-seed", "1"], ["--test-share", "0.4"]):
        assert seen.format("test") in start("photos", *options)
    assert seen.format("test") in start("photos", "--split-seed", "1", base="first/model")
    write(Path("photos/ant/new.png"), pixels(8, 8))
    assert seen.format("test") in start("photos")
