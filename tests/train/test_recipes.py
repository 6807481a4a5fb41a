"""`--recipe published`, and what its options do to a step and a test, by formulas written out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

import mocapsnet
from mocapsnet import Preprocessing, cli
from mocapsnet.train import data, prepare
from mocapsnet.train.errors import InputError
from mocapsnet.train.experiments import configuration, runs, table
from mocapsnet.train.experiments.record import Record
from mocapsnet.train.experiments.states import State
from mocapsnet.train.option_values import flag, flat, from_json, to_json
from mocapsnet.train.options import DataOptions, ModelName, TrainOptions

from .helpers import TINY, rows

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]

ALWAYS = {
    "data.normalisation": "fixed",
    "data.pixel_mean": (0.5,),
    "data.pixel_std": (0.5,),
    "data.test_crop": "random",
    "model.grouping": "pixels",
    "model.init": "paper",
    "optim.decoder_mask": "prediction",
    "optim.reconstruction_target": "normalised",
    "recipe": "published",
}
MOMENTUM = {"model.velocity": "block", "model.skip": "twice"}
SDA = {"model.sda_mean": "batch", "model.sda_scale": "published", "model.bias": 0.1}


def parse(*arguments: str) -> TrainOptions:
    options = cli.parse(["train", *arguments])
    assert isinstance(options, TrainOptions)
    return options


@pytest.mark.parametrize("model", get_args(ModelName))
@pytest.mark.parametrize("others", ["", "--method sda", "--optimizer ranger21", "--decoder 8"])
def test_the_recipe_suits_every_network(model: str, others: str) -> None:
    """What is given besides may not; the published code has no network like some of them."""
    arguments = f"--dataset cifar10 --model {model} {others}".split()
    try:
        parse(*arguments)
    except InputError:
        assert model in ("cnn", "resnet18") and others
        return
    options = parse(*arguments, "--recipe", "published")
    assert options.data.test_crop == "random"
    assert (options.model.velocity == "block") == model.endswith("mocapsnet")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", MOMENTUM),
        ("--model rescapsnet", {}),
        ("--method sda", MOMENTUM | SDA),
        ("--optimizer ranger21", MOMENTUM | {"optim.planned_steps": 32}),
        ("--dataset svhn --optimizer ranger21", MOMENTUM | {"optim.planned_steps": 128}),
        (
            "--dataset mnist",
            MOMENTUM | {"data.pixel_mean": (0.1307,), "data.pixel_std": (0.3081,)},
        ),
    ],
)
def test_the_recipe_is_these_options(arguments: str, expected: dict[str, object]) -> None:
    ours, theirs = (flat(parse(*arguments.split(), *r)) for r in ([], ["--recipe", "published"]))
    assert {name: v for name, v in theirs.items() if ours[name] != v} == ALWAYS | expected


def test_an_option_beside_the_recipe_wins() -> None:
    """Also one that is given its own default."""
    everything = "--recipe published --method sda --optimizer ranger21".split()
    recipe, plain = flat(parse(*everything)), flat(TrainOptions())
    changed = ALWAYS | MOMENTUM | SDA
    for name in changed.keys() - {"recipe", "model.velocity", "data.pixel_mean", "data.pixel_std"}:
        arguments = [flag(name), str(plain[name])]
        found = flat(parse(*everything, *arguments))
        expected = recipe | {name: plain[name]}
        if name == "data.normalisation":
            expected |= {"data.pixel_mean": None, "data.pixel_std": None}
        assert found == expected, name
    found = flat(parse(*everything, "--pixel-mean", "0.1", "--pixel-std", "0.2", "--pad", "0"))
    assert (found["data.pixel_mean"], found["data.pixel_std"]) == ((0.1,), (0.2,))
    assert found["data.test_crop"] == "centre"
    once = "--velocity network --skip once --planned-steps 7 --bias 0.3".split()
    found = flat(parse(*everything, *once))
    assert [found[f"model.{name}"] for name in ("velocity", "skip", "bias")] == [
        "network",
        "once",
        0.3,
    ]
    assert found["optim.planned_steps"] == 7


def test_a_recipe_survives_json_and_a_resume(train: Train, command: Command) -> None:
    options = "--recipe published --method sda --init length".split()
    whole = train("whole", "--epochs", "2", *options)
    run = train("run", "--epochs", "1", *options)
    saved = json.loads((run / "config.json").read_text())["options"]
    assert (saved["recipe"], saved["model"]["skip"]) == ("published", "twice")
    options = parse("--recipe", "published", "--dataset", "mnist", "--data-dir", "/data")
    assert from_json(json.loads(json.dumps(to_json(options)))) == options
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    assert rows(run) == rows(whole)
    code, _, errors = command("train", "--resume", "run", "--epochs", "3", "--test-crop", "centre")
    assert code == 2 and "--test-crop centre does not go with --resume" in errors
    # The crops of the tests are those that the figures are of.
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    last = rows(run)[-1]
    assert f"accuracy {last['test_accuracy']:.2%}" in output
    assert f"loss {last['test_loss']:.4f}" in output
    network = mocapsnet.load(run)
    assert network.preprocessing == Preprocessing("fixed", (0.5,), (0.5,))
    assert network.config.bias == 0.1
    _, test_set = data.load(DataOptions())
    pixels = test_set.images[:5] / 255
    found, expected = network.predict(pixels), network((pixels - 0.5) / 0.5)  # as they are
    torch.testing.assert_close(found.lengths, expected.lengths)


def first_losses(
    options: TrainOptions, mask: str, target: str, mean: float, std: float
) -> tuple[float, float]:
    """Margin loss and reconstruction error of the first step, means over its images."""
    train_set, _ = data.load(options.data)
    train_set = train_set.first(options.data.limit)
    torch.manual_seed(options.optim.seed)
    network = prepare.build(options, train_set)
    pixels, labels = train_set.images / 255, train_set.labels
    images = (pixels - mean) / std
    out = network(images)
    present = F.one_hot(labels, 10)
    margin = present * (0.9 - out.lengths).clamp(min=0) ** 2
    margin = margin + 0.5 * (1 - present) * (out.lengths - 0.1).clamp(min=0) ** 2
    shown = labels if mask == "label" else out.capsules.norm(dim=-1).argmax(1)
    masked = torch.zeros_like(out.capsules)
    for b, k in enumerate(shown.tolist()):
        masked[b, k] = out.capsules[b, k]
    assert not torch.equal(shown, labels) or mask == "label"
    drawn: Tensor = network.decoder(masked)
    error = (drawn - (pixels if target == "pixels" else images)) ** 2
    return margin.sum().item() / len(labels), error.sum().item() / len(labels)


@pytest.mark.parametrize(("mask", "target"), [("prediction", "pixels"), ("label", "normalised")])
def test_losses_of_the_first_step(mask: str, target: str, train: Train) -> None:
    arguments = f"--decoder-mask {mask} --reconstruction-target {target} --pad 0 --epochs 1"
    arguments += " --normalisation fixed --pixel-mean 0.3 --pixel-std 0.2 --batch-size 48"
    run = train("run", *arguments.split())
    options = parse(*TINY, *arguments.split())
    margin, reconstruction = first_losses(options, mask, target, 0.3, 0.2)
    (row,) = rows(run)
    assert row["train_margin"] == pytest.approx(margin, rel=1e-5)
    assert row["train_reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    if target == "normalised":  # most pixels are 0, and -1.5 cannot be drawn
        assert row["test_reconstruction"] > 64


def test_random_crops_of_test_images() -> None:
    options = DataOptions(pad=2, limit=200, test_crop="random")
    accelerator = Accelerator(cpu=True)
    training, tested = prepare.load_data(options, accelerator, seed=3)
    plain, original = prepare.load_data(DataOptions(pad=2, limit=200), accelerator, seed=3)
    assert torch.equal(training.images, plain.images)
    assert torch.equal(tested.labels, original.labels)
    places = set()
    for image, crop in zip(original.images, tested.images, strict=True):
        padded = torch.zeros(1, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = image
        fits = [
            (r, c)
            for r, c in itertools.product(range(5), repeat=2)
            if torch.equal(padded[:, r : r + 8, c : c + 8], crop)
        ]
        assert fits
        places.update(fits)
    assert len(places) == 25
    again, other = (prepare.load_data(options, accelerator, seed=s)[1].images for s in (3, 4))
    assert torch.equal(again, tested.images) and not torch.equal(other, tested.images)


@pytest.mark.parametrize("mean", [(0.2,), (0.2, 0.3, 0.4)])
def test_fixed_normalisation(mean: tuple[float, ...]) -> None:
    std = tuple(0.5 * m for m in mean)
    pixels = torch.rand(2, 3, 4, 5)
    found = Preprocessing("fixed", mean, std)(pixels)
    for c in range(3):
        m, s = mean[c % len(mean)], std[c % len(std)]
        torch.testing.assert_close(found[:, c], (pixels[:, c] - m) / s)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--sda-scale published", "--sda-scale published is for --method sda"),
        ("--planned-steps 9", "--planned-steps 9 is for --optimizer ranger21"),
        ("--optimizer ranger21 --planned-steps 0", "--planned-steps must be greater than 0"),
        ("--test-crop random --pad 0", "--test-crop random needs --pad of at least 1"),
        ("--pixel-mean 0.5", "--pixel-mean and --pixel-std: "),
        ("--normalisation fixed --pixel-std 0.5", 'normalisation="fixed" needs mean and std'),
        ("--normalisation fixed --pixel-mean 0.5 0.5 --pixel-std 1 1", "the images have 1 channel"),
        ("--bias nan", "bias must be a number"),
        ("--recipe published --velocity network", "skip='twice' needs velocity='block'"),
        ("--recipe mine", "published"),
    ],
)
def test_what_does_not_go_together(arguments: str, expected: str, command: Command) -> None:
    code, _, errors = command("train", *TINY, *arguments.split(), "--out", "run")
    assert code == 2 and expected in errors
    assert "Traceback" not in errors and not Path("run").exists()


def test_a_run_from_before_these_options_goes_on(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    path = run / "config.json"
    config = json.loads(path.read_text())
    for name in (ALWAYS | SDA).keys() - {"model.grouping", "model.init", "model.sda_mean"}:
        group, _, option = name.rpartition(".")
        del (config["options"][group] if group else config["options"])[option]
    path.write_text(json.dumps(config | {"format": 1}))
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    assert len(rows(run)) == 2
    path.write_text(json.dumps(config))
    code, _, errors = command("evaluate", "run")
    assert code == 2 and "is missing" in errors


def made_of(name: str) -> Record:
    path = configuration.find(name)
    found = configuration.parse(configuration.load(path), name, path)
    return Record(found, {}, {}, runs.select(found, {}))


def test_the_experiment_of_departures_has_each_of_them_both_ways() -> None:
    """Alone beside our defaults, and left out of the recipe."""
    changed: dict[str, list[set[str]]] = {"ours": [], "published": []}
    plain = {}
    for run in made_of("departures").runs():
        if run.keys["seed"] == 0:
            side = run.keys["case"].split()[0]
            values = {k: v for k, v in flat(run.options).items() if not k.startswith("data.pixel")}
            plain.setdefault(side, values)  # the first of each is that without a change
            changed[side].append({k for k, v in values.items() if v != plain[side][k]})
    departures = {*ALWAYS, *MOMENTUM} - {"recipe", "data.pixel_mean", "data.pixel_std"}
    assert {k for k in plain["ours"] if plain["ours"][k] != plain["published"][k]} == {
        *departures,
        "recipe",
    }
    together = {"model.skip", "model.velocity"}  # the first needs the second
    for side, alone in (("ours", "model.velocity"), ("published", "model.skip")):
        single = [{name} for name in departures - together] + [{alone}, together, set()]
        assert sorted(map(sorted, changed[side])) == sorted(map(sorted, single))


def test_the_experiment_of_the_collapse() -> None:
    made = made_of("collapse")
    every = {run.name: State("missing") for run in made.runs()}
    text = table.markdown(made, every)
    assert "**Smaller than the paper: 64 channels instead of 256; 5 epochs instead of 60.**" in text
    assert "| 8 | published | – (not run) | ≈ 1.00 | – (not run) | 43.48 ± 0.06 |" in text
    text = table.scale(made_of("departures"))  # nothing of the paper stands beside
    assert text.startswith("**Smaller than the paper: 64 channels instead of 256;")
    inits = {(r.options.recipe, r.options.model.init) for r in made.runs()}
    assert inits == {("published", "paper"), ("published", "length"), (None, "length")}
