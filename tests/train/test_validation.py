"""Held-out training images: what is chosen by them, and that nothing is chosen by the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mocapsnet
from mocapsnet.train import checkpoints, loop
from mocapsnet.train.best import Best, better, gave_up
from mocapsnet.train.data import ImageSet, hold_out
from mocapsnet.train.errors import InputError
from mocapsnet.train.evaluation import Evaluation
from mocapsnet.train.experiments import runs
from mocapsnet.train.experiments.states import state_of
from mocapsnet.train.run_folder import read_config
from mocapsnet.train.trainer import Trainer

from .helpers import TINY, assert_equal_nested, raising, rows, run_two

Command = Callable[..., tuple[int, str, str]]

VALIDATED = [*TINY, "--validation-share", "0.25"]


def numbered(labels: list[int]) -> ImageSet:
    """Images that tell their number by their only pixel."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images, torch.tensor(labels), ("ant", "bee", "cat"))


def test_every_class_is_split_in_the_same_share() -> None:
    images = numbered([0] * 40 + [1] * 20 + [2] * 8)
    train, validation = hold_out(images, 0.25, seed=3)
    assert validation.labels.bincount().tolist() == [10, 5, 2]
    assert train.labels.bincount().tolist() == [30, 15, 6]
    both = torch.cat([train.images, validation.images]).flatten()
    assert sorted(both.tolist()) == list(range(68))
    for part in (train, validation):  # every image has its own label still
        numbers = part.images.flatten().long()
        assert torch.equal(part.labels, images.labels[numbers])
        assert torch.equal(numbers, numbers.sort().values)
    again, _ = hold_out(images, 0.25, seed=3)
    other, _ = hold_out(images, 0.25, seed=4)
    assert torch.equal(again.images, train.images)
    assert not torch.equal(other.images, train.images)


@pytest.mark.parametrize(
    ("labels", "share", "expected"),
    [
        ([0, 0, 0, 1], 0.5, "4 training images: class bee has one of them"),
        ([0, 0, 0, 0, 1, 1, 1, 1], 0.1, "--validation-share 0.1 of 8 training images: The test_s"),
    ],
)
def test_shares_that_leave_a_class_out(labels: list[int], share: float, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        hold_out(numbered(labels), share, seed=0)


def test_the_best_epoch_and_when_to_stop() -> None:
    best = None
    for epoch, accuracy in enumerate([0.5, 0.8, 0.8, 0.7], start=1):
        best = better(best, epoch, accuracy)
    assert best == Best(2, 0.8), "of equal ones the earlier"
    assert [gave_up(best, done, 2) for done in (2, 3, 4, 5)] == [False, False, True, True]
    assert not gave_up(best, 99, None) and not gave_up(None, 99, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--validation-share 1", "--validation-share must be between 0 and 1, got 1.0"),
        ("--validation-share 0", "--validation-share must be between 0 and 1, got 0.0"),
        ("--validation-share nan", "--validation-share must be between 0 and 1, got nan"),
        ("--keep best", "--keep best needs --validation-share, such as 0.1: what is chosen on the"),
        ("--patience 3", "--patience 3 needs --validation-share"),
        ("--validation-share 0.2 --patience 0", "--patience must be greater than 0, got 0"),
        ("--split-seed 3", "--split-seed 3 is for --validation-share and for --dataset folder"),
        ("--limit 20 --validation-share 0.2", "--validation-share 0.2 of 20 training images: "),
    ],
)
def test_what_cannot_be_asked_for(arguments: str, expected: str, command: Command) -> None:
    code, _, errors = command("train", *arguments.split(), "--out", "run")
    assert code == 2 and expected in errors and errors.count("\n") == 1, errors
    assert not Path("run").exists()


