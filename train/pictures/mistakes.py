"""The images that a network is worst at, each beside its reconstruction."""

from __future__ import annotations

from pathlib import PurePath

import torch
from matplotlib.figure import Figure

from mocapsnet import CapsNet
from mocapsnet.train import data
from mocapsnet.train.evaluation import Judged
from mocapsnet.train.pictures.pairs import pairs_figure, side_by_side

# Letters of a class's name that a caption has room for.
LETTERS = 15


def worst(judged: Judged, count: int) -> list[int]:
    """The images with the largest margin loss, the largest first; right ones may be among them."""
    return judged.margins.argsort(descending=True, stable=True)[:count].tolist()


def most_confident(judged: Judged, count: int) -> list[int]:
    """The images taken for another class with the longest capsule, the longest first."""
    wrong = (judged.labels != judged.guesses).nonzero().flatten()
    order = judged.guess_lengths[wrong].argsort(descending=True, stable=True)
    return wrong[order][:count].tolist()


def caption(images: data.ImageSet, judged: Judged, index: int) -> str:
    """ "bee (0.12)" and, if it is taken for another class, below it "predicted cat (0.93)"; above
    both the image's file, if it is one."""
    label, guess = int(judged.labels[index]), int(judged.guesses[index])
    text = f"{_short(PurePath(images.names[index]).name)}\n" if images.names else ""
    text += f"{_short(images.name(label))} ({judged.label_lengths[index]:.2f})"
    if guess != label:
        text += f"\npredicted {_short(images.name(guess))} ({judged.guess_lengths[index]:.2f})"
    return text


def _short(name: str) -> str:
    """The ends of a long name, as names of many classes often begin alike."""
    half = (LETTERS - 1) // 2
    return name if len(name) <= LETTERS else f"{name[:half]}…{name[-half:]}"


@torch.no_grad()
def mistakes_figure(
    model: CapsNet,
    images: data.ImageSet,
    judged: Judged,
    indices: list[int],
    title: str,
    columns: int = 5,
) -> Figure:
    """Some images, each beside its reconstruction from the capsule of the predicted class.

    Above each stand its class, that which it is taken for where it is another, and the lengths of
    both classes' capsules.

    Args:
        judged: what the network made of all `images`, see `evaluate`.
        indices: which of them are shown, as `worst` and `most_confident` choose; at least one.
    """
    was_training = model.training
    model.eval()
    pixels = data.to_pixels(images.images[indices])
    pairs = side_by_side(pixels, model(model.preprocessing(pixels)).reconstruction)
    model.train(was_training)
    captions = [caption(images, judged, i) for i in indices]
    wrong = (judged.labels != judged.guesses)[indices].tolist()
    return pairs_figure(pairs, captions, wrong, title, columns, inches=2.1)
