"""The pictures of a run. Drawn without pyplot, so nothing depends on a display or global state."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mocapsnet import CapsNet
from mocapsnet.train import data
from mocapsnet.train.evaluation import Evaluation, Judged
from mocapsnet.train.metrics import Row, judged_by
from mocapsnet.train.pictures.mistakes import mistakes_figure, worst
from mocapsnet.train.pictures.pairs import pairs_figure, side_by_side


def write_pictures(
    run: Path,
    rows: list[Row],
    model: CapsNet,
    test_set: data.ImageSet,
    tested: Evaluation,
    kept: int,
) -> list[Path]:
    """Draw reconstructions, confusion matrix, worst images and (given rows) learning curves.

    Args:
        tested: the result of the network after epoch `kept`.
    """
    figures = {}
    if model.decoder is not None:
        figures["reconstructions"] = reconstructions(model, test_set)
    if tested.judged is not None:
        figures["worst_images"] = worst_images(model, test_set, tested.judged)
    names = [test_set.name(label) for label in range(len(tested.confusion))]
    figures["confusion_matrix"] = confusion_matrix(tested, names)
    if rows:
        figures["learning_curves"] = learning_curves(rows, model.class_loss, kept, tested)
    paths = []
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        paths.append(run / f"{name}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight", pad_inches=0.1)
    return paths


def learning_curves(
    rows: list[Row],
    class_loss: str = "margin loss",
    kept: int | None = None,
    tested: Evaluation | None = None,
) -> Figure:
    """Accuracy and the two parts of the loss after each epoch; one, where nothing is drawn.

    Args:
        kept, tested: an epoch and the test of the network after it, shown where the epochs were
            not tested but validated.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    split = judged_by(rows[-1])
    # One epoch is a point, not a line.
    marker = "o" if len(rows) < 20 else None
    said = f"{split}, last: {rows[-1][f'{split}_accuracy']:.2%}"
    if split == "validation" and tested is not None:
        said = f"test, epoch {kept}: {tested.accuracy:.2%}"
    panels = {
        "accuracy": f"Accuracy ({said})",
        "margin": f"{class_loss.capitalize()} per image",
        "reconstruction": "Squared reconstruction error per image",
    }
    if not any(row["train_reconstruction"] for row in rows):
        del panels["reconstruction"]
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for shown, colour in (("train", "tab:blue"), (split, "tab:orange")):
            values = [row[f"{shown}_{name}"] for row in rows]
            axes.plot(epochs, values, color=colour, marker=marker, ms=3, label=shown)
        if split == "validation" and tested is not None:
            value, label = getattr(tested, name), f"test, epoch {kept}"
            axes.plot([kept], [value], "*", color="tab:green", ms=11, label=label)
        axes.set(xlabel="epoch", title=title)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)  # a single epoch has a width too
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylim(bottom=0)
        axes.legend()
    return figure


@torch.no_grad()
def reconstructions(
    model: CapsNet, test_set: data.ImageSet, rows: int = 5, columns: int = 8
) -> Figure:
    """Pairs of test image and its reconstruction from the capsule of the predicted class."""
    shown = test_set.first(rows * columns)
    pixels = data.to_pixels(shown.images)
    model.eval()
    out = model(model.preprocessing(pixels))
    labels, predicted = shown.labels.tolist(), out.lengths.argmax(1).tolist()
    names = [(test_set.name(a), test_set.name(b)) for a, b in zip(labels, predicted, strict=True)]
    # Above a pair is room for about 23 letters.
    two_lines = any(name != guess and len(name + guess) > 11 for name, guess in names)
    text = "{},\npredicted {}" if two_lines else "{}, predicted {}"
    return pairs_figure(
        side_by_side(pixels, out.reconstruction),
        [name if name == guess else text.format(name, guess) for name, guess in names],
        [label != guess for label, guess in zip(labels, predicted, strict=True)],
        "Test images, each beside its reconstruction, under their class",
        columns,
    )


def worst_images(
    model: CapsNet, test_set: data.ImageSet, judged: Judged, count: int = 25
) -> Figure:
    """The test images with the largest margin loss, or whatever the network has for it."""
    shown = worst(judged, count)
    wrong = int((judged.labels != judged.guesses)[shown].sum())
    beside = "" if model.decoder is None else "beside its reconstruction, "
    title = (
        f"Of {len(test_set):,} test images the {len(shown)} with the largest {model.class_loss} "
        f"({wrong} mistakes),\neach {beside}under its class and that "
        + ("capsule's length" if model.has_capsules else "class's probability")
    )
    return mistakes_figure(model, test_set, judged, shown, title)


def confusion_matrix(tested: Evaluation, names: list[str]) -> Figure:
    """Share of each true class (row) by predicted class (column); counts where they fit."""
    counts = tested.confusion.double()
    classes = len(counts)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    few = classes <= 20
    # Many classes need room for their names.
    side = 6.2 if few else min(6.2 + 0.08 * classes, 24)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # A power scale, as the mistakes are few beside the diagonal.
    image = axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, label="share of the true class")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([t**0.5 for t in ticks], labels=[f"{t:.0%}" for t in ticks])
    axes.set(
        xlabel="predicted class",
        ylabel="true class",
        title=f"Test accuracy {tested.accuracy:.2%} ({tested.correct:,} of {tested.images:,})",
    )
    size = 9 if few else 6
    upright = max(map(len, names)) <= 2
    shown = range(classes if classes <= 250 else 0)  # more names cannot be read
    names = names[: len(shown)]
    axes.set_xticks(
        shown,
        names,
        size=size,
        parse_math=False,
        rotation=0 if upright else 45 if few else 90,
        ha="center" if upright or not few else "right",
        rotation_mode="anchor" if few else "default",
    )
    axes.set_yticks(shown, names, size=size, parse_math=False)
    if few:
        for i in range(classes):
            for j in range(classes):
                if counts[i, j]:
                    colour = "white" if shares[i, j] > 0.25 else "black"
                    axes.text(
                        j, i, f"{int(counts[i, j])}", ha="center", va="center", color=colour, size=9
                    )
    return figure
