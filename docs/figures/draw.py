"""Draws the site's figures: python docs/figures/draw.py

Votes and couplings are computed by the reference implementation, sizes and times read from the
measured results; nothing is sketched by hand.
"""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from svg import Drawing

from mocapsnet.kernels.routing.reference import rounds

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parents[1] / "benchmarks/results/cpu-2core"


def capsule() -> Drawing:
    """A neuron says how much; a capsule also says how."""
    d = Drawing(760, 235)
    d.text(110, 28, "a neuron: one number", bold=True)
    d.box(90, 55, 40, 120, "faint", radius=2)
    d.bar(90, 79, 40, 96, "one")
    d.text(145, 85, "0.8", anchor="start", kind="one")
    d.text(110, 205, "how strongly\nit is there", size=14)
    for x, kind, angle, title, words in (
        (380, "one", -0.7, "a capsule: a vector", "its length, below 1:\nhow surely it is there"),
        (650, "two", -1.9, "the same length, turned", "its direction:\nhow it looks"),
    ):
        y, r = 115, 66
        d.text(x, 28, title, bold=True)
        d.circle(x, y, r)
        tip = (x + 0.8 * r * math.cos(angle), y + 0.8 * r * math.sin(angle))
        d.line((x, y), tip, kind=kind, width=3, arrow=True)
        d.text(x, 205, words, size=14)
    return d


def agreement() -> Drawing:
    """Nine input capsules vote for two output capsules: couplings and outputs, as computed."""
    angles = {
        "A": [20, 32, 27, 38, 24, 30, 150, -70, 265],
        "B": [200, -35, 95, 310, 160, 20, 85, 92, 80],
    }
    votes = torch.tensor(
        [
            [[1.6 * math.cos(math.radians(a)), 1.6 * math.sin(math.radians(a))] for a in pair]
            for pair in zip(*angles.values(), strict=True)
        ]
    )  # [N, J, D]
    u, W = torch.ones(1, len(votes), 1), votes.unsqueeze(1)  # the votes are u W
    steps = list(rounds(u, W, 4, "rba", "final", None, "input"))
    d = Drawing(760, 430)
    size = 78
    for row, (name, kind) in enumerate((("A", "one"), ("B", "two"))):
        d.text(24, 125 + 190 * row, name, bold=True, kind=kind, size=20)
        for column, r in enumerate((0, 1, 3)):
            c, v = steps[r]
            x, y = 165 + 230 * column, 120 + 190 * row
            if row == 0:
                title = "all votes count alike" if r == 0 else f"after {r} update" + "s" * (r > 1)
                d.text(x, 24, title, bold=True)
            d.circle(x, y, size)
            for i in range(len(votes)):
                share = float(c[0, i, row])
                end = votes[i, row] / 1.6 * size
                d.line(
                    (x, y),
                    (x + float(end[0]), y - float(end[1])),
                    kind=kind,
                    width=0.6 + 2.4 * share,
                    arrow=True,
                    opacity=0.12 + 0.78 * share,
                )
            end = v[0, row] * size
            d.line((x, y), (x + float(end[0]), y - float(end[1])), width=4, arrow=True)
    d.text(
        395,
        420,
        "thin: votes, the stronger the more they count   ·   thick: the capsule that comes out",
        size=14,
    )
    return d


def picture(x: int) -> str:
    """An MNIST test image, or its reconstruction, out of the first row of a run's picture."""
    with Image.open(HERE.parent / "results/mnist/reconstructions.png") as sheet:
        square = sheet.convert("L").crop((x, 59, x + 76, 135))
        small = square.resize((28, 28), Image.Resampling.BOX)
    file = io.BytesIO()
    small.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def network() -> Drawing:
    """From image to class and back."""
    d = Drawing(860, 225)
    d.image(10, 42, 64, 64, picture(187))
    d.text(42, 28, "image", size=14)
    stages = [
        (100, 110, "two\nconvolutions", "", "faint"),
        (236, 100, "primary\ncapsules", "1152 × 8", "one"),
        (362, 92, "capsule\nlayer", "32 × 8", "one"),
        (480, 110, "reversible\nblocks × n", "32 × 8", "two"),
        (616, 92, "class\ncapsules", "10 × 16", "one"),
    ]
    before = 78.0
    for x, width, words, shape, kind in stages:
        d.line((before, 74), (x - 7, 74), arrow=True)
        d.box(x, 42, width, 64, kind, wash=True)
        d.text(x + width / 2, 70, words)
        d.text(x + width / 2, 30, shape, size=13)
        before = x + width
    d.line((before, 74), (before + 28, 74), arrow=True)
    d.text(before + 40, 70, "ten lengths:\nit is a 2", anchor="start")
    d.line((662, 106), (662, 181), (598, 181), arrow=True)
    d.box(480, 156, 110, 50, "faint", wash=True)
    d.text(535, 186, "decoder")
    d.line((480, 181), (84, 181), arrow=True)
    d.image(10, 149, 64, 64, picture(267))
    d.text(282, 171, "the image again, from the capsule of one class", size=14)
    return d


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((MEASURED / f"{name}.json").read_text())["rows"]


def memory() -> Drawing:
    """Measured memory of the first capsule layer, as areas to one scale."""
    rows = {
        row["candidate"]: row
        for row in results("routing")
        if row["label"] == "layer1-mnist" and row["phase"] == "both"
    }
    shown = [
        ("published", "published code", "faint"),
        ("einsum", "einsum", "two"),
        ("chunked", "this library", "one"),
    ]
    d = Drawing(760, 330)
    x, scale = 20.0, 240 / math.sqrt(rows["published"]["peak_bytes"])
    for name, label, kind in shown:
        row = rows[name]
        side = scale * math.sqrt(row["peak_bytes"])
        d.box(x, 250 - side, side, side, kind, wash=True, radius=1)
        d.text(x, 278, label, anchor="start", bold=True)
        d.text(x, 299, f"{row['peak_bytes'] / 1e6:,.0f} MB", anchor="start", size=14)
        d.text(x, 319, f"{row['seconds']:.2f} s", anchor="start", size=14)
        x += max(side, 110) + 70
    return d


FIGURES = [capsule, agreement, network, memory]

if __name__ == "__main__":
    for figure in FIGURES:
        figure().write(HERE / f"{figure.__name__}.svg")