# The accuracies that the scripted validation finds after each epoch: the second is the best.
SCRIPT = [0.5, 0.9, 0.9, 0.7, 0.6, 0.95]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Training without steps, but for weights that tell the epoch; validation by SCRIPT.

    Yields what was evaluated, a word each.
    """
    evaluated: list[str] = []
    now = 0

    def epoch(self: Trainer, epoch: int, *_: object) -> dict[str, Any]:
        nonlocal now
        now = epoch
        self.optimizer.step()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(epoch + 1)
        names = ["loss", "margin", "reconstruction", "accuracy", "images_per_second", "seconds"]
        return {"epoch": epoch + 1, "step": epoch + 1} | {f"train_{n}": 0.5 for n in names}

    def evaluate(*arguments: Any) -> Evaluation:
        *_, images, _, _, text = arguments
        evaluated.append(text)
        right = round(SCRIPT[now] * 100) if text == "validating" else 40
        return Evaluation(0.1, 0.1, 0.1, torch.tensor([[right, 100 - right], [0, 0]]))

    monkeypatch.setattr(Trainer, "epoch", epoch)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "write_pictures", lambda *_: Path("run/confusion_matrix.png").touch())
    yield evaluated


def epochs_kept() -> list[str]:
    return sorted(path.name for path in Path("run/checkpoints").iterdir())


def weight_of(model: torch.nn.Module) -> float:
    return next(model.parameters()).flatten()[0].item()


def result() -> dict[str, Any]:
    return dict(json.loads(Path("run/result.json").read_text()))


def test_the_best_is_kept_and_the_test_images_are_used_once(
    script: list[str], command: Command
) -> None:
    arguments = [*VALIDATED, "--keep", "best", "--epochs", "5", "--out", "run"]
    code, output, errors = command("train", *arguments)
    assert code == 0, errors
    assert script == ["validating"] * 5 + ["testing"]
    assert "36 training, 12 validation and 48 test images" in output
    assert (
        "test accuracy 40.00% (40 of 100) of the network after epoch 2, the best by validation "
        "accuracy (90.00%)" in output
    )
    assert epochs_kept() == ["epoch-0002", "epoch-0005"]
    assert weight_of(mocapsnet.load("run")) == 2
    card = Path("run/model/README.md").read_text()
    assert "| test accuracy | 40.00% |" in card and "| validation accuracy | 90.00% |" in card
    assert "| epochs | 2 |" in card
    assert checkpoints.kept(Path("run"), "best") == (Path("run/checkpoints/epoch-0002"), 2)
    assert [row["validation_accuracy"] for row in rows(Path("run"))] == SCRIPT[:5]
    assert not any(name.startswith("test_") for row in rows(Path("run")) for name in row)
    assert (result()["epoch"], result()["epochs_done"], result()["test_accuracy"]) == (2, 5, 0.4)
    # What an experiment makes of it.
    options = read_config(Path("run"))
    state = state_of(runs.Run({}, {}, options, options), Path("run"), None)
    assert (state.kind, state.accuracy) == ("finished", 0.4)
    # It goes on from the last, and a better one takes the best's place.
    code, _, errors = command("train", "--resume", "run", "--epochs", "6")
    assert code == 0, errors
    assert script[6:] == ["validating", "testing"]
    assert epochs_kept() == ["epoch-0006"] and result()["epoch"] == 6
    assert weight_of(mocapsnet.load("run")) == 6


def test_patience_stops_and_more_of_it_goes_on(script: list[str], command: Command) -> None:
    arguments = [*VALIDATED, "--patience", "2", "--epochs", "6", "--out", "run"]
    code, output, errors = command("train", *arguments)
    assert code == 0, errors
    said = "stopped early after epoch 4 of 6: 2 epochs brought no better validation accuracy than "
    assert f"\n{said}90.00% after epoch 2\n" in output
    assert "the network after epoch 4, the last; validation accuracy was best with" in output
    assert epochs_kept() == ["epoch-0004"] and weight_of(mocapsnet.load("run")) == 4
    assert result()["stopped_early"] is True
    code, output, errors = command("train", "--resume", "run", "--epochs", "9")
    said = said.replace("of 6", "of 9")
    assert (code, errors) == (0, "")
    assert output == f"run {said}90.00% after epoch 2; give a larger --patience to go on\n"
    code, output, errors = command("train", "--resume", "run", "--patience", "3")
    assert code == 0, errors
    assert "stopped early after epoch 5 of 6: 3 epochs" in output
    code, output, errors = command("train", "--resume", "run", "--patience", "4")
    assert code == 0 and "stopped early" not in output, errors
    assert result()["epochs_done"] == 6 and result()["stopped_early"] is False


@pytest.mark.parametrize(
    ("function", "at"),
    [
        ("write_whole", 3),  # before the new checkpoint has its name
        ("sync_folder", 3),  # after that
        ("shutil.rmtree", 2),  # a new best is there, the one before is removed
    ],
)
def test_a_kill_never_loses_the_best(
    function: str, at: int, script: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the checkpoint of epoch `at` is saved."""
    save = checkpoints.save

    def killed(*_: object, **__: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:

        def dying(state: Any, run: Path, done: int, *rest: Any) -> None:
            if done == at:
                patch.setattr(f"mocapsnet.train.checkpoints.{function}", killed)
            save(state, run, done, *rest)

        patch.setattr(checkpoints, "save", dying)
        arguments = [*VALIDATED, "--keep", "best", "--epochs", "3", "--out", "run"]
        assert command("train", *arguments)[0] == 9
    path, epoch = checkpoints.kept(Path("run"), "best") or (None, 0)
    assert epoch == 2 and path == Path("run/checkpoints/epoch-0002")
    assert (path / checkpoints.STATE).is_file() and (path / checkpoints.WEIGHTS).is_file()
    code, _, errors = command("train", "--resume", "run")
    assert code == 0, errors
    assert epochs_kept() == ["epoch-0002", "epoch-0003"]
    assert weight_of(mocapsnet.load("run")) == 2 and result()["epoch"] == 2


def test_a_best_that_was_removed_by_hand(script: list[str], command: Command) -> None:
    command("train", *VALIDATED, "--keep", "best", "--epochs", "3", "--out", "run")
    Path("run/checkpoints/epoch-0002").rename("elsewhere")
    for arguments in ("train --resume run --epochs 4", "evaluate run --device cpu"):
        code, _, errors = command(*arguments.split())
        assert code == 2 and errors.count("\n") == 1
        assert "epoch-0002, the checkpoint of the best epoch of run, is missing" in errors


def test_keep_is_not_changed_by_a_resume(script: list[str], command: Command) -> None:
    command("train", *VALIDATED, "--epochs", "1", "--out", "run")
    code, _, errors = command("train", "--resume", "run", "--keep", "best")
    assert code == 2 and "--keep best does not go with --resume: the run has last" in errors


@pytest.mark.usefixtures("pictures")
def test_resumed_is_the_same_as_whole_and_evaluated_as_reported(command: Command) -> None:
    """Nothing scripted: the split, the best and the test repeat bit for bit."""
    arguments = [*VALIDATED, "--keep", "best", "--lr", "0.02"]
    assert command("train", *arguments, "--epochs", "3", "--out", "whole")[0] == 0
    assert command("train", *arguments, "--epochs", "1", "--out", "run")[0] == 0
    code, _, errors = command("train", "--resume", "run", "--epochs", "3")
    assert code == 0, errors
    whole, parts = Path("whole"), Path("run")
    assert rows(whole) == rows(parts)
    assert (whole / "result.json").read_bytes() == (parts / "result.json").read_bytes()
    a, b = (mocapsnet.load(run).state_dict() for run in (whole, parts))
    assert_equal_nested(dict(a), dict(b))
    code, output, errors = command("evaluate", "run", "--device", "cpu")
    assert code == 0, errors
    accuracy, epoch = result()["test_accuracy"], result()["epoch"]
    assert (
        f"after epoch {epoch}, the best by validation accuracy: test accuracy {accuracy:.2%}"
        in (output)
    )
    assert Path("run/learning_curves.png").is_file() and Path("run/worst_images.png").is_file()


def test_two_processes_validate_with_the_images_of_one(command: Command) -> None:
    options = [*VALIDATED, "--epochs", "1", "--lr", "1e-12", "--keep", "best"]
    assert command("train", *options, "--out", "alone")[0] == 0
    done = run_two("train", *options, "--out", "both")
    assert done.returncode == 0, done.stderr
    (one,), (two,) = rows(Path("alone")), rows(Path("both"))
    assert one.keys() == two.keys() and "validation_loss" in one
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=256 * 2**-24), name


