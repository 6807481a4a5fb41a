"""The data sets with a name: embedded digits, and those that torchvision reads from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mocapsnet.train.data.image_set import ImageSet, image_set
from mocapsnet.train.errors import InputError

# Files of each data set below --data-dir, as torchvision reads them.
_MNIST_FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
FILES: dict[str, list[str]] = {
    "digits": [],
    "mnist": [f"MNIST/raw/{name}" for name in _MNIST_FILES],
    "fashion-mnist": [f"FashionMNIST/raw/{name}" for name in _MNIST_FILES],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "cifar10": [
        *(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
    ],
    "cifar100": [f"cifar-100-python/{name}" for name in ("train", "test", "meta")],
}

# (channels, height, width) of their images.
SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "svhn": (3, 32, 32),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
}

_PLACING = {
    "mnist": "Files that end in .gz must be unpacked (gunzip).",
    "fashion-mnist": "Files that end in .gz must be unpacked (gunzip); on Debian and Ubuntu the "
    "package dataset-fashion-mnist holds them.",
    "svhn": "These are the data set's cropped digits (format 2).",
    "cifar10": "They are the contents of cifar-10-python.tar.gz.",
    "cifar100": "They are the contents of cifar-100-python.tar.gz.",
}

_DIGITS = [str(digit) for digit in range(10)]


def load(name: str, data_dir: str, download: bool) -> tuple[ImageSet, ImageSet]:
    """Read a data set's training and test images onto the CPU, and check them.

    Args:
        name: one of FILES.
        data_dir: folder below which the files lie (not used for digits).
        download: fetch missing files; without it nothing is ever fetched.
    Raises: InputError that lists the missing files, or names the one that cannot be right.
    """
    if name == "digits":
        return _digits()
    root = Path(data_dir)
    missing = [file for file in FILES[name] if not (root / file).is_file()]
    if missing and not download:
        listing = "\n".join(f"  {root / file}" for file in missing)
        raise InputError(
            f"{name}: missing below --data-dir {data_dir}:\n{listing}\n"
            f"Add --download to fetch them, or place them there. {_PLACING[name]}"
        )
    read = {"mnist": _mnist, "fashion-mnist": _mnist, "svhn": _svhn}.get(name, _cifar)
    return read(name, root, download=bool(missing))


def _digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 scans of 8x8; a quarter of each class is held out, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    a, b, c, d = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    files = ("scikit-learn's digits", "scikit-learn's digits")
    return image_set(a, c, _DIGITS, files), image_set(b, d, _DIGITS, files)


def _mnist(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets as tv
    from torchvision.datasets.mnist import read_image_file, read_label_file

    reader = tv.MNIST if name == "mnist" else tv.FashionMNIST
    if download:
        _fetch(name, lambda: reader(root, download=True))
    # File by file, not by the reader: it would prefer the format of its own that it wrote before
    # 2021 to these files, and does not say which file is damaged.
    arrays = [
        _parse(root / file, read_label_file if "labels" in file else read_image_file)
        for file in FILES[name]
    ]
    classes = _DIGITS if name == "mnist" else reader.classes
    files = [root / file for file in FILES[name]]
    train, test = (
        image_set(
            arrays[i][:, None],
            arrays[i + 1],
            classes,
            (files[i], files[i + 1]),
            SHAPES[name],
        )
        for i in (0, 2)
    )
    return train, test


def _svhn(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    from torchvision.datasets import SVHN

    if download:
        _fetch(name, lambda: [SVHN(root, split=s, download=True) for s in ("train", "test")])

    def read(split: str) -> ImageSet:
        _, file, md5 = SVHN.split_list[split]
        path = root / file
        found = _parse(path, lambda _: SVHN(root, split=split), {path: md5})
        return image_set(found.data, found.labels, _DIGITS, (path, path), SHAPES[name])

    return read("train"), read("test")


def _cifar(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets as tv

    reader = tv.CIFAR10 if name == "cifar10" else tv.CIFAR100
    if download:
        _fetch(name, lambda: reader(root, download=True))
    folder = root / reader.base_folder
    meta = (reader.meta["filename"], reader.meta["md5"])
    # These files are pickles, which can run anything when they are read. The reader looks at the
    # checksums of all of them first, and opens none where one is not the published checksum.
    checksums = {folder / f: md5 for f, md5 in [*reader.train_list, *reader.test_list, meta]}

    def read(train: bool) -> ImageSet:
        path = folder / (reader.train_list if train else reader.test_list)[0][0]
        found = _parse(path, lambda _: reader(root, train=train), checksums)
        images = found.data.transpose(0, 3, 1, 2)
        return image_set(images, found.targets, found.classes, (path, path), SHAPES[name])

    return read(True), read(False)


def _fetch(name: str, download: Callable[[], Any]) -> None:
    try:
        download()
    except Exception as error:  # noqa: BLE001 - network, disk, damaged archives: anything
        raise InputError(
            f"{name}: --download failed ({type(error).__name__}: {error}). Try again, or fetch the "
            f"files yourself and place them there. {_PLACING[name]}"
        ) from error


def _parse(
    path: Path, read: Callable[[Path], Any], checksums: dict[Path, str] | None = None
) -> Any:
    """What `read(path)` returns. Raises: InputError naming the file that cannot be read.

    Args:
        checksums: of the files that `read` compares with their published md5, for the message.
    """
    try:
        return read(path)
    except MemoryError:
        raise
    except PermissionError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    except Exception as error:  # noqa: BLE001 - parsers fail on damaged files in any way
        from torchvision.datasets.utils import check_integrity

        what = f"cannot be read as what its name says ({type(error).__name__}: {error})"
        for file, md5 in (checksums or {}).items():
            if not check_integrity(file, md5):
                path, what = file, "does not have its published checksum"
                break
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise InputError(
            f"{path} {what}; it is {size}. It is incomplete or altered: delete it and run again "
            "with --download, or put a whole copy in its place"
        ) from error
