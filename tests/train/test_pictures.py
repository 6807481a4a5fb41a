"""Pictures and reports say what classes are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from mocapsnet import CapsNet, MoCapsNet, Preprocessing, ResCapsNet, inspect_layers
from mocapsnet.train import plots
from mocapsnet.train.data import ImageSet
from mocapsnet.train.evaluation import Evaluation
from mocapsnet.train.pictures.couplings import layer_titles


class Fixed(nn.Module):
    """A network that takes every image for the same class."""

    preprocessing = Preprocessing()

    def __init__(self, classes: int, guess: int) -> None:
        super().__init__()
        self.lengths = nn.functional.one_hot(torch.tensor(guess), classes).float()

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        lengths = self.lengths.expand(len(images), -1)
        return SimpleNamespace(lengths=lengths, reconstruction=images.clamp(0, 1))


def written(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    (axes, *_) = figure.axes
    ticks = [tick.get_text() for tick in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    return [*ticks, *(text.get_text() for text in axes.texts)]


@pytest.mark.parametrize(
    ("classes", "mistake"),
    [
        (("ant", "bee", "cat"), "bee, predicted cat"),
        (("T-shirt/top", "Ankle boot", "$5, $6"), "Ankle boot,\npredicted $5, $6"),
        ((), "1, predicted 2"),
    ],
)
def test_reconstructions_under_names(classes: tuple[str, ...], mistake: str) -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    test_set = ImageSet(images, torch.tensor([0, 1, 2]), classes)
    texts = written(plots.reconstructions(Fixed(3, 2), test_set))
    assert mistake in texts and test_set.name(2) in texts


@pytest.mark.parametrize("count", [3, 30])  # with and without numbers in the cells
def test_confusion_matrix_names_its_rows_and_columns(count: int) -> None:
    tested = Evaluation(0.0, 0.0, 0.0, torch.eye(count, dtype=torch.int64) * 7)
    names = [f"class {i}" for i in range(count)]
    texts = written(plots.confusion_matrix(tested, names))
    for name in names:
        assert texts.count(name) == 2
    assert texts.count("7") == (count if count < 20 else 0)


def test_confusion_matrix_of_more_classes_than_can_be_read() -> None:
    tested = Evaluation(0.0, 0.0, 0.0, torch.eye(300, dtype=torch.int64))
    assert written(plots.confusion_matrix(tested, [str(i) for i in range(300)])) == []


def test_most_confused() -> None:
    confusion = torch.tensor([[9, 0, 3], [5, 8, 0], [3, 0, 7]])
    tested = Evaluation(0.0, 0.0, 0.0, confusion)
    assert tested.most_confused(2) == [(1, 0, 5), (0, 2, 3)]
    assert tested.most_confused(9) == [(1, 0, 5), (0, 2, 3), (2, 0, 3)]
    assert confusion[0, 0] == 9, "left as it was"


@pytest.mark.parametrize("network", [CapsNet, ResCapsNet, MoCapsNet])
@pytest.mark.parametrize("skip", ["once", "twice"])
def test_layers_have_titles(network: type[CapsNet], skip: str) -> None:
    model = network(
        (1, 8, 8), 3, blocks=2, channels=8, capsules=2, kernel_size=3, skip=skip, velocity="block"
    )
    titles = layer_titles(model)
    assert list(titles) == list(inspect_layers(model, torch.rand(1, 1, 8, 8)))
    assert list(titles.values())[1:-1] == [f"hidden layer {n} of 4" for n in (1, 2, 3, 4)]
