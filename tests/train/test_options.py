"""The command line: defaults, presets, help, and one clear error for bad input."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mocapsnet.benchmarks
import mocapsnet.train
from mocapsnet import CapsNetConfig, build_model, cli
from mocapsnet.model import MODELS
from mocapsnet.train import memory, prepare
from mocapsnet.train.data import SHAPES
from mocapsnet.train.option_values import flag, flat, from_json, resolve, to_json
from mocapsnet.train.options import PRESETS, MachineOptions, TrainOptions

from .helpers import TINY, run_process

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("dataset", SHAPES)
def test_presets_make_networks_that_fit(dataset: str) -> None:
    options = cli.parse(["train", "--dataset", dataset])
    assert isinstance(options, TrainOptions)
    sizes = {k: v for k, v in dataclasses.asdict(options.model).items() if k != "name"}
    config = CapsNetConfig(image_shape=SHAPES[dataset], classes=10, **sizes)
    assert config.primary_capsules > 0
    assert None not in (options.optim.epochs, options.optim.batch_size, options.data.pad)


def test_published_settings() -> None:
    """Section 4.1 of the paper; all but the sizes that digits needs are the same everywhere."""
    options = cli.parse(["train", "--dataset", "cifar10"])
    model, optim = options.model, options.optim
    assert (model.channels, model.kernel_size, model.stride) == (256, 9, 2)
    assert (model.capsules, model.capsule_dim, model.class_dim) == (32, 8, 16)
    assert (model.decoder, model.iterations, model.method) == ((512, 1024), 3, "rba")
    assert (optim.batch_size, optim.epochs, optim.lr) == (128, 60, 1e-3)
    assert options.data.pad == 2
    assert cli.parse(["train", "--dataset", "mnist"]).optim.epochs == 30


def test_defaults_are_those_of_the_library() -> None:
    ours = {f.name: f.default for f in dataclasses.fields(type(TrainOptions().model))}
    theirs = {f.name: f.default for f in dataclasses.fields(CapsNetConfig)}
    resolved = {"channels", "kernel_size", "stride", "capsules", "capsule_dim", "decoder"}
    shared = ours.keys() & theirs.keys() - resolved
    assert len(shared) > 10
    for name in shared:
        assert ours[name] == theirs[name], name


def test_given_options_win_over_the_preset() -> None:
    options = cli.parse("train --channels 24 --epochs 3 --decoder 7 9".split())
    assert (options.model.channels, options.optim.epochs) == (24, 3)
    assert options.model.decoder == (7, 9)
    assert options.model.kernel_size == PRESETS["digits"].kernel_size


def test_options_survive_json() -> None:
    arguments = "train --dataset svhn --data-dir /data --decoder 7 --limit 5 --out x"
    options = cli.parse(arguments.split())
    assert isinstance(options, TrainOptions)
    assert from_json(json.loads(json.dumps(to_json(options)))) == options


def test_help_names_every_option(command: Command) -> None:
    code, text, _ = command("train", "--help")
    assert code == 0
    for name in flat(TrainOptions()):
        assert flag(name) in text, name
    assert "digits 30, (fashion-)mnist 30, others 60" in " ".join(text.replace("│", "").split())


def test_version(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "EXTRA", ["not_installed_anywhere"])
    assert command("--version") == (0, f"mocapsnet {mocapsnet.__version__}\n", "")


def test_nothing_imports_the_command_line() -> None:
    """It stands above train and benchmarks, so that both can be used without it."""
    modules = [
        module.name
        for package in (mocapsnet, mocapsnet.train, mocapsnet.benchmarks)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if module.name not in ("mocapsnet.cli", "mocapsnet.__main__")
    ]
    assert {"mocapsnet.train.loop", "mocapsnet.benchmarks.gpu_report"} <= set(modules)
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    code += "; sys.exit('mocapsnet.cli' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *modules], check=True)


def test_help_as_a_process() -> None:
    done = run_process("--help")
    assert done.returncode == 0, done.stderr
    for name in ("train", "evaluate", "visualize"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --epochs 0", "--epochs must be greater than 0, got 0"),
        ("train --batch-size -1", "--batch-size must be greater than 0, got -1"),
        ("train --lr nan", "--lr must be greater than 0, got nan"),
        ("train --limit 0", "--limit must be greater than 0, got 0"),
        ("train --test-share 1", "--test-share must be between 0 and 1, got 1.0"),
        ("train --image-size 0 --dataset folder", "--image-size must be greater than 0, got 0"),
        ("train --image-size 9", "--image-size 9 is for --dataset folder"),
        ("train --broken-images skip", "--broken-images skip is for --dataset folder"),
        ("train --dataset folder --data-dir used", "class folder in used"),
        ("train --pad -1", "--pad must be 0 or greater, got -1"),
        ("train --kernel-size 9", "8x8"),
        ("train --gamma nan", "gamma must lie between 0 and 1"),
        ("train --decoder 64 -5", "decoder: every width must be at least 1; got (64, -5)"),
        ("train --decoder 0", "decoder: every width must be at least 1; got (0,)"),
        ("train --model capsnet --gamma 0.5", "--gamma 0.5 is for --model mocapsnet"),
        ("train --model rescapsnet --memory stored", "rescapsnet has no momentum"),
        (f"train --seed {2**64}", "--seed must be below 2^64"),
        (f"train --batch-size {2**40}", "--batch-size must be below 2^31"),
        ("train --reconstruction-weight inf", "--reconstruction-weight must be 0 or greater"),
        ("train --gradient-accumulation 33", "a batch of 32 images (--batch-size)"),
        ("train --pad 8", "--pad 8 must be less than the images' size of 8 x 8"),
        ("train --capsules 100000000", "GiB for weights, gradients and optimiser"),
        ("train --channels 8000000", "a smaller network"),
        ("train --out used/file", "used/file exists and is not an empty folder"),
        ("train --out used/file/run", "--out used/file/run: cannot write there: Not a directory"),
        ("train --out /proc/run", "--out /proc/run: cannot write there: "),
        ("train --gamma 1.5", "gamma"),
        ("train --channels 20", "multiple of capsule_dim=8"),
        ("train --dataset mnist --data-dir nowhere", "nowhere/MNIST/raw/train-images-idx3-ubyte"),
        ("train --out used", "used exists and is not an empty folder"),
        ("train --resume missing", "missing does not exist"),
        ("train --resume used/file", "used/file is not a folder; give a folder that"),
        ("train --resume used", "used has no config.json"),
        ("evaluate missing", "missing does not exist"),
        ("visualize used", "used has no config.json"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: str, expected: str, command: Command) -> None:
    Path("used").mkdir()
    Path("used/file").touch()
    before = sorted(Path().rglob("*"))
    code, _, errors = command(*arguments.split())
    assert code == 2
    assert errors.startswith("mocapsnet: ") and expected in errors
    assert "Traceback" not in errors
    assert sorted(Path().rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sizes", [{}, dict(blocks=2, decoder=(), kernel_size=3, channels=16, bias=0.1)]
)
def test_parameters_are_counted_without_building(model: str, sizes: dict[str, Any]) -> None:
    config = CapsNetConfig((3, 28, 24), 7, **({"blocks": 0} if model == "capsnet" else {}) | sizes)
    built = build_model(model, config)
    assert config.parameters == sum(p.numel() for p in built.parameters())
    images = torch.rand(1, 3, 28, 24)
    first, features = built.convolutions[:2](images), built.convolutions(images)
    assert memory.feature_numbers(config) == first.numel() + features.numel()


def test_a_batch_that_does_not_fit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 2**20)
    arguments = "train --channels 8 --capsules 4 --decoder 8 --batch-size"
    code, _, errors = command(*arguments.split(), "1347", "--out", "run")
    assert code == 2 and "a smaller --batch-size needs less" in errors
    assert "make of 1347 images" in errors and not Path("run").exists()
    arguments += " 1347 --gradient-accumulation 10 --epochs 1 --out run"
    code, _, errors = command(*arguments.split())
    assert code == 0, errors


def test_memory_that_gives_out(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the estimate let pass; the error is PyTorch's own."""

    def step(*_: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("mocapsnet.train.trainer.Trainer._step", step)
    code, _, errors = command("train", *TINY, "--out", "run")
    assert code == 1 and errors.count("\n") == 1
    assert "not enough memory: " in errors and "run/checkpoints/epoch-0000, is whole" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("train --dataset cifar", "cifar10"), ("train --epochs many", "many"), ("", "train")],
)
def test_what_cannot_be_parsed_leaves_with_2(
    arguments: str, expected: str, command: Command
) -> None:
    code, _, errors = command(*arguments.split())
    assert code == 2 and expected in errors and "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_without_cuda(command: Command) -> None:
    code, _, errors = command("train", "--device", "cuda")
    assert code == 2 and "finds no CUDA device" in errors


