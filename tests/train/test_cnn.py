"""`--model cnn` and `resnet18` in every command: what applies works, what does not is said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import mocapsnet
from mocapsnet.train import loop, recipes
from mocapsnet.train.data import ImageSet
from mocapsnet.train.errors import InputError
from mocapsnet.train.option_values import resolve
from mocapsnet.train.options import ModelOptions, TrainOptions

from .helpers import rows, run_two, weights

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


@pytest.mark.usefixtures("pictures")
def test_a_run_without_capsules(train: Train, command: Command) -> None:
    run = train("run", "--model", "cnn", "--epochs", "3")
    first, *_, last = rows(run)
    # Per image; that of guessing is log(10) = 2.3.
    assert last["train_loss"] == last["train_margin"] < first["train_loss"] < 3
    assert last["train_reconstruction"] == last["test_reconstruction"] == 0
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures == {"confusion_matrix.png", "learning_curves.png", "worst_images.png"}
    code, output, _ = command("train", "--resume", "run")
    assert code == 0 and "run is finished, 3 of 3 epochs" in output

    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    assert f"test accuracy {last['test_accuracy']:.2%}" in output
    assert f"loss {last['test_loss']:.4f} (cross-entropy)" in output
    assert "margin" not in output and "largest cross-entropy: image " in output
    code, output, errors = command("visualize", "run", "--device", "cpu")
    assert code == 0, errors
    assert "no pictures of capsules: cnn has none" in output
    assert {path.name for path in run.glob("*.png")} - {"mistakes.png"} == pictures

    Image.new("L", (8, 8), 100).save("grey.png")
    code, output, errors = command("predict", "run", "grey.png", "--pictures", "drawn")
    assert code == 0, errors
    assert output.split()[:3] == ["file", "class", "probability"]
    assert Path("drawn/grey.png").is_file()
    code, output, _ = command("predict", "run", "grey.png", "--json")
    assert sum(json.loads(output)[0]["lengths"]) == pytest.approx(1, abs=1e-5)
    network = mocapsnet.load(run)
    torch.testing.assert_close(dict(network.named_parameters()), weights(run), rtol=0, atol=0)
    code, _, errors = command("explore", "run", "--no-browser")
    assert code == 2 and "run holds a network without capsules" in errors


@pytest.mark.parametrize(
    "option", ["--method sda", "--decoder-mask prediction", "--gamma 0.5", "--bundles True"]
)
def test_options_of_capsules_are_refused(option: str, command: Command) -> None:
    code, _, errors = command("train", "--model", "cnn", *option.removesuffix(" True").split())
    assert code == 2 and f"mocapsnet: {option} is for " in errors and errors.count("\n") == 1


def test_a_resnet(command: Command) -> None:
    words = "train --model resnet18 --limit 40 --batch-size 20 --epochs 1 --device cpu --out run"
    code, _, errors = command(*words.split(), "--track")
    assert code == 0, errors
    assert (
        json.loads(Path("run/config.json").read_text())["options"]["optim"]["schedule"] == "cosine"
    )
    (row,) = rows(Path("run"))
    assert 0 < row["train_margin"] == row["train_loss"]
    network = mocapsnet.load("run")
    assert type(network) is mocapsnet.ResNet18 and not network.training
    means = [v for k, v in network.state_dict().items() if k.endswith("running_mean")]
    assert len(means) == 20 and all(mean.abs().max() > 0 for mean in means)
    code, output, _ = command("evaluate", "run", "--device", "cpu")
    assert code == 0 and f"test accuracy {row['test_accuracy']:.2%}" in output
    code, _, errors = command("train", "--model", "resnet18", "--channels", "8")
    assert code == 2 and "--channels 8 is for networks of capsules; resnet18 " in errors


def test_a_resnet_needs_two_images_at_a_time(command: Command) -> None:
    words = "train --model resnet18 --epochs 1 --device cpu --out run".split()
    for sizes, said in {
        "--limit 65 --batch-size 32": "of 65 training images a batch has 1;",
        "--gradient-accumulation 2": "of 1,347 training images a batch has 3, split 2 ways;",
    }.items():
        code, _, errors = command(*words, *sizes.split())
        assert code == 2 and said in errors and errors.count("\n") == 1
    assert not Path("run").exists()
    options = resolve(TrainOptions(model=ModelOptions(name="resnet18")))
    for side, refused in ((32, True), (33, False)):  # of which four places are left
        images = ImageSet(torch.zeros(65, 1, side, side, dtype=torch.uint8), torch.zeros(65).long())
        with pytest.raises(InputError) if refused else contextlib.nullcontext():
            loop._check_shares(options, images, 1)


def test_processes_test_one_resnet() -> None:
    """With the running statistics of the first, which the checkpoint has."""
    words = "train --model resnet18 --limit 32 --batch-size 16 --epochs 1 --device cpu --track"
    done = run_two(*words.split(), "--out", "run")
    assert done.returncode == 0, done.stderr
    (row,) = rows(Path("run"))
    statistics = {n: v for n, v in weights(Path("run")).items() if n.endswith("batches_tracked")}
    assert len(statistics) == 20 and set(map(int, statistics.values())) == {2}  # one for each step
    done = run_two("evaluate", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"loss {row['test_loss']:.4f}" in done.stdout


def test_the_published_recipe_without_capsules() -> None:
    """Of its departures those of the data remain."""
    asked = TrainOptions(model=ModelOptions(name="cnn"), recipe="published")
    options = resolve(recipes.defaults(asked))
    assert options.data.normalisation == "fixed" and options.data.test_crop == "random"
    assert options.model.init == "length" and options.optim.decoder_mask == "label"
