"""Test accuracy, losses and confusion matrix of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mocapsnet import CapsNet, CapsuleLoss
from mocapsnet.train import console, data
from mocapsnet.train.metrics import Row


class Judged(NamedTuple):
    """What a model made of each image, on the CPU.

    Attributes:
        labels, guesses: true and predicted class [N] int64.
        label_lengths, guess_lengths: lengths of these classes' capsules [N].
        margins: margin loss [N].
    """

    labels: Tensor
    guesses: Tensor
    label_lengths: Tensor
    guess_lengths: Tensor
    margins: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Result on a test set; the losses are means per image.

    Attributes:
        confusion: number of images [classes, classes] by true class (row) and predicted (column).
        judged: every image by itself.
    """

    loss: float
    margin: float
    reconstruction: float
    confusion: Tensor
    judged: Judged | None = None

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """True class, predicted class and number of images of the most frequent mistakes."""
        mistakes = self.confusion.clone().fill_diagonal_(0)
        numbers, where = mistakes.flatten().sort(descending=True, stable=True)
        return [
            (place // len(mistakes), place % len(mistakes), number)
            for number, place in zip(numbers[:count].tolist(), where.tolist(), strict=False)
            if number
        ]

    def by_class(self) -> dict[int, float]:
        """Accuracy on the images of each class that has any, the least first."""
        counts = self.confusion.sum(1)
        shares = {
            c: int(self.confusion[c, c]) / int(counts[c]) for c in range(len(counts)) if counts[c]
        }
        return dict(sorted(shares.items(), key=lambda item: item[1]))

    def row(self, split: str) -> Row:
        """For metrics.jsonl; `split` is "test" or "validation"."""
        return {
            f"{split}_loss": self.loss,
            f"{split}_margin": self.margin,
            f"{split}_reconstruction": self.reconstruction,
            f"{split}_accuracy": self.accuracy,
        }


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: CapsNet,
    criterion: CapsuleLoss,
    images: data.ImageSet,
    batch_size: int,
    target: str = "pixels",
    text: str = "testing",
) -> Evaluation:
    """Run the model over all images, as they are; the decoder gets the predicted class.

    Collective: each process takes its share, all get the result.

    Args:
        model: the bare model, as data parallelism would wait for processes without images.
        batch_size: images per forward pass over all processes.
        target: what the decoder is to draw, see `OptimOptions.reconstruction_target`.
    """
    was_training = model.training
    model.eval()
    device, classes = accelerator.device, model.config.classes
    # A process may get no image at all. Nothing is read from the device before the end.
    parts = [torch.zeros(3, device=device)]
    # Of each image: predicted class, lengths of the true and of this class's capsule, margin loss.
    found = torch.zeros(len(images), 4, device=device)
    with console.Progress(text, len(images), accelerator.is_main_process) as progress:
        for batch in torch.arange(len(images), device=device).split(batch_size):
            share = batch.tensor_split(accelerator.num_processes)[accelerator.process_index]
            if len(share):
                labels = images.labels[share]
                pixels = data.to_pixels(images.images[share])
                given = model.preprocessing(pixels)
                out = model(given)
                loss = criterion(out, pixels if target == "pixels" else given, labels)
                parts.append(torch.stack([loss.total, loss.margin, loss.reconstruction]).float())
                longest, guesses = out.lengths.float().max(1)
                own = out.lengths.float().gather(1, labels[:, None]).squeeze(1)
                margins = criterion.margin.each(out.lengths, labels)
                found[share] = torch.stack([guesses.float(), own, longest, margins.float()], 1)
            progress.update(len(batch))
    model.train(was_training)

    sums = torch.stack(parts).cpu().double().sum(0).to(device)
    found, sums = accelerator.reduce((found, sums), "sum")  # an image is one process's
    guesses, own, longest, margins = found.cpu().unbind(1)
    judged = Judged(images.labels.cpu(), guesses.long(), own, longest, margins)
    pairs = judged.labels * classes + judged.guesses
    counts = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    total, margin, reconstruction = (sums.cpu() / len(images)).tolist()
    return Evaluation(total, margin, reconstruction, counts, judged)
