"""RUN/model: what a run leaves for prediction agrees with what it reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mocapsnet
from mocapsnet.train import data
from mocapsnet.train.options import DataOptions
from mocapsnet.train.trainer import Trainer

from .helpers import TINY, rows, weights

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


def accuracy(run: Path) -> float:
    """Of the network in RUN/model on the tiny test set."""
    _, test_set = data.load(DataOptions(), quiet=True)
    test_set = test_set.first(48)
    found = mocapsnet.load(run).predict(test_set.images)
    return float((found.labels == test_set.labels).double().mean())


@pytest.mark.usefixtures("pictures")
def test_a_finished_run_is_a_model(train: Train, command: Command) -> None:
    run = train("run", "--epochs", "2", "--blocks", "2")
    model = mocapsnet.load(run)
    assert type(model) is mocapsnet.MoCapsNet and model.config.blocks == 2
    assert model.class_names == tuple("0123456789")
    torch.testing.assert_close(dict(model.state_dict()), weights(run), rtol=0, atol=0)
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    (evaluated,) = re.findall(r"test accuracy ([\d.]+)%", output)
    assert f"{accuracy(run):.2%}" == f"{evaluated}%"
    assert rows(run)[-1]["test_accuracy"] == accuracy(run)
    card = (run / "model" / "README.md").read_text()
    assert f"| test accuracy | {evaluated}% |" in card and "| epochs | 2 |" in card
    assert "# MoCapsNet on digits" in card and "(reconstructions.png)" in card
    assert (run / "model" / "reconstructions.png").exists()


def test_a_stopped_run_is_a_model_of_its_last_epoch(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = Trainer.epoch

    def stopped(self: Trainer, number: int, *arguments: object) -> object:
        if number == 1:
            with torch.no_grad():  # the second epoch had changed weights already
                for p in self.model.parameters():
                    p.zero_()
            raise KeyboardInterrupt
        return epoch(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", stopped)
        arguments = ["train", *TINY, "--out", "stopped", "--epochs", "3"]
        patch.setattr("sys.argv", ["/bin/mocapsnet", *arguments])
        assert command(*arguments)[0] == 130
    run = Path("stopped")
    assert rows(run)[-1]["test_accuracy"] == accuracy(run)
    assert "| epochs | 1 |" in (run / "model" / "README.md").read_text()
    assert command("train", "--resume", "stopped")[0] == 0
    assert rows(run)[-1]["test_accuracy"] == accuracy(run)
    card = (run / "model" / "README.md").read_text()
    assert "| epochs | 3 |" in card
    assert f"\nmocapsnet train {' '.join(TINY)} --out stopped --epochs 3\n" in card


def test_a_run_that_has_no_epoch_yet_says_so(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupt)
        command("train", *TINY, "--out", "stopped")
    with pytest.raises(ValueError, match="a run without a trained network yet"):
        mocapsnet.load("stopped")
