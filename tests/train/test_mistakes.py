"""What is found out about every image, and which ones are shown as the worst."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from mocapsnet import CapsuleLoss, MarginLoss, MoCapsNet
from mocapsnet.train import plots
from mocapsnet.train.data import ImageSet
from mocapsnet.train.evaluation import Judged, evaluate
from mocapsnet.train.pictures import mistakes

NAMES = ("ant", "honey bee of the south", "cat")


def network() -> MoCapsNet:
    torch.manual_seed(0)
    sizes = {"channels": 16, "kernel_size": 3, "stride": 1, "capsules": 4, "decoder": (16,)}
    return MoCapsNet((1, 8, 8), 3, **sizes)


def image_set(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 3, NAMES)


def test_every_image_is_judged_by_itself() -> None:
    """In batches of which the last is a small one."""
    model, images = network(), image_set(11)
    tested = evaluate(Accelerator(cpu=True), model, CapsuleLoss(), images, batch_size=4)
    judged = tested.judged
    assert judged is not None
    model.eval()
    for i in range(11):
        lengths = model.predict(images.images[i]).lengths[0]
        label = int(images.labels[i])
        assert judged.labels[i] == label
        assert judged.guesses[i] == lengths.argmax()
        assert judged.guess_lengths[i] == pytest.approx(lengths.max().item(), rel=1e-5)
        assert judged.label_lengths[i] == pytest.approx(lengths[label].item(), rel=1e-5)
        margin = MarginLoss()(lengths[None], torch.tensor([label])).item()
        assert judged.margins[i] == pytest.approx(margin, rel=1e-5)
    assert judged.margins.mean().item() == pytest.approx(tested.margin, rel=1e-5)
    assert tested.correct == int((judged.labels == judged.guesses).sum())
    assert tested.images == 11


def test_margin_loss_of_each_sample_whatever_the_reduction() -> None:
    lengths, labels = torch.rand(5, 4), torch.tensor([0, 3, 1, 1, 2])
    each = MarginLoss().each(lengths, labels)
    assert each.shape == (5,)
    torch.testing.assert_close(MarginLoss(reduction="mean").each(lengths, labels), each)
    torch.testing.assert_close(MarginLoss()(lengths, labels), each.sum())
    torch.testing.assert_close(MarginLoss(reduction="mean")(lengths, labels), each.mean())


JUDGED = Judged(
    labels=torch.tensor([0, 1, 2, 0, 1]),
    guesses=torch.tensor([0, 0, 1, 2, 1]),
    label_lengths=torch.tensor([0.3, 0.1, 0.2, 0.5, 0.95]),
    guess_lengths=torch.tensor([0.3, 0.6, 0.8, 0.7, 0.95]),
    margins=torch.tensor([0.36, 0.9, 0.8, 0.4, 0.0]),
)


def test_the_worst_and_the_most_confident_mistakes() -> None:
    """The first image is right but unsure: bad, and no mistake."""
    assert mistakes.worst(JUDGED, 4) == [1, 2, 3, 0]
    assert mistakes.worst(JUDGED, 99) == [1, 2, 3, 0, 4]
    assert mistakes.most_confident(JUDGED, 2) == [2, 3]
    assert mistakes.most_confident(JUDGED, 99) == [2, 3, 1]


def captions(figure: Figure) -> list[tuple[str, object]]:
    return [(text.get_text(), text.get_color()) for text in figure.axes[0].texts]


def test_the_picture_names_classes_and_lengths() -> None:
    figure = plots.worst_images(network(), image_set(5), JUDGED, count=4)
    assert captions(figure) == [
        ("honey b…e south (0.10)\npredicted ant (0.60)", "tab:red"),
        ("cat (0.20)\npredicted honey b…e south (0.80)", "tab:red"),
        ("ant (0.50)\npredicted cat (0.70)", "tab:red"),
        ("ant (0.30)", "black"),
    ]
    files = replace(image_set(5), names=tuple(f"bee/{n}.png" for n in range(5)))
    (_, (first, red), _, (last, black)) = captions(
        plots.worst_images(network(), files, JUDGED, count=4)
    )
    assert first.count("\n") == 2 and first.endswith(
        ".png\ncat (0.20)\npredicted honey b…e south (0.80)"
    )
    assert last.endswith(".png\nant (0.30)") and (red, black) == ("tab:red", "black")
    title = figure.axes[0].get_title()
    assert title.startswith("Of 5 test images the 4 with the largest margin loss (3 mistakes)")


def test_the_picture_shows_the_images_it_names() -> None:
    images = image_set(5)
    figure = plots.worst_images(network(), images, JUDGED, count=1)
    sheet = figure.axes[0].images[0].get_array().squeeze()
    shown = torch.as_tensor(sheet[-8:, :8].filled())
    torch.testing.assert_close(shown, images.images[1, 0] / 255)
