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
    steps = list(rounds(u, W, 4, "rba", "final", None, "input", "paper"))
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
    """Measured memory and time of the first capsule layer; areas are to one scale."""
    rows = {
        row["candidate"]: row
        for row in results("routing")
        if row["label"] == "layer1-mnist" and row["phase"] == "both"
    }
    shown = [
        ("published", "published code", "faint"),
        ("einsum", "einsum", "two"),
        ("einsum, compiled", "einsum, compiled", "two"),
        ("chunked", "this library", "one"),
    ]
    return areas([(rows[name], label, kind) for name, label, kind in shown])


def convolution() -> Drawing:
    """Measured memory and time of a convolutional capsule layer; areas are to one scale."""
    rows = {
        row["candidate"]: row
        for row in reversed(results("convolution"))  # the first of a candidate has the same batch
        if row["part"] == "layer" and (row["side"], row["capsules"]) == (64, 16)
    }
    shown = [
        ("einsum", "unfold, einsum", "two"),
        ("checkpoint", "the same, checkpointed", "two"),
        ("fused", "this library", "one"),
    ]
    return areas([(rows[name], label, kind) for name, label, kind in shown])


def areas(shown: list[tuple[dict[str, Any], str, str]]) -> Drawing:
    """A square for each row's peak, with its label and time; the largest is 240 wide."""
    d = Drawing(760, 330)
    x, scale = 20.0, 240 / math.sqrt(max(row["peak_bytes"] for row, _, _ in shown))
    for row, label, kind in shown:
        side = scale * math.sqrt(row["peak_bytes"])
        d.box(x, 250 - side, side, side, kind, wash=True, radius=1)
        d.text(x, 278, label, anchor="start", bold=True)
        d.text(x, 299, f"{row['peak_bytes'] / 1e6:,.0f} MB", anchor="start", size=14)
        d.text(x, 319, f"{row['seconds']:.2f} s", anchor="start", size=14)
        x += max(side, 130) + 40
    return d


def chunks() -> Drawing:
    """One iteration: votes of a few input capsules at a time, made, used and dropped."""
    d = Drawing(860, 330)
    d.text(62, 24, "input\ncapsules u", size=14)
    d.text(150, 24, "matrices\nW", size=14)
    for n in range(9):
        kind = "one" if n in (3, 4) else "faint"
        d.box(42, 62 + 26 * n, 40, 20, kind, wash=True, line=1, radius=2)
        d.box(125, 62 + 26 * n, 50, 20, kind, wash=True, line=1, radius=2)
    d.line((184, 160), (218, 160), arrow=True)
    d.box(226, 118, 160, 84, "one", wash=True)
    d.text(306, 142, "votes of a chunk", bold=True)
    d.text(306, 164, "u W", size=14)
    d.text(306, 188, "made, used, dropped", size=13)
    d.line((386, 160), (420, 160), arrow=True)
    d.box(428, 118, 160, 84, "one", wash=True)
    d.text(508, 142, "couplings", bold=True)
    d.text(508, 164, "softmax(votes · V)", size=14)
    d.text(508, 188, "also dropped", size=13)
    d.line((588, 160), (622, 160), arrow=True)
    d.box(630, 118, 180, 84, "ink", wash=True)
    d.text(720, 142, "weighted sum s", bold=True)
    d.text(720, 164, "grows chunk by chunk", size=14)
    d.text(720, 188, "B × J × D numbers", size=13)
    d.line((720, 202), (720, 272), (596, 272), arrow=True)
    d.text(730, 250, "after the\nlast chunk", anchor="start", size=13)
    d.box(428, 240, 160, 64, "two", wash=True)
    d.text(508, 264, "state V", bold=True)
    d.text(508, 288, "V + squash(s)", size=14)
    d.line((508, 240), (508, 210), arrow=True, kind="two", width=2)
    d.text(320, 268, "all that goes on to\nthe next iteration", size=14)
    d.line((390, 272), (422, 272), kind="faint")
    d.line((508, 112), (508, 80), (306, 80), (306, 112), arrow=True, kind="faint", dashed=True)
    d.text(406, 70, "next chunk", size=13)
    return d


