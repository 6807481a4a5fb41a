"""What the page asks of a network, and what it shows of the answers; knows nothing of Gradio."""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mocapsnet import CapsNet, LayerRecord, inspect_layers
from mocapsnet.train.pictures.couplings import coupling_figure

BARS = 12
"""With more classes than this only the longest class capsules are listed."""


@dataclass(frozen=True)
class Seen:
    """What a network makes of one image.

    Attributes:
        pixels: what the network was shown [C, H, W], in [0, 1].
        lengths: of the class capsules [classes].
        capsules: the class capsules [classes, class_dim].
        layers: inputs, outputs and couplings of every capsule layer, for a batch of one.
    """

    pixels: Tensor
    lengths: Tensor
    capsules: Tensor
    layers: dict[str, LayerRecord]


class Explorer:
    """Answers the page's questions about one trained network."""

    def __init__(self, network: CapsNet):
        self.network = network.eval()
        self.classes = network.class_names
        self._one_at_a_time = threading.Lock()  # hooks on the network note what passes

    def look(self, image: Image.Image | Tensor) -> Seen:
        """An image of any size, or uint8 [C, H, W]."""
        with self._one_at_a_time:
            p = self.network.predict(image)
            layers = inspect_layers(self.network, self.network.preprocessing(p.pixels))
        return Seen(p.pixels[0], p.lengths[0], p.capsules[0], layers)

    @torch.no_grad()
    def reconstruct(self, seen: Seen, label: int, moves: Sequence[float] = ()) -> Tensor:
        """Pixels [C, H, W] decoded from one class capsule, its first dimensions moved."""
        capsules = torch.zeros_like(seen.capsules)
        capsules[label] = seen.capsules[label]
        capsules[label, : len(moves)] += torch.tensor(moves, dtype=capsules.dtype)
        return self.network.decoder(capsules.unsqueeze(0))[0]

    def couplings(self, seen: Seen, layer: str, iteration: int) -> Figure:
        return coupling_figure(
            self.network, layer, seen.layers[layer].couplings[:, 0], iteration, self.classes
        )

    def answer(self, seen: Seen) -> str:
        """HTML: the lengths of the class capsules as bars, the longest class named above them."""
        lengths = seen.lengths.tolist()
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        best, many = by_length[0], len(lengths) > BARS
        listed = by_length[:BARS] if many else range(len(lengths))
        rows = "".join(
            f'<div class="bar{" best" if i == best else ""}"><span>{html.escape(name)}</span>'
            f'<b><i style="width:{100 * length:.1f}%"></i></b><span>{length:.2f}</span></div>'
            for i in listed
            for name, length in [(self.classes[i], lengths[i])]
        )
        if many:
            count, longest = len(lengths) - BARS, lengths[by_length[BARS]]
            rows += f"<p>The capsules of the other {count} classes are shorter than "
            rows += f"{max(longest, 0.005):.2f}.</p>"
        sure = "The network sees" if lengths[best] >= 0.5 else "Nothing for sure; most likely"
        return f'<p class="verdict">{sure}: <b>{html.escape(self.classes[best])}</b></p>{rows}'


def from_sketch(picture: Image.Image, shape: tuple[int, int, int]) -> Image.Image | None:
    """What was drawn; None if nothing.

    For a network of grey images it is bright on black, cut out and centred as MNIST's digits are;
    for one of colour images, as it was drawn.

    Args:
        picture: drawn on nothing, RGBA.
        shape: (channels, height, width) of the network's images.
    """
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    ink = 255 - np.asarray(flat.convert("L"))
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        return None
    channels, height, width = shape
    if channels == 3:
        return flat.convert("RGB")
    cut = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    # MNIST leaves 4 of its 28 pixels free on each side; the scans of 8x8 none.
    free = round(4 / 28 * min(height, width)) if min(height, width) >= 28 else 0
    ratio = min((height - 2 * free) / cut.height, (width - 2 * free) / cut.width)
    size = max(1, round(cut.width * ratio)), max(1, round(cut.height * ratio))
    small = np.asarray(cut.resize(size, Image.Resampling.BOX), dtype=np.float64)
    weight = max(small.sum(), 1)
    centre_y = (small.sum(1) * np.arange(len(small))).sum() / weight
    centre_x = (small.sum(0) * np.arange(small.shape[1])).sum() / weight
    top = min(max(round((height - 1) / 2 - centre_y), 0), height - len(small))
    left = min(max(round((width - 1) / 2 - centre_x), 0), width - small.shape[1])
    page = np.zeros((height, width), dtype=np.uint8)
    page[top : top + len(small), left : left + small.shape[1]] = small.round().astype(np.uint8)
    return Image.fromarray(page)


def image_tag(pixels: Tensor, caption: str) -> str:
    """HTML of pixels [C, H, W] in [0, 1], held in the page itself so that no file is written."""
    array = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
