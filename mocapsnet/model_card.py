"""The model card: what a trained network is, how it came about, how to use it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import CapsNet

PICTURE = "reconstructions.png"


@dataclass(frozen=True)
class ModelCard:
    """What is known about a network's training; whatever is None is left out.

    Args:
        dataset: what it was trained on, as "mnist".
        accuracy: share of the test images it gets right, in [0, 1].
        epochs: passes over the training images.
        command: the command line that trained it.
        picture: a PNG file of reconstructions, copied beside the card.
        validation_accuracy: the same of images held out of the training set.
    """

    dataset: str | None = None
    accuracy: float | None = None
    epochs: int | None = None
    command: str | None = None
    picture: str | Path | None = None
    validation_accuracy: float | None = None

    def write(self, path: Path, model: CapsNet) -> None:
        """Write the card of `model` to `path`, and the picture beside it."""
        text = self.text(model)
        if self.picture is not None:
            picture = path.with_name(PICTURE)
            if Path(self.picture).resolve() != picture.resolve():
                shutil.copyfile(self.picture, picture)
        path.write_text(text, encoding="utf-8")

    def text(self, model: CapsNet) -> str:
        c = model.config
        name = type(model).__name__
        C, H, W = c.image_shape
        kind = "capsule network" if model.has_capsules else "convolutional network"
        parameters = sum(p.numel() for p in model.parameters())
        title = f"{name} on {self.dataset}" if self.dataset else name
        lines = [
            "---",
            *_yaml(self._metadata(title, kind)),
            "---",
            "",
            f"# {title}",
            "",
            f"A {kind} of the Python package mocapsnet for images of {C} x {H} x {W}.",
            "",
        ]
        accuracies = (self.accuracy, self.validation_accuracy)
        tested, validated = (None if a is None else f"{float(a):.2%}" for a in accuracies)
        facts = {
            "data set": self.dataset,
            "test accuracy": tested,
            "validation accuracy": validated,
            "epochs": self.epochs,
            "parameters": f"{parameters:,}",
            "blocks of two capsule layers": c.blocks if model.has_capsules else None,
            "routing": f"{c.method}, {c.iterations} iterations" if model.has_capsules else None,
            "classes": ", ".join(model.class_names[:20]) + (" ..." if c.classes > 20 else ""),
        }
        lines += ["| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
        if self.command:
            lines += ["", "Trained by", "", "```sh", self.command, "```"]
        lines += [
            "",
            "## Use",
            "",
            "```python",
            "import mocapsnet",
            "",
            'model = mocapsnet.load("FOLDER")      # the folder that holds this file',
            'found = model.predict("image.png")    # or a PIL image, an array, a tensor, or many',
            "print(found.names, found.lengths)",
            "```",
        ]
        if self.picture is not None:
            lines += ["", "## Reconstructions", "", f"![Test images, rebuilt]({PICTURE})"]
        return "\n".join(lines) + "\n"

    def _metadata(self, title: str, kind: str) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "library_name": "mocapsnet",
            "pipeline_tag": "image-classification",
            "tags": [kind.replace(" ", "-"), "mocapsnet", "image-classification"],
        }
        if self.dataset is not None and self.accuracy is not None:
            result = {
                "task": {"type": "image-classification"},
                "dataset": {"name": self.dataset, "type": self.dataset},
                "metrics": [{"type": "accuracy", "value": round(float(self.accuracy), 6)}],
            }
            metadata["model-index"] = [{"name": title, "results": [result]}]
        return metadata


def _yaml(metadata: dict[str, Any]) -> list[str]:
    """One line an entry; JSON is YAML."""
    return [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
