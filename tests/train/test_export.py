"""A trained network as an ONNX file, run by onnxruntime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mocapsnet import CapsNet, MoCapsNet, Preprocessing, ResCapsNet

Command = Callable[..., tuple[int, str, str]]

SMALL = dict(channels=8, capsules=4, capsule_dim=4, class_dim=4, kernel_size=3, decoder=(6,))


def network(model_class: type[CapsNet] = MoCapsNet, **options: object) -> CapsNet:
    torch.manual_seed(0)
    model = model_class((3, 12, 10), 3, **SMALL | options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # lengths far from zero, so that a wrong routing shows
    model.class_names = ["ant", "bee", "cat"]
    return model


def compare(model: CapsNet, path: Path) -> None:
    """Every output of the file, for batches of one and of many, against the network's float64."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (pixels_in,) = session.get_inputs()
    assert pixels_in.name == "pixels" and pixels_in.shape == ["batch", 3, 12, 10]
    assert [output.name for output in session.get_outputs()] == [
        "lengths",
        "capsules",
        "reconstruction",
    ]
    metadata = session.get_modelmeta()
    assert metadata.producer_name == "mocapsnet"
    assert json.loads(metadata.custom_metadata_map["class_names"]) == ["ant", "bee", "cat"]
    for batch in (1, 7):
        pixels = torch.rand(batch, 3, 12, 10)
        found = session.run(None, {"pixels": pixels.numpy()})
        expected = model.double().predict(pixels.double())
        for one, name in zip(found, ("lengths", "capsules", "reconstruction"), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, getattr(expected, name), atol=2e-6, rtol=1e-4)
    assert expected.lengths.max() > 0.1


@pytest.mark.slow
def test_onnxruntime_computes_what_the_network_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = network(ResCapsNet, method="sda", grouping="pixels")
    model.preprocessing = Preprocessing("fixed", (0.5,), (0.3,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config
    path = model.export_onnx(tmp_path / "deep" / "model.onnx")
    assert model.config == config and model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    compare(model, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # weights are inside


@pytest.mark.slow
def test_the_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    network(velocity="block", blocks=2).save_pretrained("model")
    code, output, errors = command("export", "model", "--out", "a.onnx")
    assert code == 0, errors
    assert "a.onnx: outputs differ from PyTorch's by" in output
    compare(network(velocity="block", blocks=2), Path("a.onnx"))
    code, _, errors = command("export", "model", "--out", "a.onnx")
    assert code == 2 and "--out a.onnx exists" in errors
    # A file of other weights is found out, and not left behind.
    monkeypatch.setattr(CapsNet, "export_onnx", lambda self, path: path.write_bytes(other))
    other = Path("a.onnx").read_bytes()
    changed = network(velocity="block", blocks=2)
    with torch.no_grad():
        changed.last.weight.mul_(1.1)
    changed.save_pretrained("changed")
    code, _, errors = command("export", "changed", "--out", "b.onnx")
    assert code == 1 and "differs by" in errors and not Path("b.onnx").exists()


def test_what_is_missing_is_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, errors = command("export", "none")
    assert code == 2 and "none is not a folder" in errors
    network().save_pretrained("model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, errors = command("export", "model")
    assert code == 2 and 'ONNX needs onnxscript: pip install "mocapsnet[onnx]"' in errors
    assert not Path("model.onnx").exists()
