"""`mocapsnet import`; that outputs are the same is tested with `load_published`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import mocapsnet
from mocapsnet.published import load_published

from ..mocapsnet.test_published import weights

Command = Callable[..., tuple[int, str, str]]


def test_a_checkpoint_becomes_a_folder(command: Command) -> None:
    torch.save({name: w.float() for name, w in weights().items()}, "theirs.pth.tar")
    options = "--gamma 0.8 --iterations 2 --classes ant bee cat".split()
    code, output, errors = command("import", "theirs.pth.tar", "--out", "ours", *options)
    assert code == 0, errors
    assert "ours: MoCapsNet, 2 block(s), 3 classes" in output
    loaded = mocapsnet.load("ours")
    expected = load_published("theirs.pth.tar", gamma=0.8, iterations=2)
    assert loaded.config == expected.config and loaded.config.skip == "twice"
    assert loaded.class_names == ("ant", "bee", "cat")
    pixels = torch.rand(2, 1, 12, 12)
    assert torch.equal(loaded.predict(pixels).lengths, expected.predict(pixels).lengths)
    code, _, errors = command("import", "theirs.pth.tar", "--out", "plain", "--plain")
    assert code == 0, errors
    assert mocapsnet.load("plain").config.skip == "once"
    torch.save(weights(sda=True), "sda.pth.tar")
    code, _, errors = command("import", "sda.pth.tar", "--out", "sda")
    assert code == 0, errors
    config = mocapsnet.load("sda").config
    assert (config.method, config.sda_mean, config.sda_scale) == ("sda", "batch", "published")
    code, _, errors = command("import", "theirs.pth.tar", "--out", "ours")
    assert code == 2 and "--out ours exists" in errors


def test_what_cannot_be_imported_is_said(command: Command) -> None:
    code, _, errors = command("import", "none.pth.tar", "--out", "ours")
    assert code == 2 and "none.pth.tar cannot be read" in errors
    torch.save(weights(), "theirs.pth.tar")
    code, _, errors = command("import", "theirs.pth.tar", "--out", "ours", "--classes", "ant")
    assert code == 2 and "one for each of 3 classes; got 1" in errors
    assert not Path("ours").exists()
