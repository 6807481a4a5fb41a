"""The pictures of what goes on inside a network, for `mocapsnet visualize`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mocapsnet import CapsNet, ConvMoCapsNet, images
from mocapsnet.train.bundles import Bundles
from mocapsnet.train.data import ImageSet, to_pixels
from mocapsnet.train.errors import InputError
from mocapsnet.train.evaluation import Judged
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.pictures import bundles, dimensions, layers, routes
from mocapsnet.train.pictures.mistakes import mistakes_figure, most_confident
from mocapsnet.train.pictures.sheet import save

MISTAKES = 25
"""Mistakes that are drawn, at most."""


def chosen_image(image: str, test_set: ImageSet) -> tuple[Tensor, int | None]:
    """Pixels [C, H, W] of a test image, counted from 0, or of a file; and its class if known.

    Raises: InputError if there is no such image, or it cannot be read.
    """
    if not image.isdecimal() or Path(image).exists():
        try:
            return images.read(image, test_set.image_shape, test_set.images.device)[0], None
        except ValueError as error:
            raise InputError(f"--image {error}") from error
    number = int(image)
    if number >= len(test_set):
        raise InputError(
            f"--image {image}: there are {len(test_set):,} test images, 0 to "
            f"{len(test_set) - 1}; give one of these numbers, or an image file"
        )
    return to_pixels(test_set.images[number, None])[0], int(test_set.labels[number])


@torch.no_grad()
def write(
    run: Path,
    network: CapsNet,
    test_set: ImageSet,
    options: TrainOptions,
    chosen: tuple[Tensor, int | None],
    judged: Judged,
) -> Iterator[str]:
    """Write the pictures into the run; yields the path of each, or why one is left out.

    Args:
        chosen: the image whose couplings are drawn, see `chosen_image`.
        judged: what the network makes of all test images, see `evaluate`.
    """
    network.eval()
    yield _mistakes(run, network, test_set, judged)
    if not network.has_capsules:
        yield f"no pictures of capsules: {options.model.name} has none"
        return
    if network.decoder is None:
        yield "no dimensions.png: the network has no decoder to draw what they do"
    elif options.optim.reconstruction_weight == 0:
        yield "no dimensions.png: with --reconstruction-weight 0 the decoder did not learn to draw"
    else:
        pages = dimensions.pages(network, test_set)
        for n, page in enumerate(pages, start=1):
            number = f"-{n:0{len(str(len(pages)))}d}" if len(pages) > 1 else ""
            yield str(save(dimensions.figure(network, page), run / f"dimensions{number}.png"))
    if isinstance(network, ConvMoCapsNet):
        yield "no places.png, couplings.png and layers.png: they show layers without a grid"
        return
    seen = routes.route(network, *chosen)
    yield str(save(routes.places_figure(network, seen), run / "places.png"))
    yield str(save(routes.tables_figure(network, seen), run / "couplings.png"))
    measured = layers.measure(network, test_set)
    yield str(save(layers.figure(network, measured), run / "layers.png"))


def _mistakes(run: Path, network: CapsNet, test_set: ImageSet, judged: Judged) -> str:
    shown = most_confident(judged, MISTAKES)
    if not shown:
        (run / "mistakes.png").unlink(missing_ok=True)  # of an earlier checkpoint
        return f"no mistakes.png: all {len(test_set):,} test images are taken for what they are"
    wrong = int((judged.guesses != judged.labels).sum())
    title = (
        f"The mistakes that the network is surest of: {len(shown)} of {wrong:,}, on "
        f"{len(test_set):,} test images\n"
    )
    if network.decoder is not None:
        title += "each beside what the network draws of the class that it takes it for; "
    title += "in brackets: "
    title += "lengths of the capsules" if network.has_capsules else "probabilities"
    figure = mistakes_figure(network, test_set, judged, shown, title)
    return str(save(figure, run / "mistakes.png"))


def write_bundles(run: Path, network: CapsNet, measured: list[Bundles]) -> Iterator[str]:
    """The picture of conflicting bundles; and, of a run that did not record them, why so little."""
    yield str(save(bundles.figure(network, measured), run / "bundles.png"))
    if len(measured) == 1:
        yield (
            f"bundles.png shows epoch {measured[0].epoch} alone, as a run keeps its last "
            "checkpoint: `mocapsnet train --bundles` measures every epoch"
        )
