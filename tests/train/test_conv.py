"""`--model conv-mocapsnet` from end to end on a few digits, and its options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mocapsnet
from mocapsnet import ConvMoCapsNet, ConvMoCapsNetConfig, cli
from mocapsnet.train import data, memory, prepare
from mocapsnet.train.option_values import flag, flat, resolve
from mocapsnet.train.options import ModelOptions, OptimOptions, TrainOptions

from .helpers import assert_same_run, checkpoint, rows

Command = Callable[..., tuple[int, str, str]]

TINY = "--model conv-mocapsnet --stem 8 8 --capsules 4 --capsule-dim 4 --limit 48".split()
TINY += "--batch-size 16 --device cpu".split()
MIXED = "--flip --crop resized --mix both --weight-decay 0.01 --class-lr-factor 2".split()


@pytest.fixture
def fit(command: Command) -> Callable[..., Path]:
    def run(out: str, *arguments: str) -> Path:
        code, _, errors = command("train", *TINY, "--out", out, *arguments)
        assert code == 0, errors
        return Path(out)

    return run


def saved_options(run: Path) -> dict[str, dict[str, object]]:
    return json.loads((run / "config.json").read_text())["options"]  # type: ignore[no-any-return]


@pytest.mark.usefixtures("pictures")
def test_a_run_and_what_is_done_with_it(
    fit: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    run = fit("run", "--epochs", "2", *MIXED)
    saved = saved_options(run)
    # what was left to the images is written down, but for what a stem of its own leaves unused
    assert saved["conv"] == {
        "preset": None,
        "stem": [8, 8],
        "stem_stride": 1,
        "stem_blocks": 1,
        "backbone": None,
        "backbone_stage": None,
        "stage_strides": [1],
        "window": 3,
    }
    assert (saved["model"]["capsules"], saved["model"]["decoder"]) == (4, None)
    assert saved["optim"]["schedule"] == "cosine"
    assert [row["lr"] < 1e-3 for row in rows(run)] == [True, True]
    assert rows(run)[1]["train_loss"] < 0.98 * rows(run)[0]["train_loss"]
    assert {p.name for p in run.glob("*.png")} == {
        "confusion_matrix.png",
        "learning_curves.png",
        "worst_images.png",
    }
    assert type(mocapsnet.load(run)) is ConvMoCapsNet
    code, out, _ = command("train", "--resume", "run")
    assert code == 0 and "run is finished" in out
    code, out, _ = command("evaluate", "run")
    assert code == 0 and f"test accuracy {rows(run)[-1]['test_accuracy']:.2%}" in out
    code, out, _ = command("visualize", "run")
    assert code == 0 and "no dimensions.png: the network has no decoder" in out
    code, _, errors = command("train", "--resume", "run", "--epochs", "3")
    assert code == 2 and "--schedule cosine plans its learning rate over the run's 2" in errors
    code, _, errors = command("explore", "run", "--no-browser")
    assert code == 2 and "holds a ConvMoCapsNet" in errors
    pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy()
    from PIL import Image

    Image.fromarray(pixels).save(tmp_path / "some.png")
    code, out, _ = command("predict", "run", "some.png", "--pictures", "seen")
    assert code == 0 and Image.open("seen/some.png").width > 0


@pytest.mark.usefixtures("pictures")
def test_a_stopped_run_goes_on_bit_for_bit(
    fit: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mocapsnet.train.trainer import Trainer

    options = [*MIXED, "--decoder", "8", "--epochs", "2", "--limit", "24"]
    whole = fit("whole", *options)
    assert (whole / "reconstructions.png").exists()
    epoch = Trainer.epoch

    def stop(self: Trainer, number: int, *rest: object) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "epoch", stop)
        code, _, _ = command("train", *TINY, *options, "--out", "stopped")
        assert code == 130
    code, _, errors = command("train", "--resume", "stopped")
    assert code == 0, errors
    assert_same_run(Path("stopped"), whole)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--window", "3"], "--window 3 is for --model conv-mocapsnet"),
        (["--backbone", "resnet18"], "--backbone resnet18 is for --model conv-mocapsnet"),
        ([*TINY, "--channels", "8"], "--channels 8 is for the dense networks"),
        ([*TINY, "--init", "paper"], "--init paper is for the dense networks"),
        ([*TINY, "--backbone", "resnet18"], "is for the stem that --backbone replaces"),
        ([*TINY, "--backbone-stage", "2"], "--backbone-stage 2 is for --backbone"),
        ([*TINY, "--reconstruction-weight", "1"], "--reconstruction-weight 1.0 needs --decoder"),
        ([*TINY, "--stage-strides", "1", "2"], "images of 8x8 pixels are too small"),
        ([*TINY, "--preset", "224x224", "--limit", "16"], "images of 8x8 pixels are too small"),
        (["--crop-area", "0.5"], "--crop-area 0.5 is for --crop resized"),
        (["--crop", "resized", "--pad", "3"], "--pad 3 is for --crop padded"),
        (["--sda-mean", "batch"], "--sda-mean batch is for --method sda"),
        (["--memory", "stored", "--anchor-every", "3"], "3 is for --memory reversible"),
        (["--crop", "resized", "--crop-area", "0"], "--crop-area must be above 0"),
        (["--optimizer", "ranger21", "--schedule", "cosine"], "is for --optimizer adam"),
        (["--optimizer", "ranger21", "--weight-decay", "0.1"], "is for --optimizer adam"),
        (["--class-lr-factor", "0"], "--class-lr-factor must be greater than 0"),
        (["--optimizer", "ranger21", "--class-lr-factor", "2"], "is for --optimizer adam"),
        (["--model", "cnn", "--class-lr-factor", "2"], "is for networks of capsules"),
        (["--model", "resnet18", "--down-weight", "1"], "is for networks of capsules"),
        (["--down-weight", "-1"], "--down-weight must be 0 or greater"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or greater"),
        (["--model", "capsnet", "--gamma", "0.5"], "capsnet has no momentum"),
    ],
)
def test_options_that_do_not_go_together_are_one_clear_error(
    arguments: list[str], message: str, command: Command
) -> None:
    code, _, errors = command("train", *arguments, "--out", "run")
    assert code == 2 and message in errors, errors
    assert not Path("run").exists()


def test_many_classes_reach_the_loss_and_the_optimiser(fit: Callable[..., Path]) -> None:
    for name, given, weight in (
        ("conv-mocapsnet", None, None),
        ("conv-mocapsnet", 0.2, 0.2),
        ("mocapsnet", None, 0.5),
        ("mocapsnet", 0.2, 0.2),
    ):
        options = TrainOptions(
            model=ModelOptions(name=name),  # type: ignore[arg-type]
            optim=OptimOptions(down_weight=given),
        )
        assert prepare.make_criterion(resolve(options)).margin.down_weight == weight
    run = fit("run", "--epochs", "1", "--class-lr-factor", "3")
    state = json.loads((checkpoint(run) / "state.json").read_text())
    rest, last = state["optimizer"]["param_groups"]
    assert rest["initial_lr"] == 1e-3 and last["initial_lr"] == pytest.approx(3e-3)


def test_presets_by_name_and_by_image() -> None:
    shape = {"digits": 8, "mnist": 32, "cifar10": 32}
    for dataset, size in shape.items():
        asked = cli.parse(["train", "--model", "conv-mocapsnet", "--dataset", dataset])
        assert isinstance(asked, TrainOptions)
        C, H, W = data.SHAPES[dataset]
        pixels = torch.zeros(1, C, H, W, dtype=torch.uint8)
        images = data.image_set(pixels, [0], [str(k) for k in range(10)], ("", ""))
        found = prepare.network_config(asked, images)
        assert found == ConvMoCapsNetConfig.preset((C, H, W), 10, size)
        settled = prepare.settled(asked, images)
        assert prepare.network_config(settled, images) == found
        assert prepare.settled(settled, images) == settled
        unset = [name for name, value in flat(settled).items() if value is None]
        assert {flag(n) for n in unset if n.startswith("conv.")} == {
            "--preset",
            "--backbone",
            "--backbone-stage",
        }


def test_the_memory_told_is_at_least_what_the_network_has() -> None:
    config = ConvMoCapsNetConfig.preset((3, 32, 32), 10, backbone="resnet18", backbone_stage=1)
    model = ConvMoCapsNet(**vars(config))
    assert config.parameters == sum(p.numel() for p in model.parameters())
    config = ConvMoCapsNetConfig.preset((3, 32, 32), 10)
    # 32 channels of 32x32, 64 of 16x16 and 128 of 8x8, twice each
    assert memory.feature_numbers(config) == 2 * (32 * 1024 + 64 * 256 + 128 * 64)
    with pytest.raises(memory.InputError, match="for what the convolutions make of 100000000"):
        memory.check_fit(config, OptimOptions(), 10**8, torch.device("cpu"))
