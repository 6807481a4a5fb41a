"""RUN/start.json against the network's own gradients and the losses of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mocapsnet import CapsuleLoss, cli, inspect_layers
from mocapsnet.train import data, prepare, start
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.trainer import Trainer

from .helpers import TINY

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


def test_layers_before_the_first_step(train: Train) -> None:
    """A batch of 16 in five parts, which are not alike."""
    arguments = "--epochs 1 --blocks 2 --skip twice --velocity block --gradient-accumulation 5"
    run = train("run", *arguments.split())
    found = json.loads((run / "start.json").read_text())

    options = cli.parse(["train", *TINY, *arguments.split()])
    assert isinstance(options, TrainOptions)
    train_set = data.load(options.data)[0].first(48)
    torch.manual_seed(0)
    network = prepare.build(options, train_set)
    order, offsets = (t[:16] for t in data.epoch_order(48, 1, 0, 0))
    pixels = data.random_crop(train_set.images[order], offsets, 1) / 255
    images, labels = network.preprocessing(pixels), train_set.labels[order]
    out = network(images, labels)
    loss = CapsuleLoss()(out, pixels, labels)
    loss.total.backward()

    close = dict(rel=1e-4)  # float32 sums in another order
    assert found["images"] == 16 and found["losses"] == {}
    for name, part in (("loss", "total"), ("margin", "margin"), ("reconstruction",) * 2):
        assert found[name] == pytest.approx(getattr(loss, part).item() / 16, **close), name
    assert found["accuracy"] == (out.lengths.argmax(1) == labels).double().mean()
    layers = {row["layer"]: row for row in found["layers"]}
    owners = [name.rpartition(".")[0] for name, _ in network.named_parameters()]
    assert list(layers) == list(dict.fromkeys(owners)) and len(layers) == 10
    for name, row in layers.items():
        own = [p for n, p in network.named_parameters() if n.rpartition(".")[0] == name]
        weights, gradients = (
            torch.cat([t.flatten().double() for t in ts])
            for ts in (own, [p.grad for p in own if p.grad is not None])
        )
        assert row["weights"] == len(weights) == len(gradients)
        assert row["weight_norm"] == pytest.approx(weights.norm().item(), **close)
        assert row["gradient_norm"] == pytest.approx(gradients.norm().item(), **close) != 0
        rms = gradients.square().mean().sqrt().item()
        assert row["gradient_rms"] == pytest.approx(rms, **close)
    records = inspect_layers(network, images, labels)
    assert len(records) == 6
    for name, record in records.items():
        row = layers[name]
        assert row["in_length"] == pytest.approx(record.u.norm(dim=-1).mean().item(), **close)
        assert row["out_length"] == pytest.approx(record.v.norm(dim=-1).mean().item(), **close)
    assert {name for name, row in layers.items() if "in_length" in row} == records.keys()


def test_losses_of_the_first_steps(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of three steps, of 20, 20 and 8 images; a stop and a resume change nothing."""
    monkeypatch.setattr(start, "STEPS", (1, 3, 5, 9))
    monkeypatch.setattr(start, "WINDOW", 2)
    steps: list[Tensor] = []
    step = Trainer._step

    def recorded(self: Trainer, *given: Any) -> Tensor:
        steps.append(step(self, *given).double())
        return steps[-1]

    monkeypatch.setattr(Trainer, "_step", recorded)
    whole = train("whole", "--batch-size", "20", "--epochs", "2")
    found = json.loads((whole / "start.json").read_text())
    assert len(steps) == 6 and list(found["losses"]) == ["1", "3", "5"]
    expected = {
        "1": steps[0] / 20,
        "3": (steps[1] + steps[2]) / 28,
        "5": (steps[3] + steps[4]) / 40,
    }
    for name, sums in expected.items():
        assert list(found["losses"][name]) == ["loss", "margin", "reconstruction", "accuracy"]
        assert list(found["losses"][name].values()) == pytest.approx(sums.tolist(), rel=1e-6)

    run = train("run", "--batch-size", "20", "--epochs", "1")
    assert list(json.loads((run / "start.json").read_text())["losses"]) == ["1", "3"]
    assert command("train", "--resume", "run", "--epochs", "2")[0] == 0
    assert json.loads((run / "start.json").read_text()) == found
    (run / "start.json").unlink()  # as in runs from before there was such a file
    start.note_losses(run, 0, torch.ones(3, 4), 48, 20)
    assert not (run / "start.json").exists()


@pytest.mark.parametrize("model", ["conv-mocapsnet", "cnn"])
def test_other_networks(model: str, command: Command) -> None:
    sizes = "--limit 16 --batch-size 16 --epochs 1 --device cpu --blocks 1".split()
    code, _, errors = command("train", "--model", model, *sizes, "--out", "run")
    assert code == 0, errors
    layers = json.loads(Path("run/start.json").read_text())["layers"]
    lengths = [row["layer"] for row in layers if 0 < row.get("out_length", 0) < 1]
    hidden = ["stages.0.layers.0", "stages.0.layers.1"]
    assert lengths == ([] if model == "cnn" else [*hidden, "last"])
    code, output, errors = command("compare", "run")
    assert code == 0, errors
    assert ("| hidden 2 " in output) == ("| classes " in output) == (model != "cnn")


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        ("--init paper", "--init length starts with longer capsules"),
        ("--model capsnet --method sda --blocks 2", "--bias 0.1 starts with longer capsules"),
        ("--model capsnet --method sda --blocks 2 --bias 0.1", None),
        ("", None),
    ],
)
def test_a_start_without_gradients_is_told(
    arguments: str, way: str | None, command: Command
) -> None:
    code, _, errors = command("train", *TINY, "--epochs", "1", *arguments.split(), "--out", "run")
    assert code == 0
    if way is None:
        assert "warning" not in errors
    else:
        [line] = [line for line in errors.splitlines() if "warning" in line]
        first = json.loads(Path("run/start.json").read_text())["layers"][0]["gradient_rms"]
        assert first < 1e-10 and f"first layer are {first:.0e} at the start" in line
        assert line.endswith(way)
