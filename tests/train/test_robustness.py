"""Moved and overlapping test images, and the table of runs that `mocapsnet evaluate` makes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from mocapsnet import CNN
from mocapsnet.train.data import ImageSet, builtin
from mocapsnet.train.data import motion as motions
from mocapsnet.train.data.motion import Motion, affine, both_right, move, overlap
from mocapsnet.train.robustness import class_lengths

from .helpers import rows

Command = Callable[..., tuple[int, str, str]]
Train = Callable[..., Path]

SMALL: Any = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))


def pictures(count: int = 6, shape: tuple[int, int, int] = (1, 12, 9), margin: int = 0) -> ImageSet:
    """Random ones on black, of classes 0, 1, 2 in turn."""
    images = torch.randint(
        1, 256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    if margin:
        inside = torch.zeros(shape, dtype=torch.uint8)
        inside[:, margin:-margin, margin:-margin] = 1
        images = images * inside
    return ImageSet(images, torch.arange(count) % 3)


@pytest.mark.parametrize(
    ("angle", "scale", "shift"),
    [(0.0, 1.0, (3, -2)), (30.0, 1.0, (0, 0)), (-75.0, 0.7, (1, 2)), (12.0, 1.3, (-2, 1))],
)
def test_moved_as_torchvision_does(angle: float, scale: float, shift: tuple[int, int]) -> None:
    """Not square, so that width and height are told apart; colour."""
    images = pictures(shape=(3, 12, 9)).images.float()
    B = len(images)
    ours = affine(
        images, torch.full((B,), angle), torch.full((B,), scale), torch.tensor([shift] * B).float()
    )
    bilinear = InterpolationMode.BILINEAR
    theirs = tv.affine(images, angle, list(shift), scale, [0.0, 0.0], bilinear)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_every_image_has_a_move_of_its_own_within_the_range() -> None:
    """A single bright pixel tells where it went."""
    images = torch.zeros(500, 1, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    moved = move(ImageSet(images, torch.zeros(500, dtype=torch.int64)), Motion(shift=3), 0)
    assert (moved.images.images.sum((1, 2, 3)) == 255).all(), "whole pixels"
    places = moved.images.images[:, 0].nonzero()[:, 1:] - 10
    assert {tuple(place) for place in places.tolist()} == {
        (y, x) for y in range(-3, 4) for x in range(-3, 4)
    }
    assert moved.lost == 0


def test_turned_and_scaled_within_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def note(images: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
        seen.extend(drawn)
        return images

    monkeypatch.setattr(motions, "affine", note)
    move(pictures(900), Motion(rotate=20, scale=(0.8, 1.2)), 0)
    angle, scale, shift = seen
    assert -20 <= angle.min() < -19 and 19 < angle.max() <= 20
    assert 0.8 <= scale.min() < 0.81 and 1.19 < scale.max() <= 1.2
    assert not shift.any()


def test_a_still_motion_changes_nothing() -> None:
    images = pictures()
    moved = move(images, Motion(), 0)
    assert Motion().still and not Motion(rotate=1).still
    assert torch.equal(moved.images.images, images.images) and moved.lost == 0


def test_moves_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images, motion = pictures(20), Motion(2, 20, (0.8, 1.2))
    once = move(images, motion, 0).images.images
    pair = overlap(images, motion, 0)
    monkeypatch.setattr(motions, "BATCH", 3)
    assert torch.equal(move(images, motion, 0).images.images, once)
    assert torch.equal(overlap(images, motion, 0).images, pair.images)
    assert not torch.equal(move(images, motion, 1).images.images, once)
    assert not torch.equal(overlap(images, motion, 1).images, pair.images)


def test_what_is_not_black_stays_whole() -> None:
    images = pictures(300, (1, 28, 28), margin=4)
    free = move(images, Motion(6, 0, (1.0, 1.0)), 0)
    kept = move(images, Motion(6, 0, (1.0, 1.0), keep_whole=True), 0)
    assert free.lost > 0.02 and kept.lost < 1e-6
    assert torch.equal(kept.images.images.sum((1, 2, 3)), images.images.sum((1, 2, 3)))
    turned = move(images, Motion(6, 20, (0.7, 0.8), keep_whole=True), 0)
    # Sampling spreads an edge by less than a pixel; what it spreads outside is all that is lost.
    assert turned.lost < 0.01
    # An image without a black edge has nowhere to go, nor has one that is too large.
    full = pictures(50)
    assert torch.equal(move(full, Motion(3, keep_whole=True), 0).images.images, full.images)
    large = move(images, Motion(6, 0, (2.0, 2.0), keep_whole=True), 0).images.images
    centred = move(images, Motion(0, 0, (2.0, 2.0)), 0).images.images
    assert torch.equal(large, centred)


def test_pairs_are_of_two_classes_and_show_both() -> None:
    images = pictures(300)
    images = ImageSet(images.images, torch.randint(4, (300,)).clamp(max=2))
    pairs = overlap(images, Motion(), 0)
    assert (pairs.labels[:, 0] == images.labels).all()
    assert (pairs.labels[:, 0] != pairs.labels[:, 1]).all()
    assert len({tuple(p) for p in pairs.labels.tolist()}) == 6, "every class with every other"
    assert (pairs.images >= images.images).all()
    other = pairs.images > images.images
    for image, where in zip(pairs.images[:5], other[:5], strict=True):
        # The brighter of two pixels: some image of the set has all that is brighter.
        assert ((images.images == image) | ~where).all((1, 2, 3)).any()


def test_both_classes_must_be_right() -> None:
    lengths = torch.tensor(
        [[0.9, 0.8, 0.1], [0.8, 0.9, 0.1], [0.9, 0.1, 0.8], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]]
    )
    labels = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0], [1, 0]])
    assert both_right(lengths, labels).tolist() == [True, True, False, True, False]


def test_a_table_of_runs(train: Train, command: Command) -> None:
    capsules = train("capsules", "--epochs", "1")
    plain = train("plain", "--model", "cnn", "--epochs", "1")
    asked = "--shift 1 --rotate 20 --scale 0.8 1.2 --overlap --device cpu"
    code, text, errors = command("evaluate", "capsules", "plain", *asked.split())
    assert code == 0, errors
    assert "shifted by up to 1 pixel, turned by up to 20 degrees, scaled by 0.8 to 1.2" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    for line, run in zip(lines[1:], (capsules, plain), strict=True):
        accuracy = f"{rows(run)[-1]['test_accuracy']:.2%}"
        assert re.match(rf"\| {run} \| (MoCapsNet, 1 block|CNN) \| [\d,]+ \| 1 \| {accuracy}", line)
    code, output, errors = command("evaluate", "capsules", "plain", *asked.split(), "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert found["images"] == 48 and 0 < found["lost"] < 0.5
    sizes = [row["parameters"] for row in found["runs"]]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    for row in found["runs"]:
        assert 0 <= row["overlap"] <= 1 and 0 <= row["moved"] <= 1
        assert f"{row['moved']:.2%} | {row['overlap']:.2%}" in text
    # The same images again, and others.
    again = command("evaluate", "capsules", "plain", *asked.split(), "--json")[1]
    assert again == output
    # Of a single run without moves, the figure of its training.
    output = command("evaluate", "capsules", "--json", "--device", "cpu")[1]
    assert json.loads(output)["runs"][0]["accuracy"] == rows(capsules)[-1]["test_accuracy"]
    assert "moved" not in json.loads(output)["runs"][0]
    shutil.copytree(capsules, "fewer")
    config = json.loads(Path("fewer/config.json").read_text())
    config["options"]["data"]["limit"] = 40
    Path("fewer/config.json").write_text(json.dumps(config))
    code, _, errors = command("evaluate", "capsules", "fewer", "--device", "cpu")
    assert code == 2 and "fewer was tested on other images than capsules" in errors


class Share:
    """What `class_lengths` asks of an Accelerator, for one of two processes."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index, self.is_main_process = index, index == 0

    def reduce(self, x: torch.Tensor, _: str) -> torch.Tensor:
        return x


