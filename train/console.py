"""What a training run prints; only the main process calls these."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from mocapsnet.train.metrics import Row
from mocapsnet.train.options import TrainOptions


def describe(
    options: TrainOptions,
    model: nn.Module,
    train_images: int,
    test_images: int,
    accelerator: Accelerator,
    run: Path,
    epochs_done: int,
) -> None:
    """Print what is trained, on what, and where it goes."""
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{options.model.name}, {options.model.blocks} block(s), {parameters:,} parameters; "
        f"{options.data.dataset}, {train_images:,} training and {test_images:,} test images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}\n"
        + (f"continuing {run} after epoch {epochs_done}" if epochs_done else f"writing to {run}"),
        flush=True,
    )


def summary(row: Row, epochs: int) -> str:
    """One line about one epoch."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:7.2%}  "
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:7.2%}  "
        f"{row['train_images_per_second']:,.0f} images/s"
    )


def list_folder(run: Path) -> None:
    """Print what a finished run wrote."""
    print(f"{run} holds:")
    meaning = {
        "config.json": "options, versions, command lines",
        "metrics.jsonl": "the numbers of each epoch",
        "tensorboard": "the same, for TensorBoard",
        "model": "the trained network, for mocapsnet.load and mocapsnet predict",
        "checkpoints": "the state after the last epoch",
        "learning_curves.png": "loss and accuracy over the epochs",
        "reconstructions.png": "test images beside their reconstructions",
        "confusion_matrix.png": "true against predicted classes",
    }
    for name, text in meaning.items():
        if (run / name).exists():
            print(f"  {name:<22}{text}")
