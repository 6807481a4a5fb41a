"""Views of the training images, against plain loops over images, and mixtures of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mocapsnet import Preprocessing
from mocapsnet.train import data
from mocapsnet.train.data import augment
from mocapsnet.train.options import DataOptions, TrainOptions
from mocapsnet.train.trainer import Trainer


def images(count: int = 6) -> data.ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 9, 7), np.uint8)
    names = [str(k) for k in range(count)]
    return data.image_set(pixels, np.arange(count), names, ("images", "labels"))


def test_padded_views_are_crops_of_the_images_in_order() -> None:
    train_set, options = images(), DataOptions(pad=2, flip=True)
    views = augment.epoch_views(6, options, seed=3, epoch=5)
    order, offsets = data.epoch_order(6, 2, 3, 5)
    assert torch.equal(views.indices, order) and torch.equal(views.offsets, offsets)
    assert views.boxes.shape == (6, 0)
    seen = augment.view(train_set, views, 2)
    for k in range(6):
        top, left = offsets[k].tolist()
        want = F.pad(train_set.images[order[k]], (2, 2, 2, 2))[:, top : top + 9, left : left + 7]
        want = want.float() / 255
        assert torch.equal(seen[k], want.flip(2) if views.flips[k] else want)
    assert 0 < views.flips.sum() < 6
    plain = augment.epoch_views(6, DataOptions(pad=2), 3, 5)
    assert not plain.flips.any() and torch.equal(plain.offsets, offsets)


def test_views_depend_on_seed_and_epoch_alone() -> None:
    options = DataOptions(pad=1, flip=True, crop="resized")
    views = augment.epoch_views(200, options, 0, 0)
    for a, b in zip(views, augment.epoch_views(200, options, 0, 0), strict=True):
        assert torch.equal(a, b)
    for seed, epoch in ((1, 0), (0, 1)):
        other = augment.epoch_views(200, options, seed, epoch)
        assert not torch.equal(views.boxes, other.boxes)
        assert not torch.equal(views.flips, other.flips)
    parts = [augment.view(images(200), part, 1) for part in views.shares(3)]
    assert torch.equal(torch.cat(parts), augment.view(images(200), views, 1))


@pytest.mark.parametrize("least", [0.25, 0.9, 1.0])
def test_boxes_lie_in_the_image_and_are_large_enough(least: float) -> None:
    boxes = augment.crop_boxes(5000, least, torch.Generator().manual_seed(0))
    x, y, width, height = boxes.unbind(1)
    for centre, size in ((x, width), (y, height)):
        assert (centre - size / 2 > -1e-6).all() and (centre + size / 2 < 1 + 1e-6).all()
    assert (width * height > least - 1e-5).all()
    ratio = width / height
    assert ratio.min() > 3 / 4 - 1e-5 and ratio.max() < 4 / 3 + 1e-5
    if least < 1:
        assert (width * height).mean() == pytest.approx((1 + least) / 2, abs=0.02)
        assert min(x.std(), y.std()) > 0.07 * (1 - least)


def test_resized_crop_is_cutting_and_enlarging() -> None:
    pixels = torch.rand(3, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 0.5, 0.5], [0.5, 0.25, 1.0, 0.5]])
    found = augment.resized_crop(pixels, boxes)
    torch.testing.assert_close(found[0], pixels[0])
    # away from the cut's edge, where enlarging the cut alone has no neighbours
    for k, cut in ((1, pixels[1, :, 6:, :4]), (2, pixels[2, :, :6])):
        want = F.interpolate(cut[None], (12, 8), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found[k, :, 1:-1, 1:-1], want[:, 1:-1, 1:-1])


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_mixtures_show_two_images_by_their_shares(mix: str) -> None:
    pixels = torch.arange(1.0, 6).view(5, 1, 1, 1).expand(5, 1, 16, 16)
    labels = torch.tensor([4, 0, 1, 2, 3])
    before = torch.get_rng_state()
    found, present = augment.mixed(pixels, labels, 5, mix, seed=1, epoch=2, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(present.sum(1), torch.ones(5))
    share = present.gather(1, labels[:, None]).squeeze(1)
    assert ((share > 0) & (share < 1)).all()
    others = present.gather(1, labels.roll(1)[:, None]).squeeze(1)
    torch.testing.assert_close(share + others, torch.ones(5))
    mean = share * pixels[:, 0, 0, 0] + others * pixels.roll(1, 0)[:, 0, 0, 0]
    torch.testing.assert_close(found.mean((1, 2, 3)), mean)
    again, _ = augment.mixed(pixels, labels, 5, mix, 1, 2, 3)
    other, _ = augment.mixed(pixels, labels, 5, mix, 1, 2, 4)
    assert torch.equal(again, found) and not torch.equal(other, found)


def test_both_kinds_take_turns() -> None:
    pixels, labels = torch.rand(4, 1, 16, 16), torch.arange(4)
    found = {
        mix: [augment.mixed(pixels, labels, 4, mix, 0, 0, step)[0] for step in range(8)]
        for mix in ("cutmix", "mixup", "both")
    }
    kinds = [
        "cutmix" if torch.equal(b, c) else "mixup" if torch.equal(b, m) else "none"
        for b, c, m in zip(found["both"], found["cutmix"], found["mixup"], strict=True)
    ]
    assert set(kinds) == {"cutmix", "mixup"}


@pytest.mark.parametrize("mix", ["none", "both"])
def test_a_step_sees_the_same_images_however_its_batch_is_split(mix: str) -> None:
    """Over processes and micro-batches; one that is left without images has one of weight zero."""
    options = TrainOptions(data=DataOptions(pad=1, flip=True, crop="resized", mix=mix))  # type: ignore[arg-type]
    batch = augment.epoch_views(6, options.data, 0, 0)
    nothing: Any = None
    trainer = Trainer(nothing, nothing, nothing, nothing, images(), Preprocessing(), options)

    def seen(processes: int, count: int) -> list[tuple[float, Tensor, Tensor]]:
        found = []
        for place in range(processes):
            found += list(trainer.shares(batch, count, 0, 3, slice(place, None, processes)))
        return found

    ((_, pixels, labels),) = seen(1, 1)
    for processes, count in ((1, 4), (3, 3), (2, 8)):
        parts = seen(processes, count)
        assert len(parts) == count
        order = sorted(range(count), key=lambda k: k % (count // processes))
        whole = [parts[k] for k in order if parts[k][0]]
        assert torch.equal(torch.cat([p for _, p, _ in whole]), pixels)
        assert torch.equal(torch.cat([each for _, _, each in whole]), labels)
        assert [len(p) for w, p, _ in parts if not w] == [1] * (count - len(whole))
