"""Draws the pictures of docs/inside.md: python docs/figures/inside.py RUN CONFLICTS

RUN is an MNIST run, of which `mocapsnet visualize RUN --image 15` has drawn everything; of the
grid of dimensions three classes are drawn again, as all of them make a large file. CONFLICTS is a
run of which `mocapsnet visualize CONFLICTS --bundles` has drawn bundles.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import mocapsnet
from mocapsnet.train import data
from mocapsnet.train.pictures import dimensions
from mocapsnet.train.pictures.sheet import save
from mocapsnet.train.run_folder import read_config

CLASSES = (1, 4, 5)
FOLDER = Path(__file__).resolve().parents[1] / "inside"


def small(source: Path) -> None:
    """Copy a picture with 128 colours, which makes it a third as large."""
    picture = Image.open(source).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(FOLDER / source.name, optimize=True)


def main(run: Path, conflicts: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    network = mocapsnet.load(run).eval()
    _, test_set = data.load(read_config(run).data, quiet=True)
    found = dimensions.examples(network, test_set)
    figure = dimensions.figure(network, [found[n] for n in CLASSES])
    small(save(figure, run / "dimensions.png"))
    for name in ("mistakes", "places", "couplings", "layers"):
        small(run / f"{name}.png")
    small(conflicts / "bundles.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