def test_a_run_of_an_older_format_goes_on(command: Command) -> None:
    """Its config.json and its checkpoint know nothing of validation."""
    assert command("train", *TINY, "--epochs", "1", "--out", "run")[0] == 0
    for path in ("run/config.json", "run/checkpoints/epoch-0001/state.json"):
        content = json.loads(Path(path).read_text())
        content["format"] = 4
        content.pop("best", None)
        content.get("options", {}).pop("watch", None)
        Path(path).write_text(json.dumps(content))
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 0, errors
    assert [row["epoch"] for row in rows(Path("run"))] == [1, 2]
    assert command("evaluate", "run", "--device", "cpu")[0] == 0


def test_the_curves_show_validation_and_the_test_at_the_end() -> None:
    from mocapsnet.train.plots import learning_curves

    names = ["accuracy", "margin", "reconstruction"]
    values = {f"{split}_{n}": 0.5 for split in ("train", "validation") for n in names}
    tested = Evaluation(0.1, 0.2, 0.3, torch.tensor([[3, 1], [0, 0]]))
    figure = learning_curves([{"epoch": n} | values for n in (1, 2)], "margin loss", 1, tested)
    for axes, value in zip(figure.axes, (0.75, 0.2, 0.3), strict=True):
        assert [line.get_label() for line in axes.lines] == ["train", "validation", "test, epoch 1"]
        assert axes.lines[2].get_xydata().tolist() == [[1, value]]
    assert figure.axes[0].get_title() == "Accuracy (test, epoch 1: 75.00%)"


