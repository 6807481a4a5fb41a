"""The words of mocapsnet experiment: lists, copies, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mocapsnet.train.experiments import configuration

from .helpers import Command, shipped


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("experiment table9", "table9 is neither an experiment (collapse, deep,"),
        ("experiment table1 --datasets mnits", "--datasets is 'mnits', but must be one of digits"),
        ("experiment table1 --seeds 1 1", "--seeds: 1 is given twice"),
        ("experiment table1 --jobs 0", "--jobs must be at least 1, got 0"),
        ("experiment table1 --epochs 0", "-seed-0: --epochs must be greater than 0, got 0"),
        ("experiment table1 --seed 3", "--seed is for mocapsnet train; an experiment has --seeds"),
        ("experiment table5 --lr 1", "--lr 1.0: table5 compares values of it"),
        ("experiment table1 --folders svhn", "--folders svhn: must be DATASET=DIR"),
        ("experiment table1 --folders cifar10=x", "of a data set that is asked for (mnist, svhn)"),
        ("experiment table1 --copy no/x.json", "--copy no/x.json: there is no folder no"),
    ],
)
def test_one_clear_error_for_a_wrong_command(words: str, said: str, command: Command) -> None:
    code, _, errors = command(*words.split())
    assert code == 2 and said in errors and errors.count("\n") == 1, errors
    assert not Path("runs").exists()


def test_unknown_options_are_those_of_no_training(command: Command) -> None:
    code, _, errors = command("experiment", "table1", "--epoch", "3")
    assert code == 2 and "Unrecognized options: --epoch, 3" in errors


@pytest.mark.parametrize("option", ["--copy mine.json", "--report", "--dry-run"])
def test_what_is_asked_of_no_experiment_is_refused(option: str, command: Command) -> None:
    code, _, errors = command("experiment", *option.split())
    assert code == 2 and f"{option.split()[0]} needs the NAME of an experiment" in errors
    assert not Path("mine.json").exists()


def test_experiments_are_listed_and_copied(command: Command) -> None:
    code, output, _ = command("experiment")
    assert code == 0 and all(name in output for name in configuration.names())
    code, output, _ = command("experiment", "table5", "--copy", "mine.json")
    assert code == 0 and "mocapsnet experiment mine.json" in output
    assert configuration.load(Path("mine.json")) == shipped("table5").content
    assert command("experiment", "table5", "--copy", "mine.json")[0] == 2
