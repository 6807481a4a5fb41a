"""Conflicting bundles: the measure, its record over training, and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from math import log
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mocapsnet import CapsNet, ConvMoCapsNet
from mocapsnet.train import bundles, run_folder
from mocapsnet.train.bundles import Bundles
from mocapsnet.train.data import ImageSet
from mocapsnet.train.options import OptimOptions
from mocapsnet.train.pictures import bundles as picture
from mocapsnet.train.pictures import inside

from .helpers import assert_same_run

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]


OPTIM = OptimOptions(lr=0.001, batch_size=32)


def test_outputs_are_the_same_if_no_weight_could_tell() -> None:
    # Float32 numbers are 2^-24 apart below 1, so outputs 2^-24 / step = 0.0019 apart.
    step = 0.001 / 32
    apart = 2**-24 / step
    a = torch.tensor([[1.0, 2.0], [1.0 + apart, 2.0], [1.0, 2.0], [1.0, 2.0 + apart / 100]])
    assert bundles.numbered(bundles.same(a, 1.0, step)).tolist() == [0, 1, 0, 0]
    torch.manual_seed(0)
    u = torch.randn(40, 1, 2) * 0.003
    bundle = bundles.numbered(bundles.same(u, 0.7, step))
    for i in range(40):
        for j in range(40):
            equal = torch.equal(0.7 - step * u[i], 0.7 - step * u[j])
            assert bool(bundle[i] == bundle[j]) == equal
    assert 1 < bundle.max() < 39, "some are the same, some are not"


def test_entropy_is_weighted_by_the_size_of_the_bundles_and_natural() -> None:
    labels = torch.tensor([0, 0, 2, 2, 1])
    one = -(2 / 3 * log(2 / 3) + 1 / 3 * log(1 / 3))
    two = torch.tensor([0, 0, 0, 1, 1])
    assert bundles.weighted_entropy(two, labels) == pytest.approx(3 / 5 * one + 2 / 5 * log(2))
    assert bundles.weighted_entropy(torch.arange(5), labels) == 0
    assert bundles.weighted_entropy(torch.tensor([0, 0, 1, 1, 2]), labels) == 0
    assert bundles.weighted_entropy(torch.zeros(3).long(), torch.arange(3)) == pytest.approx(log(3))


def test_a_dead_layer_bundles_everything_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CapsNet(
        (1, 8, 8), 3, blocks=2, capsules=4, channels=8, kernel_size=3, decoder=(8,)
    ).train()
    with torch.no_grad():
        model.stack[1].weight.zero_()
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
    train_set = ImageSet(images, torch.arange(12) % 3)
    optim = OptimOptions(lr=0.1, batch_size=4)
    found = bundles.measure(model, train_set, optim, 7)
    assert found.bundles == [12, 12, 12, 1, 1, 1]
    assert found.entropy[:3] == [0, 0, 0] and found.entropy[3:] == pytest.approx([log(3)] * 3)
    assert (found.epoch, found.images, found.labels) == (7, 12, pytest.approx(log(3)))
    assert model.training, "left as it was"
    monkeypatch.setattr(bundles, "BATCH", 5)
    assert bundles.measure(model, train_set, optim, 7).entropy == found.entropy
    coarse = dataclasses.replace(optim, lr=1e-9)  # no step is large enough to notice anything
    # But for what the dead layer reads: beside a weight of 0 every difference counts.
    assert bundles.measure(model, train_set, coarse, 7).bundles == [1, 1, 12, 1, 1, 1]


def test_a_run_records_them_and_goes_on_recording(train: Train, command: Command) -> None:
    run = train("recorded", "--epochs", "1", "--bundles")
    plain = train("plain", "--epochs", "1")
    assert_same_run(run, plain)
    first = bundles.read(run)
    assert [row.epoch for row in first] == [0, 1] and len(first[0].entropy) == 4
    with (run / bundles.FILE).open("a") as file:
        file.write('{"epoch": 2}\n')
    code, _, errors = command("train", "--resume", "recorded", "--epochs", "2")
    assert code == 0 and "bundles.jsonl: line 3 cannot be read" in errors
    rows = bundles.read(run)
    assert rows[:2] == first and [row.epoch for row in rows] == [0, 1, 2]
    assert run_folder.read_config(run).bundles and not run_folder.read_config(plain).bundles


def test_checkpoints_that_were_not_recorded_are_measured(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("run", "--epochs", "1", "--limit", "16")
    loaded = []
    monkeypatch.setattr(bundles.checkpoints, "load_weights", lambda c, _: loaded.append(c.name))
    measured = Bundles(1, 16, 2.3, [16], [0.0])
    monkeypatch.setattr(bundles, "measure", lambda *_: measured)
    model, images, optim = None, None, OptimOptions()
    assert bundles.history(run, model, images, optim, 1) == [measured]  # type: ignore[arg-type]
    assert loaded == ["epoch-0001"]
    bundles.record(run, model, images, optim, 1)  # type: ignore[arg-type]
    assert bundles.history(run, model, images, optim, 1) == [measured]  # type: ignore[arg-type]
    assert loaded == ["epoch-0001"], "not measured again"


def test_layers_of_windows_are_measured_too() -> None:
    model = ConvMoCapsNet(
        (1, 16, 16), 3, stem=(8,), stem_blocks=1, capsules=2, capsule_dim=4, stage_strides=(1, 2)
    )
    images = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    found = bundles.measure(model, ImageSet(images, torch.arange(6) % 3), OPTIM, 0)
    assert picture.names(model, len(found.bundles)) == ["primary", "1", "2", "3", "4", "5"]
    assert found.bundles[0] == 6


def test_picture_of_forty_layers_over_thirty_epochs(tmp_path: Path) -> None:
    model = CapsNet((1, 8, 8), 3, blocks=1, capsules=2, channels=8, kernel_size=3, decoder=(4,))
    rows = [
        Bundles(n, 1024, 2.3, [1024] * 2 + [1] * 40, [0.0] * 2 + [2.3 - n / 20] * 40)
        for n in range(31)
    ]
    figure = picture.figure(model, rows)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    across, down = axes.get_xticklabels(), axes.get_yticklabels()
    assert [across[0].get_text(), across[-1].get_text()] == ["before", "30"]
    assert [t.get_text() for t in (down[0], down[1], down[-1])] == ["primary", "first", "40"]
    boxes = [label.get_window_extent() for label in across]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "epochs overlap"
    boxes = [label.get_window_extent() for label in down]
    assert all(a.y0 > b.y1 - 1 for a, b in pairwise(boxes)), "layers overlap"
    assert "no longer tell images of different classes apart" in figure.texts[0].get_text()
    (path,) = inside.write_bundles(tmp_path, model, rows)
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    calm = [row._replace(entropy=[0.0] * 42) for row in rows]
    assert "No layer confuses any two classes" in picture.figure(model, calm).texts[-1].get_text()