def states() -> Drawing:
    """Which states of a stack are kept by forward, and how backward comes by the others."""
    d = Drawing(860, 300)
    left, step, y = 60, 82, 92
    d.text(14, 34, "forward", bold=True, anchor="start")
    d.text(14, 200, "backward", bold=True, anchor="start")
    for n in range(10):
        x = left + step * n
        kept = n in (4, 9)
        kind = "two" if kept else "faint"
        d.box(x - 22, y - 22, 44, 44, kind, wash=kept, line=2 if kept else 1.2)
        d.text(x, y + 5, f"x{SUB[n]} v{SUB[n]}", size=13, kind="ink" if kept else "faint")
        if n:
            d.line((x - step + 24, y), (x - 28, y), arrow=True)
        if kept:
            d.text(x, y - 34, "kept", size=14, kind="two", bold=True)
    y = 235
    for n in range(10):
        x = left + step * n
        kept = n in (4, 9)
        kind = "two" if kept else "one"
        d.box(x - 22, y - 22, 44, 44, kind, wash=kept, line=2 if kept else 1.2)
        d.text(x, y + 5, f"x{SUB[n]} v{SUB[n]}", size=13, kind="ink" if kept else "one")
        if n and n - 1 not in (4,):
            d.line((x - 24, y), (x - step + 28, y), arrow=True, kind="one")
        if kept:
            d.line((x, 118), (x, 206), arrow=True, kind="two", dashed=True)
    d.text(left + 2 * step, y + 46, "from the anchor back, rounding starts anew", size=13)
    d.text(left + 7 * step, y + 46, "layer by layer, from the last state", size=13)
    return d


SUB = [chr(0x2080 + n) for n in range(10)]


def errors() -> Drawing:
    """Measured error of reconstructed states against the number of layers."""
    rows = results("reversal")
    d = Drawing(760, 400)
    x0, y0, width, height = 80, 30, 520, 300
    low, high = -9, 1

    def place(layers: float, error: float) -> tuple[float, float]:
        across = math.log(layers / 2) / math.log(1000 / 2)
        up = (min(math.log10(error), high) - low) / (high - low)
        return x0 + width * across, y0 + height * (1 - up)

    for exponent in range(-8, 1, 2):
        y = place(2, 10.0**exponent)[1]
        d.line((x0, y), (x0 + width, y), kind="faint", width=0.6, opacity=0.5)
        d.text(
            x0 - 10, y + 5, "1" if exponent == 0 else f"10{POWERS[exponent]}", anchor="end", size=13
        )
    depths = sorted({row["depth"] for row in rows})
    for depth in depths:
        x = place(depth, 1)[0]
        d.line((x, y0 + height), (x, y0 + height + 5), kind="faint", width=1)
        d.text(x, y0 + height + 22, f"{depth}", size=13)
    d.box(x0, y0, width, height, "faint", line=1, radius=0)
    d.text(x0 + width / 2, y0 + height + 48, "layers", size=14)
    for gamma, kind in ((0.5, "faint"), (0.9, "two"), (0.99, "one")):
        for anchors in (False, True):
            kept = "anchors" if anchors else "no anchors"
            line = {
                row["depth"]: row["x_error"]
                for row in rows
                if row["gamma"] == gamma and row["kind"] == kept
            }
            points = []
            for depth in depths:
                error = line[depth]
                error = min(float(error), 10.0**high)  # the file writes infinity as "inf"
                points.append(place(depth, error))
                if error >= 10.0**high:
                    break
            d.line(*points, kind=kind, width=2.2, dashed=not anchors)
        y = {0.5: 105, 0.9: 155, 0.99: 205}[gamma]
        d.line((620, y - 5), (650, y - 5), kind=kind, width=2.2)
        d.text(660, y, f"gamma {gamma}", anchor="start", size=14)
    d.line((620, 260), (650, 260), width=2.2)
    d.text(660, 265, "anchors", anchor="start", size=14)
    d.line((620, 290), (650, 290), width=2.2, dashed=True)
    d.text(660, 295, "no anchors", anchor="start", size=14)
    d.text(
        x0,
        20,
        "relative error of a reconstructed state, worst layer, float32",
        anchor="start",
        size=14,
    )
    return d


POWERS = {-8: "⁻⁸", -6: "⁻⁶", -4: "⁻⁴", -2: "⁻²"}

FIGURES = [capsule, agreement, network, memory, convolution, chunks, states, errors]

if __name__ == "__main__":
    for figure in FIGURES:
        figure().write(HERE / f"{figure.__name__}.svg")
