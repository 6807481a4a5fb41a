"""The options of an experiment's runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from mocapsnet import cli
from mocapsnet.train.experiments import runs
from mocapsnet.train.experiments.configuration import Configuration
from mocapsnet.train.option_values import flat, from_names, kinds, to_json

from .helpers import GRID, NAME, OPTIONS, OWN, Command, outputs, own, parsed, runs_of, shipped


def test_other_options_are_never_mixed(fake: Configuration, command: Command) -> None:
    words = ["experiment", "own.json", "--seeds", "0"]
    assert command(*words)[0] == 0
    for other, said in {
        ("--lr", "0.1"): "was begun with --lr 0.001, and now it is asked for with --lr 0.1",
        ("--image-size", "8"): "--image-size 8 is for --dataset folder",
    }.items():
        code, _, errors = command(*words, *other)
        assert code == 2 and said in errors, errors
    # Other seeds of other options would be in the same cell.
    code, _, errors = command("experiment", "own.json", "--seeds", "4", "--lr", "0.1")
    assert code == 2 and "(digits-mocapsnet-blocks-1-seed-0)" in errors
    own(json.loads(Path("own.json").read_text()) | {"options": OPTIONS | {"channels": 8}})
    code, _, errors = command(*words)
    assert code == 2 and "was begun with --channels 16, and now it is asked for with" in errors
    # Without its record, the run's own config.json tells.
    Path("runs/own/experiment.json").unlink()
    for last in ([], ["--dry-run"]):
        code, _, errors = command(*words, *last)
        assert code == 2, errors
        assert "holds a run of other options (--channels 16 there, 8 asked for)" in errors


def test_a_grid_of_other_options_is_another_experiment(
    fake: Configuration, command: Command
) -> None:
    """Its cells would lie on one another."""
    words = ["experiment", "own.json", "--seeds", "0"]
    assert command(*words)[0] == 0
    before = json.loads(Path("own.json").read_text())
    varied = before | {"grid": before["grid"] | {"lr": [0.001, 0.01]}}
    named = before | {"cases": [{"name": "slow", "lr": 0.001}, {"name": "fast", "lr": 0.01}]}
    for other, more in ((varied, "lr"), (named, "case")):
        own(other)
        for last in ([], ["--dry-run"]):
            code, _, errors = command(*words, *last)
            assert code == 2 and errors.count("\n") == 1
            assert f"now it is dataset, model, blocks, {more}, seed; a table has cells of" in errors
    own(varied)
    shutil.rmtree("runs")
    assert command(*words)[0] == 1  # as these trainings know one rate alone
    own(before)
    code, _, errors = command(*words)
    assert code == 2 and "was begun to compare dataset, model, blocks, lr, seed, and now" in errors


def test_an_option_for_all_runs_is_given_to_those_that_can_use_it() -> None:
    for varied, given, used in (
        ({"memory": ["reversible", "stored"]}, {"anchor_every": 4}, [4, None]),
        ({"method": ["rba", "sda"]}, {"sda_mean": "batch"}, ["input", "batch"]),
        ({"crop": ["padded", "resized"]}, {"pad": 3}, [3, 0]),
    ):
        content = OWN | {"cases": [], "grid": GRID | varied, "options": OPTIONS | given}
        (name,) = given
        found = [flat(run.options) for run in runs_of(parsed(content))]
        assert [options[kinds()[name][0]] for options in found] == used


def test_a_recipe_means_what_it_means_to_a_single_training() -> None:
    words = "--recipe published --crop resized --dataset digits --seed 0".split()
    single = cli.parse(["train", *words])
    several = from_names({"recipe": "published", "crop": "resized", "dataset": "digits", "seed": 0})
    assert several == single and (single.data.test_crop, single.data.pad) == ("random", 1)


def test_more_epochs_make_runs_longer(fake: Configuration, command: Command) -> None:
    assert command("experiment", "own.json", "--seeds", "0")[0] == 0
    code, output, _ = command(
        "experiment", "own.json", "--seeds", "0", "--epochs", "9", "--dry-run"
    )
    assert code == 0 and "interrupted after 1 of 9 epochs" in output and "by its epochs" in output
    code, _, errors = command(
        "experiment", "own.json", "--seeds", "4", "--optimizer", "ranger21", "--epochs", "9"
    )
    assert code == 2 and "--optimizer adam" in errors


def test_what_may_be_given_anew_reaches_a_run_that_goes_on(
    fake: Configuration, command: Command
) -> None:
    given = "--validation-share 0.25 --patience 3 --track --graph off".split()
    (run,) = runs_of(fake, validation_share=0.25, patience=3, track=[], graph="off", epochs=1)[:1]
    assert run.name == f"{NAME}0"
    folder = Path("runs/own", run.name)
    shutil.copytree("template", folder)
    config = json.loads((folder / "config.json").read_text())
    config["options"] = to_json(
        dataclasses.replace(
            run.options, watch=dataclasses.replace(run.options.watch, patience=2, track=())
        )
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").unlink()
    code, _, _ = command("experiment", "own.json", "--seeds", "0", "--epochs", "1", *given)
    assert code == 1  # as this training trains nothing
    words = f"--resume {folder} --epochs 1 --device cpu --graph off --patience 3 --track\n"
    assert words in outputs(0)


def test_runs_have_readable_names_and_are_ordinary_commands() -> None:
    first, *_ = runs_of(shipped("table3"))
    assert first.name == "cifar10-rescapsnet-blocks-1-rba-adam-seed-0"
    recipe = runs_of(shipped("table3"), recipe="published", normalisation="image")
    assert recipe[-1].options.optim.planned_steps == 128
    case = {"name": "fast, or too fast?", "lr": 1.0}
    (run,) = runs_of(parsed(OWN | {"cases": [case]}))
    assert run.name == "digits-mocapsnet-blocks-1-fast-or-too-fast-seed-0"
    for run in [*runs_of(shipped("table5"))[-2:], *runs_of(parsed(), limit=5), *recipe[-4:]]:
        options = cli.parse(run.arguments("x"))
        assert dataclasses.replace(options, out=None) == run.options  # type: ignore[type-var]


def test_options_of_the_command_line_reach_the_runs() -> None:
    found = shipped("table1")
    keys = runs.select(found, {"dataset": ["cifar10"], "blocks": [3], "seed": [7]})
    given = {"gamma": 0.5, "bundles": True, "mixed_precision": "bf16", "epochs": 2, "channels": 32}
    one, two = runs.build(found, keys, given, {"cifar10": "/images"})
    assert (one.name, two.name) == (
        "cifar10-rescapsnet-blocks-3-seed-7",
        "cifar10-mocapsnet-blocks-3-seed-7",
    )
    for run in (one, two):
        assert run.options.machine.mixed_precision == "bf16" and run.options.bundles
        assert (run.options.optim.epochs, run.options.model.channels) == (2, 32)
        assert (run.options.data.dataset, run.options.data.data_dir) == ("folder", "/images")
    # Of no use to a network without momentum.
    assert (one.options.model.gamma, two.options.model.gamma) == (0.9, 0.5)


def test_other_images_are_never_mixed(fake: Configuration, command: Command) -> None:
    """Of a folder that was replaced; one that has moved is the same."""
    for place in ("photos", "others"):
        for name in ("ant", "bee"):
            Path(place, name).mkdir(parents=True)
            Path(place, name, f"{place}.png").touch()
    shutil.copytree("photos", "copied")
    words = ["experiment", "own.json", "--seeds", "0", "--epochs", "1", "--folders"]
    folder = Path("runs/own", f"{NAME}0")
    shutil.copytree("template", folder)
    config = json.loads((folder / "config.json").read_text())
    (run,) = runs.build(fake, runs.select(fake, {"seed": [0]}), {}, {"digits": "photos"})
    config["options"] = to_json(run.options)
    (folder / "config.json").write_text(json.dumps(config))
    for place in ("photos", "copied", "photos"):
        code, _, errors = command(*words, f"digits={place}")
        assert code == 0, errors
    for _ in ("by the record", "by the run"):
        code, _, errors = command(*words, "digits=others")
        assert code == 2 and f"--data-dir {Path('photos').absolute()}" in errors, errors
        Path("runs/own/experiment.json").unlink(missing_ok=True)
    Path("photos").rename("moved")
    code, output, errors = command(*words, "digits=moved")
    assert code == 0 and "1 runs: 1 finished" in output, errors
