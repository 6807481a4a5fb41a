"""RUN/model: the trained network in the form that `mocapsnet.load` reads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mocapsnet import CapsNet, ModelCard
from mocapsnet.train import checkpoints
from mocapsnet.train.options import TrainOptions

FOLDER = "model"


def holds(run: Path, checkpoint: Path) -> bool:
    """Whether RUN/model is the network of a checkpoint of the run."""
    try:
        model, kept = (load_file(f / checkpoints.WEIGHTS) for f in (run / FOLDER, checkpoint))
    except (OSError, SafetensorError):
        return False
    return model.keys() == kept.keys() and all(torch.equal(model[n], kept[n]) for n in kept)


def write(
    run: Path,
    model: CapsNet,
    options: TrainOptions,
    epochs_done: int,
    test_accuracy: float | None,
    validation_accuracy: float | None = None,
) -> Path:
    """Write the network as it is after `epochs_done` epochs; returns RUN/model.

    Its card shows the run's reconstructions, once they are drawn, and the first of its commands.
    """
    picture = run / "reconstructions.png"
    command = json.loads((run / "config.json").read_text())["commands"][0]
    card = ModelCard(
        dataset=options.data.dataset,
        accuracy=test_accuracy,
        validation_accuracy=validation_accuracy,
        epochs=epochs_done,
        command=shlex.join(["mocapsnet", *command[1:]]),
        picture=picture if picture.exists() else None,
    )
    return model.save_pretrained(run / FOLDER, card)
