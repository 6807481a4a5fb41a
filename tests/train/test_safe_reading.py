"""Nothing that lies in a run folder can run, whatever was put there."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mocapsnet.train import run_folder
from mocapsnet.train.errors import InputError
from mocapsnet.train.option_values import resolve, to_json
from mocapsnet.train.options import ModelOptions, TrainOptions

from .helpers import checkpoint

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]

# What Accelerate's save_state wrote, and its load_state unpickles.
PICKLES = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"]
COMMANDS = ["train --epochs 2 --resume", "evaluate --device cpu", "visualize --device cpu"]


class Program:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path("it-ran").touch, ()


def test_the_planted_program_would_run() -> None:
    pickle.loads(pickle.dumps(Program()))
    assert Path("it-ran").exists()


def test_a_planted_program_does_not_run(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `visualize` has read all there is before it draws, which takes long
    monkeypatch.setattr("mocapsnet.train.plots.write_pictures", lambda *_: [])
    monkeypatch.setattr("mocapsnet.train.pictures.inside.write", lambda *_: iter(()))
    whole = train("whole", "--epochs", "1")
    written = [path.relative_to(whole) for path in checkpoint(whole).iterdir()]
    assert len(written) == 3
    folder = written[0].parent
    for name in PICKLES:
        (whole / folder / name).write_bytes(pickle.dumps(Program()))
    for path in [Path("config.json"), Path("metrics.jsonl"), *written]:
        for arguments in COMMANDS:
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree(whole, "run")
            Path("run", path).write_bytes(pickle.dumps(Program()))
            code, _, errors = command(*arguments.split(), "run")
            assert not Path("it-ran").exists(), (path, arguments)
            assert "Traceback" not in errors
            needed = path.name in ("config.json", "model.safetensors") or (
                path in written and arguments.startswith("train")
            )
            assert code == (2 if needed else 0), (path, arguments, errors)
            if needed or path.name == "metrics.jsonl" and "evaluate" not in arguments:
                assert errors.count("\n") == 1 and str(path) in errors


def test_a_checkpoint_in_pickles_is_evaluated_but_not_resumed(
    train: Train, command: Command
) -> None:
    """The format before config.json named one."""
    run = train("run", "--epochs", "1")
    config = json.loads((run / "config.json").read_text())
    assert config.pop("format") == run_folder.FORMAT
    (run / "config.json").write_text(json.dumps(config))
    for name in ("state.json", "optimizer.safetensors"):
        (checkpoint(run) / name).unlink()
    (checkpoint(run) / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Program()))
    assert command("evaluate", "run", "--device", "cpu")[0] == 0
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert code == 2 and "kept its training state in pickles" in errors
    assert "start a new run" in errors and not Path("it-ran").exists()


def test_a_run_from_before_an_option_keeps_what_it_had(tmp_path: Path) -> None:
    """Also where that is no longer the default."""
    for name, rate, weight in (("conv-mocapsnet", 1.0, 0.5), ("resnet18", None, None)):
        model = ModelOptions(name=name)  # type: ignore[arg-type]
        options = to_json(resolve(TrainOptions(model=model)))
        assert options["optim"].pop("class_lr_factor") is options["optim"].pop("down_weight")
        (tmp_path / "config.json").write_text(json.dumps({"format": 6, "options": options}))
        optim = run_folder.read_config(tmp_path).optim
        assert (optim.class_lr_factor, optim.down_weight) == (rate, weight)


def test_a_run_may_have_options_that_did_nothing(tmp_path: Path) -> None:
    """They are refused now, but not of a run that was begun with them."""
    options = to_json(resolve(TrainOptions()))
    options["data"] |= {"crop": "resized", "pad": 2}
    options["model"] |= {"sda_mean": "batch", "memory": "stored", "anchor_every": 3}
    (tmp_path / "config.json").write_text(json.dumps({"format": 7, "options": options}))
    found = run_folder.read_config(tmp_path)
    assert (found.data.crop, found.data.pad) == ("resized", 0)
    assert found.model.memory == "stored" and found.model.anchor_every is None
    assert found.model.sda_mean == "input"
    (tmp_path / "config.json").write_text(json.dumps({"format": 8, "options": options}))
    with pytest.raises(InputError, match="--pad 2 is for --crop padded"):
        run_folder.read_config(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "state.json"])
def test_a_later_format_is_refused(file: str, train: Train, command: Command) -> None:
    run = train("run", "--epochs", "1")
    path = (run if file == "config.json" else checkpoint(run)) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    code, _, errors = command("train", "--resume", "run", "--epochs", "2")
    assert (
        code == 2
        and f"{path} is of format 99" in errors
        and f"reads up to {run_folder.FORMAT}" in errors
    )
