"""The pictures of what goes on inside a network."""

from __future__ import annotations

from itertools import pairwise
from math import log
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from mocapsnet import CapsNet, MoCapsNet, ResCapsNet, inspect_layers
from mocapsnet.train.data import ImageSet, to_pixels
from mocapsnet.train.evaluation import Judged
from mocapsnet.train.options import OptimOptions, TrainOptions
from mocapsnet.train.pictures import couplings, dimensions, inside, layers, routes

TINY = dict(capsules=4, capsule_dim=4, class_dim=3, channels=8, kernel_size=3, decoder=(8,))


def network(kind: type[CapsNet] = MoCapsNet, classes: int = 3, **options: object) -> CapsNet:
    torch.manual_seed(0)
    return kind((1, 8, 8), classes, **TINY | options).eval()


def images(classes: int = 3, count: int = 12) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(
        pixels, torch.arange(count) % classes, tuple(f"$class {n}" for n in range(classes))
    )


def words(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        found += [t.get_text() for t in (axes.title, axes.xaxis.label, *axes.texts, *ticks)]
    return found


def test_the_image_asked_for_is_a_test_image_or_a_file(tmp_path: Path) -> None:
    test_set = images()
    pixels, truth = inside.chosen_image("4", test_set)
    assert truth == 1 and torch.equal(pixels, to_pixels(test_set.images[4:5])[0])
    Image.fromarray(test_set.images[5, 0].numpy()).save("mine.png")
    Image.fromarray(test_set.images[6, 0].numpy()).save("4.png")
    Path("4.png").rename("4")
    for file, n in [("mine.png", 5), ("4", 6)]:
        pixels, truth = inside.chosen_image(file, test_set)
        assert truth is None and torch.equal(pixels, to_pixels(test_set.images[n : n + 1])[0])


def test_what_cannot_be_drawn_is_left_out_with_a_reason(tmp_path: Path) -> None:
    model, test_set = network(), images()
    options = TrainOptions(optim=OptimOptions(reconstruction_weight=0))
    chosen = inside.chosen_image("0", test_set)
    lengths = torch.ones(12)
    right = Judged(test_set.labels, test_set.labels, lengths, lengths, lengths)
    (tmp_path / "mistakes.png").write_bytes(b"of an earlier checkpoint")
    lines = inside.write(tmp_path, model, test_set, options, chosen, right)
    assert next(lines) == "no mistakes.png: all 12 test images are taken for what they are"
    assert next(lines).startswith("no dimensions.png: with --reconstruction-weight 0")
    assert {Path(line).name for line in lines} == {"places.png", "couplings.png", "layers.png"}
    assert len([*tmp_path.iterdir()]) == 3


def test_a_sweep_moves_one_dimension_of_one_class() -> None:
    model = network()
    given = []
    model.decoder = nn.Module()
    model.decoder.forward = lambda capsules: given.append(capsules) or capsules[:, None]  # type: ignore[method-assign]
    capsule = torch.tensor([0.5, -0.1, 0.2])
    drawn = dimensions.sweep(model, capsule, label=1)  # as images: [D, steps, 1, classes, D]
    assert drawn.shape == (3, 11, 1, 3, 3)
    assert not drawn[..., [0, 2], :].any(), "the other classes are masked"
    for d in range(3):
        for s in range(11):
            moved = capsule.clone()
            moved[d] += -0.25 + 0.05 * s
            torch.testing.assert_close(drawn[d, s, 0, 1], moved)


def test_dimensions_that_change_the_image_most_come_first() -> None:
    drawn = torch.zeros(3, 2, 1, 1, 1)
    drawn[:, 1, 0, 0, 0] = torch.tensor([0.1, -0.5, 0.3])
    assert dimensions.by_strength(drawn) == [1, 2, 0]


def test_the_example_of_a_class_is_one_that_the_network_gets_right() -> None:
    model, test_set = network(), images(count=30)
    guesses = model.predict(test_set.images).labels
    assert len(guesses.unique()) > 1, "the network must tell some images apart"
    for example in dimensions.examples(model, test_set):
        of_class = test_set.labels == example.label
        if (guesses[of_class] == example.label).any():
            assert example.taken_for == example.label
        torch.testing.assert_close(
            model.predict(example.pixels[None]).capsules[0, example.label], example.capsule
        )


def test_many_classes_take_more_pictures_and_missing_ones_none() -> None:
    model, test_set = network(classes=13), images(classes=12, count=24)
    test_set = ImageSet(test_set.images, test_set.labels, (*test_set.classes, "none"))
    model.class_names = test_set.classes
    first, second = (dimensions.figure(model, p) for p in dimensions.pages(model, test_set))
    titles = [axes.get_title() for page in (first, second) for axes in page.axes]
    named = [title.partition(", taken")[0] for title in titles if title]
    assert named == [f"$class {n}" for n in range(12)]
    assert "What each of the 3 dimensions" in words(second)[0]
    model.class_names = tuple(map(str, range(13)))
    seven = ImageSet(test_set.images, test_set.labels % 7, tuple(map(str, range(13))))
    (page,) = dimensions.pages(model, seven)
    axes = dimensions.figure(model, page).axes
    drawn = [one for one in axes if one.get_title()]
    assert len(drawn) == 7 and len(axes) == 10
    assert not any(one.axison for one in axes if one not in drawn), "frames around nothing"


def test_classes_along_a_table_of_couplings_have_their_names() -> None:
    names = [f"{n:05}" for n in range(43)]
    figure = couplings.table(torch.rand(6, 43), names, "title")
    ticks = {round(x): t.get_text() for x, t in zip(
        figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True
    )}  # fmt: skip
    assert len(ticks) > 3 and all(text == names[n] for n, text in ticks.items())


def test_coupling_entropy() -> None:
    equal = torch.full((2, 5, 8), 1 / 8)
    one = torch.nn.functional.one_hot(torch.arange(5), 8).float()
    two = one.clone()
    two[:, 6:] = 0.5
    two[:, :6] = 0
    assert layers.coupling_entropy(equal).tolist() == pytest.approx([1, 1])
    assert float(layers.coupling_entropy(one)) == 0
    assert float(layers.coupling_entropy(two)) == pytest.approx(log(2) / log(8))
    assert float(layers.coupling_entropy(torch.ones(5, 1))) == 1


@pytest.mark.parametrize(
    ("kind", "method"), [(CapsNet, "sda"), (ResCapsNet, "rba"), (MoCapsNet, "rba")]
)
def test_lengths_are_those_of_what_goes_into_the_layers_and_of_the_classes(
    kind: type[CapsNet], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, test_set = network(kind, blocks=2, method=method), images()
    whole = layers.measure(model, test_set)
    monkeypatch.setattr(layers, "VOTES", 1)  # one image at a time
    measured = layers.measure(model, test_set)
    torch.testing.assert_close(whole.entropy, measured.entropy)
    records = inspect_layers(model, model.preprocessing(to_pixels(test_set.images)))
    for n, record in enumerate(records.values()):
        lengths = record.u.norm(dim=-1)
        assert lengths.min() <= measured.lengths[n, 0] <= measured.lengths[n, 4] <= lengths.max()
        middle = lengths.flatten().quantile(0.5, interpolation="nearest")
        torch.testing.assert_close(measured.lengths[n, 2], middle)
    classes = records["last"].v.norm(dim=-1)
    right = classes[range(12), test_set.labels].median()
    assert measured.right == pytest.approx(float(right), rel=1e-4)
    assert measured.entropy.shape == (6, 3)
    assert measured.entropy[:, 0].tolist() == pytest.approx([1] * 6)
    assert (measured.entropy[[0, -1], 2] < 1).all()


def test_forty_layers_can_be_told_apart() -> None:
    model, test_set = network(blocks=20), images()
    figure = layers.figure(model, layers.measure(model, test_set))
    said = words(figure)
    assert {"1", "40", "\nclasses"} <= {*said}
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        names = [label.get_text() for label in axes.get_xticklabels()]
        upper = [box for box, name in zip(boxes, names, strict=True) if name[0] != "\n"]
        assert all(a.x1 < b.x0 for a, b in pairwise(upper)), "numbers overlap"
    seen = routes.route(model, to_pixels(test_set.images[:1])[0], truth=0)
    said = words(routes.tables_figure(model, seen))
    assert [word for word in said if word.startswith("layer ")] == [
        f"layer {n + 1}" for n in range(40)
    ]
    assert "Which capsule votes for which" in said[0]


def test_shares_are_red_above_an_equal_one_and_blue_below() -> None:
    c = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.5, 0.1, 0.2, 0.2]]])
    norm = routes.scale([c])
    equal, shares = routes.coloured(c, norm)[0]
    assert (equal.std(-1) < 0.01).all()
    assert shares[0, 0] > shares[0, 2] and (shares[1:, 2] > shares[1:, 0]).all()
    cells = routes.enlarge(routes.coloured(torch.rand(1, 3, 300), norm))
    assert cells.shape[-2] >= 300, "no column is left out"


@pytest.mark.parametrize("grouping", ["channels", "pixels"])
def test_maps_lie_where_the_primary_capsules_look(grouping: str) -> None:
    model = network(grouping=grouping)
    C, (H, W), K = 8, model.config.feature_size, 4
    owner = torch.zeros(C, H, W, dtype=torch.long)  # which capsule a feature belongs to
    with torch.no_grad():
        for n in range(model.config.primary_capsules):
            features = torch.randn(1, C, H, W, requires_grad=True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(model.primary(features)[0, n].sum(), features)
            owner[gradient[0] != 0] = n
    c = torch.rand(3, model.config.primary_capsules, 5)  # [iterations, N, J]
    expected = c[:, owner].mean(1)  # each place, over its features
    torch.testing.assert_close(couplings.place_maps(c, model.config), expected)
    assert K == model.config.capsule_dim
    seen = routes.route(model, to_pixels(images().images[:1])[0])
    said = words(routes.places_figure(model, seen))
    assert "Which place of the image" in said[0] and said.count("iteration 3") == 1
