"""A part of the training images is held out, to choose by it when to stop and what to keep."""

from __future__ import annotations

import numpy as np
import torch

from mocapsnet.train.data.image_set import ImageSet
from mocapsnet.train.errors import InputError


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into those to train with and those to validate with, in their order.

    Args:
        share: of every class, that is held out.
        seed: which images those are; the same images, share and seed give the same split.
    Raises: InputError if a class would be missing on one side.
    """
    from sklearn.model_selection import train_test_split

    labels = images.labels.cpu().numpy()
    said = f"--validation-share {share} of {len(images):,} training images"
    counts = np.bincount(labels)
    if (counts == 1).any():
        raise InputError(
            f"{said}: class {images.name(int((counts == 1).argmax()))} has one of them; a class "
            "that is split between training and validation needs two"
        )
    try:
        parts = train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed
        )
    except ValueError as error:  # fewer images on one side than classes, or an unusable seed
        raise InputError(f"{said}: {error}") from error
    train, validation = (images.take(torch.from_numpy(np.sort(part))) for part in parts)
    return train, validation