def test_a_failure_between_the_checkpoint_and_the_network_is_mended(
    script: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch is the best; its checkpoint is there, and RUN/model not yet."""
    write = loop.model_folder.write

    def full(run: Path, model: Any, options: Any, done: int, *rest: Any) -> Path:
        if done == 2:
            raise OSError(28, "No space left on device", str(run))
        return write(run, model, options, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.model_folder, "write", full)
        arguments = [*VALIDATED, "--keep", "best", "--epochs", "3", "--out", "run"]
        code, _, errors = command("train", *arguments)
    assert code == 1 and "The last checkpoint, run/checkpoints/epoch-0002, is whole" in errors
    assert epochs_kept() == ["epoch-0002"] and weight_of(mocapsnet.load("run")) == 1

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", raising(KeyboardInterrupt()))
        assert command("train", "--resume", "run")[0] == 130
    assert weight_of(mocapsnet.load("run")) == 2
    card = Path("run/model/README.md").read_text()
    assert "| validation accuracy | 90.00% |" in card and "| epochs | 2 |" in card
    written = Path("run/model/model.safetensors").stat().st_mtime_ns
    assert command("train", "--resume", "run")[0] == 0  # the third is not better
    assert weight_of(mocapsnet.load("run")) == 2 and result()["epoch"] == 2
    assert Path("run/model/model.safetensors").stat().st_mtime_ns > written  # with the test


def test_an_epoch_is_kept_where_its_test_fails(
    train: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", raising(MemoryError()))
        code, _, errors = command("train", *TINY, "--out", "run", "--epochs", "1")
    assert code == 1 and "not enough memory" in errors
    assert epochs_kept() == ["epoch-0000", "epoch-0000-steps-000003"]
    code, output, errors = command("train", "--resume", "run")
    assert code == 0 and "in epoch 1, after 3 steps of it" in output, errors
    assert rows(whole) == rows(Path("run"))