def test_processes_share_the_work() -> None:
    """33 images in batches of 16: one image is left for the last batch."""
    torch.manual_seed(0)
    model, images = CNN((1, 12, 9), 3, **SMALL), pictures(33).images
    shares: Any = [class_lengths(Share(i), model, images, 16) for i in (0, 1)]  # type: ignore[arg-type]
    counts = [int(share.any(1).sum()) for share in shares]
    assert counts == [17, 16]
    torch.testing.assert_close(shares[0] + shares[1], model.predict(images).lengths)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--shift -1", "--shift must be 0 or greater, got -1"),
        ("--rotate nan", "--rotate must be between 0 and 180 degrees, got nan"),
        ("--scale 1.2 0.8", "--scale must be two factors greater than 0, the least first"),
        ("--scale 0 1", "--scale must be two factors greater than 0"),
        ("--keep-whole --rotate 5", "--keep-whole limits shifts: give --shift with it"),
        ("--shift 1 --seed -1", "--seed must be between 0 and 2^64 - 1, got -1"),
        ("--shift 1", "missing does not exist"),
    ],
)
def test_bad_options_are_one_clear_error(arguments: str, expected: str, command: Command) -> None:
    code, _, errors = command("evaluate", "missing", *arguments.split())
    assert code == 2 and errors.startswith("mocapsnet: ") and expected in errors
    assert errors.count("\n") == 1


def test_overlapping_images_of_two_classes_mean_nothing() -> None:
    images = builtin.load("digits", "", False)[1]
    two = ImageSet(images.images, images.labels % 2)
    with pytest.raises(ValueError, match="three classes or more"):
        overlap(two, Motion(), 0)


def test_every_run_is_tested_in_its_own_precision(
    train: Train, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def lengths(*arguments: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return class_lengths(*arguments)

    train("exact", "--epochs", "1")
    train("fast", "--epochs", "1", "--mixed-precision", "bf16")
    monkeypatch.setattr("mocapsnet.train.robustness.class_lengths", lengths)
    code, _, errors = command("evaluate", "exact", "fast", "--shift", "1", "--device", "cpu")
    assert code == 0 and seen == [False, False, True, True], errors
