"""`mocapsnet predict`: what it prints, draws and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mocapsnet
from mocapsnet import MoCapsNet

Command = Callable[..., tuple[int, str, str]]

SHAPE = (1, 12, 10)
NAMES = ["ant", "bee", "cat"]


def save_model(folder: str = "model", shape: tuple[int, int, int] = SHAPE) -> MoCapsNet:
    torch.manual_seed(0)
    options = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))
    model = MoCapsNet(shape, 3, **options)
    with torch.no_grad():
        model.last.weight.mul_(20)  # lengths that differ
    model.class_names = NAMES
    model.save_pretrained(folder)
    return model.eval()


def save_images(folder: str, count: int = 3, size: tuple[int, ...] = (12, 10)) -> list[Path]:
    paths = []
    for n in range(count):
        path = Path(folder) / f"{n}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        values = np.random.default_rng(n).integers(0, 256, size, np.uint8)
        Image.fromarray(values).save(path)
        paths.append(path)
    return paths


def test_a_table_of_what_was_found(command: Command) -> None:
    model, paths = save_model(), save_images("images")
    found = model.predict(paths)
    code, output, errors = command("predict", "model", *map(str, paths))
    assert code == 0, errors
    header, *lines = output.splitlines()
    assert header.split() == ["file", "class", "length", "runner-up", "length"]
    for line, path, lengths in zip(lines, paths, found.lengths, strict=True):
        (first, second, _), order = lengths.sort(descending=True)
        assert line.split() == [
            str(path),
            NAMES[order[0]],
            f"{first:.3f}",
            NAMES[order[1]],
            f"{second:.3f}",
        ]


def test_json(command: Command) -> None:
    model, paths = save_model(), save_images("images")
    found = model.predict(paths)
    code, output, errors = command("predict", "model", "images", "--json", "--device", "cpu")
    assert code == 0, errors
    entries = json.loads(output)
    assert [entry["file"] for entry in entries] == list(map(str, paths))
    assert [entry["label"] for entry in entries] == found.labels.tolist()
    assert [entry["class"] for entry in entries] == found.names
    for entry, lengths in zip(entries, found.lengths, strict=True):
        assert entry["lengths"] == pytest.approx(lengths.tolist())
        first, second = sorted(entry["lengths"])[:0:-1]
        assert entry["length"] == first and entry["runner_up"]["length"] == second
        assert NAMES[entry["runner_up"]["label"]] == entry["runner_up"]["class"]


def test_pictures_show_the_image_beside_its_reconstruction(command: Command) -> None:
    model, paths = save_model(), save_images("a", 2)
    paths += save_images("b", 1, (30, 40, 3))  # another size, in colour, and a name used already
    code, _, errors = command("predict", "model", "a", "b", "--pictures", "out/deep")
    assert code == 0, errors
    assert {p.name for p in Path("out/deep").iterdir()} == {"0.png", "1.png", "0-2.png"}
    found = model.predict(paths)
    for name, pixels, rebuilt in zip(
        ("0.png", "1.png", "0-2.png"), found.pixels, found.reconstruction, strict=True
    ):
        with Image.open(Path("out/deep") / name) as file:
            sheet = torch.from_numpy(np.array(file)) / 255
        scale = sheet.shape[1] // 21
        assert sheet.shape[1] == 21 * scale and scale >= 5
        small = sheet[scale // 2 : 12 * scale : scale, scale // 2 :: scale, 0]
        torch.testing.assert_close(small[:, :10], pixels[0], atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(small[:, 11:], rebuilt[0], atol=0.51 / 255, rtol=0)
        caption = sheet[12 * scale :]
        assert caption.shape[0] >= 40 and (caption < 0.5).any()


def test_bad_images_are_named_and_the_others_predicted(command: Command) -> None:
    save_model()
    save_images("images")
    Path("images/bad.png").write_bytes(Path("images/0.png").read_bytes()[:40])
    code, output, errors = command("predict", "model", "images", "missing.png")
    assert code == 1
    assert [line.split()[0] for line in output.splitlines()[1:]] == [
        f"images/{n}.png" for n in range(3)
    ]
    assert "2 of 5 images cannot be used" in errors
    assert "images/bad.png: cannot be read as an image" in errors
    assert "missing.png: does not exist" in errors
    code, output, _ = command("predict", "model", "images", "--json")
    assert code == 1
    entries = json.loads(output)
    assert len(entries) == 4 and "cannot be read" in entries[3]["error"]


def test_a_folder_s_images_are_found_below_it_too(command: Command) -> None:
    save_model()
    save_images("images/ant", 1)
    save_images("images/bee", 1)
    Path("images/notes.txt").write_text("not an image")
    _, output, _ = command("predict", "model", "images", "--json")
    files = [entry["file"] for entry in json.loads(output)]
    assert files == ["images/ant/0.png", "images/bee/0.png"]


def test_more_images_than_fit_a_batch(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    model, paths = save_model(), save_images("images", 5)
    monkeypatch.setattr("mocapsnet.train.predict.BATCH_SIZE", 2)
    _, output, _ = command("predict", "model", *map(str, paths), "--json")
    labels = [entry["label"] for entry in json.loads(output)]
    assert labels == model.predict(paths).labels.tolist()


def test_what_cannot_be_used_is_said(command: Command) -> None:
    save_model()
    Path("empty").mkdir()
    code, _, errors = command("predict", "model", "empty")
    assert code == 2 and "empty holds no image files" in errors
    code, _, errors = command("predict", "none", "empty")
    assert code == 2 and "none is not a folder" in errors
    code, _, errors = command("predict", "empty", "empty")
    assert code == 2 and "empty/config.json does not exist" in errors
    code, _, errors = command("predict", "model")
    assert code == 2 and "IMAGES" in errors
    if not torch.cuda.is_available():
        code, _, errors = command("predict", "model", "empty", "--device", "cuda")
        assert code == 2 and "finds no CUDA device" in errors


def test_a_network_of_one_class(command: Command) -> None:
    options = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))
    mocapsnet.CapsNet(SHAPE, 1, **options).save_pretrained("one")
    save_images("images", 1)
    code, output, errors = command("predict", "one", "images", "--json", "--pictures", "out")
    assert code == 0, errors
    assert json.loads(output)[0]["runner_up"] is None
    code, output, _ = command("predict", "one", "images")
    assert code == 0 and len(output.splitlines()[1].split()) == 3
