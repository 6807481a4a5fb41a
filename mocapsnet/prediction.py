"""What a trained network says about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import images as image_reading
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from .model import CapsNetConfig


class Predictions(NamedTuple):
    """Of B images.

    labels [B], class indices; names, those classes' names; lengths [B, classes]; capsules
    [B, classes, class_dim]; reconstruction [B, C, H, W] from the predicted capsule, or None where a
    network has no decoder; pixels [B, C, H, W], the images in [0, 1] as the network saw them before
    normalisation.
    """

    labels: Tensor
    names: list[str]
    lengths: Tensor
    capsules: Tensor
    reconstruction: Tensor | None
    pixels: Tensor


class Predictor(nn.Module):
    """A network that knows its classes' names and how its images are prepared.

    Attributes:
        preprocessing: applied by `predict`; set it to what the network was trained with.
    """

    config: CapsNetConfig
    preprocessing = Preprocessing()
    _class_names: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class; numbers until they are set."""
        return self._class_names or tuple(map(str, range(self.config.classes)))

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a sequence of strings; got {names!r}")
        if len(names) != self.config.classes:
            raise ValueError(
                f"class_names must be one for each of {self.config.classes} classes; got "
                f"{len(names)}"
            )
        self._class_names = tuple(names)

    @torch.no_grad()
    def predict(self, images: Any, *, batch_size: int = 128) -> Predictions:
        """Say which class is in each image.

        Args:
            images: one image or many, as paths, PIL images, tensors or arrays; see
                `mocapsnet.images.read`. uint8, or floating point in [0, 1]: not normalised, which
                is done here. Images of another size are scaled to cover the network's and cut
                around the centre; colour becomes grey, or grey three channels, as it wants.
            batch_size: images the network works on at a time.
        Returns: `Predictions`, on the network's device; for a single image with B = 1.
        Raises: ValueError that names the first image which cannot be used.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        weight = next(self.parameters())
        pixels = image_reading.read(images, self.config.image_shape, weight.device)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            outputs = [
                self(self.preprocessing(part).to(weight.dtype)) for part in pixels.split(batch_size)
            ]
        finally:
            self.train(modes[self])
            for module, training in modes.items():  # parts may have had another
                module.training = training
        lengths, capsules, drawn = zip(*outputs, strict=True)
        all_lengths, all_capsules = torch.cat(lengths), torch.cat(capsules)
        reconstruction = None if drawn[0] is None else torch.cat(drawn)
        labels = all_lengths.argmax(1)
        names = [self.class_names[label] for label in labels.tolist()]
        return Predictions(labels, names, all_lengths, all_capsules, reconstruction, pixels)
