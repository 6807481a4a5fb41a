"""A folder of images as a data set: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*.

Images are decoded once, to bytes of one size, and kept in a file (see cache.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mocapsnet.train.data import cache
from mocapsnet.train.data.decode import decode
from mocapsnet.train.data.image_set import UNKNOWN, ImageSet, Known, image_set
from mocapsnet.train.errors import InputError
from mocapsnet.train.files import hidden

# What decoded images look like; another number makes every cache be built anew.
FORMAT = 1

# Of each class, held out where there is no test folder and no share is given.
TEST_SHARE = 0.2

# Broken images that a message names before it only counts.
NAMED = 10

Samples = list[tuple[str, int]]  # path and label of each image


def load(
    data_dir: str,
    *,
    image_size: int | None = None,
    test_share: float | None = None,
    split_seed: int = 0,
    broken: str = "refuse",
    quiet: bool = False,
    tested: Known = UNKNOWN,
) -> tuple[ImageSet, ImageSet]:
    """Read a folder's training and test images onto the CPU.

    Classes are the folders' names in alphabetical order. Folders and files whose names begin with a
    dot are left out. The images come in an order drawn once
    and for all, so that the first ones are of all classes. They are greyscale if all are, else
    colour; transparency is left out, and rotations that cameras note are done.

    Args:
        data_dir: holds train/CLASS/* and test/CLASS/*, or CLASS/*.
        image_size: height and width; images are resized to cover this square and cut about their
            centre (None: as they are, or 32 if their sizes differ).
        test_share: share of each class that is held out where there is no test folder (None: a
            fifth).
        split_seed: which images those are.
        broken: "refuse" images that cannot be decoded, or "skip" them with a warning.
        quiet: print nothing.
        tested: what a run that is to be tested knows. A test folder alone will do then; its images
            become of that run's shape, and stand for those of training, too.
    Raises: InputError if there are no such folders, or images, or broken ones to refuse.
    """
    root = Path(data_dir)
    classes, splits = _list(root, tested.classes)
    if test_share is not None and "all" not in splits and not tested.classes:
        raise InputError(
            f"--test-share {test_share}: {root} has a test folder of its own, so nothing is split"
        )
    samples = [sample for split in splits.values() for sample in split]
    shape = tested.image_shape if list(splits) == ["test"] else ()
    images, kept, faults = _decoded(root, [path for path, _ in samples], image_size, shape, quiet)
    _judge(root, faults, len(samples), broken, quiet)

    labels = np.array([label for _, label in samples])
    drawn = "all" in splits
    if drawn:
        parts = _split(kept.numpy(), labels, classes, test_share or TEST_SHARE, split_seed, root)
        sources = [root, root]
    else:
        boundary = len(splits.get("train", ()))
        numbers = np.arange(len(samples))
        parts = [part[np.isin(part, kept)] for part in (numbers[:boundary], numbers[boundary:])]
        parts = [np.random.default_rng(0).permutation(part) for part in parts]
        sources = [root / "train", root / "test"]
        if "train" not in splits:
            parts[0], sources[0] = parts[1], sources[1]
    for label, name in enumerate(classes if drawn or "train" in splits else ()):
        if not (labels[parts[0]] == label).any():
            raise InputError(f"{sources[0]}: no image of class {name} can be read")
    row = np.full(len(samples), -1)  # of each image in `images`
    row[kept.numpy()] = np.arange(len(kept))
    names = [Path(path).relative_to(root).as_posix() for path, _ in samples]
    train, test = (
        dataclasses.replace(
            image_set(images.numpy()[row[part]], labels[part], classes, (source, source)),
            names=tuple(names[i] for i in part),
            files=_digest(names[i] for i in (kept.tolist() if drawn else sorted(part))),
            drawn=drawn,
        )
        for part, source in zip(parts, sources, strict=True)
    )
    return train, test


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()


def _list(root: Path, tested: Sequence[str]) -> tuple[list[str], dict[str, Samples]]:
    """The classes, and the images of "train" and "test", or of "all" where that is to be split, or
    of "test" alone where the classes of what is tested are known."""
    from torchvision.datasets.folder import (
        IMG_EXTENSIONS,
        has_file_allowed_extension,
        make_dataset,
    )

    if not root.is_dir():
        raise InputError(
            f"--data-dir {root} is not a folder; --dataset folder reads images from it"
        )
    train, test = root / "train", root / "test"
    alone = bool(tested) and not train.is_dir() and test.is_dir()
    if train.is_dir() != test.is_dir() and not alone:
        there, missing = (train, test) if train.is_dir() else (test, train)
        raise InputError(
            f"{there} is there, but {missing} is not; to hold out a part of one folder, name it: "
            f"--data-dir {there} --test-share 0.2"
        )

    def images_of(folder: Path, classes: Sequence[str], some: bool = False) -> Samples:
        numbers = {name: i for i, name in enumerate(classes)}

        def is_image(path: str) -> bool:
            below = Path(path).relative_to(folder).parts[1:]  # classes of older runs may be hidden
            return not hidden(Path(*below)) and has_file_allowed_extension(path, IMG_EXTENSIONS)

        return make_dataset(folder, numbers, is_valid_file=is_image, allow_empty=some)

    try:
        if not (train.is_dir() or alone):
            classes = _classes(root)
            splits = {"all": images_of(root, classes)}
        else:
            source = "the run" if alone else train
            classes = list(tested) if alone else _classes(train)
            unknown = sorted(set(_classes(test)) - set(classes))
            if unknown:
                raise InputError(
                    f"{test} has classes that {source} has not: {', '.join(unknown[:NAMED])}"
                )
            splits = {} if alone else {"train": images_of(train, classes)}
            splits["test"] = images_of(test, classes, some=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{error} Needed: {root}/train/CLASS/*.png and {root}/test/CLASS/*.png, or "
            f"{root}/CLASS/*.png, or .jpg and the like, one folder a class"
        ) from error
    if len(classes) < 2:
        raise InputError(f"{root} has one class only, {classes[0]}; there is nothing to tell apart")
    return classes, splits


def _classes(folder: Path) -> list[str]:
    """Names of the folders in it, without hidden ones. Raises: FileNotFoundError if it has none."""
    from torchvision.datasets.folder import find_classes

    found = [name for name in find_classes(folder)[0] if not name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"Couldn't find any class folder in {folder}.")
    return found


def _decoded(
    root: Path, paths: list[str], image_size: int | None, shape: tuple[int, ...], quiet: bool
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Images [M, C, H, W], which of `paths` they are [M], and name and fault of all others."""
    how = "x".join(map(str, shape)) or str(image_size)
    key = cache.fingerprint(root, paths, f"{FORMAT} {how}")
    found = cache.read(root, key)
    if found is None or _mended(root, found[1], image_size):
        images, kept, faults = decode(paths, image_size, quiet, shape)
        names = [(str(Path(path).relative_to(root)), fault) for path, fault in faults]
        tensors = {"images": images, "kept": kept}
        written = cache.write(root, key, tensors, {"faults": json.dumps(names)})
        if not quiet:
            where = f"kept in {written}" if written else "which cannot be kept: no place to write"
            print(f"{len(kept):,} images below {root} decoded, {where}", flush=True)
        return images, kept, names
    tensors, notes = found
    return tensors["images"], tensors["kept"], _faults(notes)


def _faults(notes: dict[str, str]) -> list[tuple[str, str]]:
    """Name and fault of each image that a cache lacks."""
    return [tuple(pair) for pair in json.loads(notes["faults"])]


def _mended(root: Path, notes: dict[str, str], image_size: int | None) -> bool:
    """Whether an image that a cache lacks can be read now, though its size and time are the same:
    permissions, links and decoders change neither."""
    broken = [str(root / name) for name, _ in _faults(notes)]
    return bool(broken) and len(decode(broken, image_size, True)[1]) > 0


def _judge(root: Path, faults: list[tuple[str, str]], count: int, broken: str, quiet: bool) -> None:
    """Refuse broken images, or warn of them."""
    if not faults:
        return
    listing = "\n".join(f"  {root / name}: {fault}" for name, fault in faults[:NAMED])
    more = f"\n  and {len(faults) - NAMED:,} more" if len(faults) > NAMED else ""
    head = f"{len(faults):,} of {count:,} images cannot be read"
    if broken == "refuse":
        raise InputError(
            f"{head}:\n{listing}{more}\nRepair or remove them, or leave them out with "
            "--broken-images skip"
        )
    if not quiet:
        print(f"mocapsnet: warning: {head} and are left out:\n{listing}{more}", file=sys.stderr)


def _split(
    kept: np.ndarray, labels: np.ndarray, classes: list[str], share: float, seed: int, root: Path
) -> list[np.ndarray]:
    """Which of the images to train with and which to test with, the same share of every class."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels[kept], minlength=len(classes))
    if counts.min() < 2:
        raise InputError(
            f"{root}: class {classes[int(counts.argmin())]} has {counts.min()} image that can be "
            "read; a class that is split between training and testing needs two"
        )
    try:
        return train_test_split(kept, test_size=share, stratify=labels[kept], random_state=seed)
    except ValueError as error:  # fewer images to test with than classes, or to train with
        raise InputError(f"--test-share {share} of {len(kept):,} images: {error}") from error
