"""Readers against tiny raw files, transforms against plain loops over images."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets as tv

from mocapsnet.train import data
from mocapsnet.train.data import builtin
from mocapsnet.train.errors import InputError

RNG = np.random.default_rng(0)
SIZES = {"train": 10, "test": 5}


def random_images(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST's format: big-endian sizes, then bytes."""
    folder.mkdir(parents=True)
    written = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        n = SIZES[split]
        images, labels = random_images(n, 28, 28), RNG.integers(0, 10, n).astype(np.uint8)
        header = struct.pack(">iiii", 0x803, n, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">ii", 0x801, n)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        written[split] = (images[:, None], labels)
    return written


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """MATLAB files with images [H, W, C, N] and labels 1..10, 10 being the digit 0."""
    from scipy.io import savemat

    written, splits = {}, {}
    for split, n in SIZES.items():
        images = random_images(n, 3, 32, 32)
        labels = np.arange(n) % 10
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        splits[split] = ["", path.name, md5(path)]
        written[split] = (images, labels)
    monkeypatch.setattr(tv.SVHN, "split_list", splits)
    return written


def write_cifar(reader: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Pickles with rows of 3 x 32 x 32 bytes."""
    key = "fine_labels" if reader is tv.CIFAR100 else "labels"
    names = [f"class {i}" for i in range(100 if reader is tv.CIFAR100 else 10)]
    folder = root / reader.base_folder
    folder.mkdir()
    written = {}
    for split, listed in (("train", "train_list"), ("test", "test_list")):
        files, parts = [], []
        for name, _ in getattr(reader, listed):
            n = SIZES[split] // len(getattr(reader, listed))
            images, labels = random_images(n, 3, 32, 32), RNG.integers(0, 10, n).tolist()
            content = {"data": images.reshape(n, -1), key: labels}
            (folder / name).write_bytes(pickle.dumps(content))
            files.append([name, md5(folder / name)])
            parts.append((images, labels))
        written[split] = tuple(np.concatenate(p) for p in zip(*parts, strict=True))
        monkeypatch.setattr(reader, listed, files)
    meta = dict(reader.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
    monkeypatch.setattr(reader, "meta", meta | {"md5": md5(folder / meta["filename"])})
    return written


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"])
def test_readers_give_the_bytes_of_the_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "svhn":
        written = write_svhn(tmp_path, monkeypatch)
    elif name.startswith("cifar"):
        reader = tv.CIFAR100 if name == "cifar100" else tv.CIFAR10
        written = write_cifar(reader, tmp_path, monkeypatch)
    else:
        folder = "MNIST" if name == "mnist" else "FashionMNIST"
        written = write_idx(tmp_path / folder / "raw")
    for split, images in zip(
        ("train", "test"), builtin.load(name, str(tmp_path), False), strict=True
    ):
        expected, labels = written[split]
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.images.is_contiguous()
        assert images.image_shape == data.SHAPES[name]
        assert len(images.classes) == (100 if name == "cifar100" else 10)
        np.testing.assert_array_equal(images.images.numpy(), expected)
        np.testing.assert_array_equal(images.labels.numpy(), labels)


@pytest.mark.parametrize("name", [name for name in data.FILES if data.FILES[name]])
def test_missing_files_are_listed_and_not_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tried to download")

    for reader in (tv.MNIST, tv.SVHN, tv.CIFAR10):
        monkeypatch.setattr(reader, "download", fail)
    present = tmp_path / data.FILES[name][0]
    present.parent.mkdir(parents=True, exist_ok=True)
    present.touch()
    with pytest.raises(InputError, match="--download") as error:
        builtin.load(name, str(tmp_path), download=False)
    for file in data.FILES[name][1:]:
        assert str(tmp_path / file) in str(error.value)
    assert str(present) + "\n" not in str(error.value)


def test_files_listed_as_expected_are_those_torchvision_looks_for() -> None:
    for name, reader in (("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)):
        listed = [file for file, _ in reader.train_list + reader.test_list]
        listed.append(reader.meta["filename"])
        assert data.FILES[name] == [f"{reader.base_folder}/{file}" for file in listed]
    for name, reader in (("mnist", tv.MNIST), ("fashion-mnist", tv.FashionMNIST)):
        listed = {Path(file).stem for file, _ in reader.resources}
        assert data.FILES[name] == [f"{reader.__name__}/raw/{f}" for f in builtin._MNIST_FILES]
        assert listed == set(builtin._MNIST_FILES)
    assert set(data.FILES["svhn"]) == {tv.SVHN.split_list[s][1] for s in ("train", "test")}


def test_download_is_done_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(reader: tv.MNIST) -> None:
        if not Path(reader.raw_folder).exists():
            write_idx(Path(reader.raw_folder))

    monkeypatch.setattr(tv.MNIST, "download", fetch)
    train, test = builtin.load("mnist", str(tmp_path), download=True)
    assert (len(train), len(test)) == (SIZES["train"], SIZES["test"])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(*shape: int, kind: int = 8) -> bytes:
    """An idx file of zeros; kind 8 is bytes, 13 float32."""
    header = struct.pack(f">{1 + len(shape)}i", kind * 256 + len(shape), *shape)
    return header + bytes(int(np.prod(shape)) * (4 if kind == 13 else 1))


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (IMAGES, idx(10, 28, 28)[:-1], "cannot be read as what its name says"),
        (IMAGES, idx(10, 28, 28) + b"0", "cannot be read as what its name says"),
        (IMAGES, b"", "it is 0 bytes"),
        (IMAGES, idx(0, 28, 28), "it is 16 bytes"),  # no images
        (IMAGES, idx(10, 28, 28)[:9], "delete it and run again with --download"),
        (IMAGES, b"\x1f\x8b" + bytes(100), "incomplete or altered"),  # still packed
        (IMAGES, idx(10, 28, 28, kind=13), "cannot be read as what its name says"),
        (IMAGES, idx(10, 28, 27), "images are 1 x 28 x 27, but must be 1 x 28 x 28 (C x H x W)"),
        (IMAGES, idx(9, 28, 28), f"holds 9 images, but {{folder}}/{LABELS} holds 10 labels"),
        (LABELS, idx(10)[:-1], "cannot be read as what its name says"),
        (LABELS, idx(11), f"{{folder}}/{IMAGES} holds 10 images, but"),
        (LABELS, idx(11)[:-1], "incomplete or altered"),
        (
            LABELS,
            idx(10)[:-3] + b"\x0a\x00\xff",
            "label 10 of image 7 (counted from 0) is outside 0..9",
        ),
    ],
)
def test_damaged_idx_files_are_named(
    file: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        builtin.load("mnist", str(tmp_path), download=False)
    message = str(error.value)
    assert f"{folder / file}" in message and expected.format(folder=folder) in message
    assert "\n" not in message


class Malicious:
    """A pickle that leaves a file behind when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["svhn", "cifar10", "cifar100"])
