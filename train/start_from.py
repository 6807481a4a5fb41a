"""`--start-from FOLDER`: a training that begins with the weights of a trained network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mocapsnet
from mocapsnet import CapsNet
from mocapsnet.train import model_folder, run_folder
from mocapsnet.train.data import ImageSet
from mocapsnet.train.data.folder import TEST_SHARE
from mocapsnet.train.errors import InputError
from mocapsnet.train.option_values import flag
from mocapsnet.train.options import TrainOptions

# Parts that are drawn anew where they do not fit, or the classes are others: what belongs to these,
# and the decoder, which is given all of their capsules.
NAMES = {"last": "the class capsules", "decoder": "the decoder", "dense": "the layers behind"}


def take_weights(model: CapsNet, folder: str) -> str:
    """Give a network the weights of another.

    Args:
        model: changed in place.
        folder: a run, or a folder that `save_pretrained` wrote. Its network must be of the same
            kind and sizes, but for the classes and the decoder.
    Returns: one line that says what is not from there, and in which options that network differed.
    Raises: InputError if the folder holds no network, or one whose weights do not fit; the model is
        as it was then.
    """
    try:
        other = mocapsnet.load(folder)
    except ValueError as error:
        raise InputError(f"--start-from {error}") from error
    if type(other) is not type(model):
        raise InputError(
            f"--start-from {folder} holds a {type(other).__name__}, not a {type(model).__name__}"
        )
    differ = _differences(model, other)
    ours, theirs = model.state_dict(), other.state_dict()
    unlike = [n for n, w in ours.items() if n not in theirs or theirs[n].shape != w.shape]
    unlike += [name for name in theirs if name not in ours]
    for name in unlike:
        if name.partition(".")[0] not in NAMES:
            raise InputError(
                f"--start-from {folder}: its {name} does not fit this network: {differ}"
            )
    if model.preprocessing != other.preprocessing:
        raise InputError(
            f"--start-from {folder}: its images were normalised otherwise, by "
            f"{other.preprocessing}; give the same --normalisation, --pixel-mean and --pixel-std"
        )
    parts = {name.partition(".")[0] for name in unlike}
    if tuple(model.class_names) != tuple(other.class_names):  # though they may be as many
        parts |= {part for name in ours if (part := name.partition(".")[0]) in NAMES}
    taken = {n: w for n, w in theirs.items() if n in ours and n.partition(".")[0] not in parts}
    model.load_state_dict(taken, strict=False)
    told = f"starting with the weights of {folder}"
    if parts:
        told += f", but for {' and '.join(NAMES[part] for part in NAMES if part in parts)}"
    return f"{told} ({differ})" if differ else told


def seen_before(options: TrainOptions, images: ImageSet, test_images: ImageSet) -> Iterator[str]:
    """Warnings where a training will be judged by images that its first weights were trained on.

    Args:
        images: of training, and of validation where some of them are held out.
    """
    assert options.start_from is not None
    run = Path(options.start_from)
    run = run.parent if run.name == model_folder.FOLDER else run
    try:
        then = run_folder.read_config(run)
    except (InputError, OSError):  # a network alone, which does not say
        return
    source, before = options.data, then.data
    if source.dataset != before.dataset:
        return
    if source.dataset == "folder" and not _same(source.data_dir, before.data_dir):
        return
    advice = "so {} accuracies will be too high; {}"
    if test_images.drawn and not (
        source.split_seed == before.split_seed
        and (source.test_share or TEST_SHARE) == (before.test_share or TEST_SHARE)
        and run_folder.same_files(run, "test", test_images)
    ):
        yield (
            f"{run} was trained on some of what are test images now, "
            + advice.format(
                "test",
                "give it the files, --test-share and --split-seed of that run, "
                "or test with others, in DIR/test/CLASS",
            )
        )
    share, share_before = options.watch.validation_share, then.watch.validation_share
    if share is not None and not (
        share == share_before
        and source.split_seed == before.split_seed
        and source.limit == before.limit
        and run_folder.same_files(run, "training", images)
    ):
        yield (
            f"{run} was trained on some of what are validation images now, "
            + advice.format(
                "validation",
                "give it the --validation-share, --split-seed and "
                "--limit of that run, if it had any",
            )
        )


def _same(folder: str, other: str) -> bool:
    return Path(folder).resolve() == Path(other).resolve()


def _differences(model: CapsNet, other: CapsNet) -> str:
    """In which options two networks differ."""
    found = []
    for field in dataclasses.fields(model.config):
        here, there = getattr(model.config, field.name), getattr(other.config, field.name)
        if here != there and field.name != "routing_backend":
            words = {"image_shape": "images of", "classes": "classes:"}
            option = words.get(field.name, flag(field.name))
            found.append(f"{option} {_shown(there)} there, {_shown(here)} here")
    return "; ".join(found)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)