def test_missing_extra_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "EXTRA", [*cli.EXTRA, "not_installed_anywhere"])
    code, _, errors = command("train")
    assert code == 2
    assert "not_installed_anywhere" in errors and 'pip install "mocapsnet[train]"' in errors


@pytest.mark.parametrize("native", [True, False])
def test_slow_bfloat16_is_announced(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "cpu_has_bfloat16", lambda: native)
    prepare.make_accelerator(MachineOptions(device="cpu", mixed_precision="bf16"))
    assert ("no bfloat16 instructions" in capsys.readouterr().err) is not native


def test_resolve_is_idempotent() -> None:
    options = resolve(TrainOptions())
    assert resolve(options) == options


def test_the_published_code_s_grouping_and_skip(train: Callable[..., Path]) -> None:
    run = train("run", "--epochs", "1", *"--grouping pixels --skip twice --velocity block".split())
    config = mocapsnet.load(run).config
    assert (config.grouping, config.skip, config.velocity) == ("pixels", "twice", "block")


def test_parts_of_a_batch_where_they_would_change_the_result(command: Command) -> None:
    digits = "--dataset digits --limit 32 --batch-size 8 --device cpu --epochs 1".split()
    batch = "--model capsnet --channels 8 --capsules 4 --method sda --sda-mean batch".split()
    code, _, errors = command("train", *digits, *batch, "--gradient-accumulation", "2")
    assert code == 2 and "--sda-mean batch takes a mean over the images that" in errors, errors
    assert not Path("runs").exists()
    assert command("train", *digits, "--model", "resnet18", "--out", "run")[0] == 0
    words = ["train", "--resume", "run", "--gradient-accumulation", "2"]
    code, _, errors = command(*words)
    assert code == 2 and "--gradient-accumulation 2: the run has 1, and resnet18" in errors


def test_random_test_crops_that_may_show_nothing(command: Command) -> None:
    words = "--dataset digits --crop resized --test-crop random --pad 9 --device cpu".split()
    code, _, errors = command("train", *words)
    assert code == 2 and "--pad 9 must be less than the images' size of 8 x 8" in errors