@pytest.mark.parametrize("damage", ["truncated", "malicious"])
def test_files_with_another_checksum_are_named_and_not_read(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "svhn":
        write_svhn(tmp_path, monkeypatch)
    else:
        write_cifar(tv.CIFAR100 if name == "cifar100" else tv.CIFAR10, tmp_path, monkeypatch)
    for file in data.FILES[name]:
        path = tmp_path / file
        good = path.read_bytes()
        path.write_bytes(good[:-1] if damage == "truncated" else pickle.dumps(Malicious()))
        with pytest.raises(InputError, match="does not have its published checksum") as error:
            builtin.load(name, str(tmp_path), download=False)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(good)
    assert not Path("executed").exists()
    builtin.load(name, str(tmp_path), download=False)


def test_nothing_but_the_files_listed_is_read(tmp_path: Path) -> None:
    """torchvision prefers, where it is there, what its versions before 2021 wrote."""
    written = write_idx(tmp_path / "MNIST" / "raw")
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), processed / name)
    train, _ = builtin.load("mnist", str(tmp_path), download=False)
    np.testing.assert_array_equal(train.images.numpy(), written["train"][0])


def test_failed_download_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr(tv.MNIST, "download", fail)
    with pytest.raises(InputError, match=r"--download failed \(EOFError: Compressed"):
        builtin.load("mnist", str(tmp_path), download=True)


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), [0, 1], "a: pixels are float32"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], "a: images are 4 x 4, but must be [N, C, H, W]"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0.0, 1.0], "b: labels are float64 of shape [2]"),
        (np.zeros((2, 1, 4, 4), np.uint8), [[0], [1]], "b: labels are int64 of shape [2, 1]"),
        (np.zeros((0, 1, 4, 4), np.uint8), np.zeros(0, int), "a holds no images"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, -1], "b: label -1 of image 1"),
        (
            np.zeros((2, 1, 4, 4), np.uint8),
            [3, 0],
            "label 3 of image 0 (counted from 0) is outside 0..2",
        ),
    ],
)
def test_what_no_reader_may_give(images: Any, labels: Any, expected: str) -> None:
    with pytest.raises(InputError) as error:
        data.image_set(images, labels, "xyz", ("a", "b"))
    assert expected in str(error.value)


def test_digits_split() -> None:
    from sklearn.datasets import load_digits

    train, test = builtin.load("digits", "", False)
    assert (len(train), len(test)) == (1347, 450)
    assert train.image_shape == data.SHAPES["digits"]
    assert train.classes == test.classes == tuple("0123456789")
    # 0..16 becomes 0..255, exactly invertible.
    restored = torch.cat([train.images, test.images]).double().mul(16 / 255).round().flatten(1)
    original = torch.from_numpy(load_digits().data)
    assert sorted(restored.tolist()) == sorted(original.tolist())
    # Stratified: each class has a quarter of its images held out, to the nearest image.
    held_out = torch.bincount(test.labels).double()
    every = held_out + torch.bincount(train.labels)
    assert (held_out - every / 4).abs().max() < 1


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4)], ids=["grey oblong", "colour"])
def test_random_crop_against_one_image_at_a_time(pad: int, shape: tuple[int, ...]) -> None:
    offsets = torch.cartesian_prod(torch.arange(2 * pad + 1), torch.arange(2 * pad + 1))
    images = torch.from_numpy(random_images(len(offsets), *shape))
    crops = data.random_crop(images, offsets, pad)
    assert crops.dtype == torch.uint8
    C, H, W = shape
    for image, (row, column), crop in zip(images, offsets.tolist(), crops, strict=True):
        padded = torch.zeros(C, H + 2 * pad, W + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + H, pad : pad + W] = image
        assert torch.equal(crop, padded[:, row : row + H, column : column + W])
    centre = torch.full_like(offsets, pad)
    assert torch.equal(data.random_crop(images, centre, pad), images)


def test_normalise_against_one_image_at_a_time() -> None:
    images = torch.from_numpy(random_images(4, 3, 8, 8))
    images[1] = 127
    images[2] = 200
    images[2, 0, 0, 0] = 201  # the least variance an image can have without being constant
    images[3] = images[3] // 64  # dark, low contrast
    pixels = data.to_pixels(images)
    assert pixels.min() >= 0 and pixels.max() <= 1
    normalised = data.normalise(pixels)
    # A pixel or a mean is off by at most 2^-24 (float32, values below 1), which dividing by the
    # std enlarges; four such roundings meet in one result.
    for image, result in zip(images.double() / 255, normalised, strict=True):
        std = image.std(correction=0).item()
        if std == 0:
            assert result.abs().max() < 1e-2  # 2^-24 over the floor of 1.4e-4 is 4e-4
            continue
        truth = (image - image.mean()) / std
        tolerance = 4 * 2**-24 * (1 + truth.abs().max().item()) / std
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=tolerance)


def test_epoch_order() -> None:
    order, offsets = data.epoch_order(1000, 2, seed=0, epoch=0)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert offsets.unique().tolist() == [0, 1, 2, 3, 4]
    again = data.epoch_order(1000, 2, seed=0, epoch=0)
    assert torch.equal(order, again[0]) and torch.equal(offsets, again[1])
    for seed, epoch in ((0, 1), (1, 0)):  # (1, 0) and (0, 1) also differ from each other
        other, _ = data.epoch_order(1000, 2, seed, epoch)
        assert not torch.equal(order, other)
    assert not torch.equal(data.epoch_order(1000, 2, 0, 1)[0], data.epoch_order(1000, 2, 1, 0)[0])
