"""A trained network as an ONNX file, for programs without PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .pretrained import refuse_what_config_does_not_say

if TYPE_CHECKING:
    from .model import CapsNet

INPUT = "pixels"


def outputs(model: CapsNet) -> list[str]:
    """Names of the file's outputs."""
    return ["lengths", "capsules"] + ["reconstruction"] * (model.decoder is not None)


def export_onnx(model: CapsNet, path: str | os.PathLike[str]) -> Path:
    """Write a network to an ONNX file, its normalisation included.

    The file's input is `pixels` [batch, C, H, W], float32 in [0, 1], for any batch; its outputs are
    `lengths` [batch, classes], `capsules` [batch, classes, class_dim] and, of a network with a
    decoder, `reconstruction` [batch, C, H, W] from the longest capsule. Its metadata hold
    `class_names`, a JSON list. Votes of a whole batch are in memory at once, as in the reference
    implementation, which is what it holds: batch x 1.2 MB for the first layer on MNIST.

    Args:
        model: stays as it is.
        path: the file.
    Returns: the path.
    Raises: ImportError if a package is missing that `pip install "mocapsnet[onnx]"` brings;
        ValueError if the network was changed since it was built, as `save_pretrained`.
    """
    _import("onnx")
    _import("onnxscript")
    from . import __version__

    path = Path(path)
    graph = _Graph(_plain(model)).eval()
    example = torch.rand(2, *model.config.image_shape)
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=[INPUT],
            output_names=outputs(model),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.producer_name, program.model.producer_version = "mocapsnet", __version__
    program.model.metadata_props["class_names"] = json.dumps(list(model.class_names))
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=False)
    return path


def difference(model: CapsNet, path: str | os.PathLike[str], images: int = 5) -> float:
    """The greatest difference of any output between an ONNX file and its network, on random images.

    Raises: ImportError if onnxruntime is missing.
    """
    runtime = _import("onnxruntime")
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, *model.config.image_shape, generator=generator)
    found = session.run(outputs(model), {INPUT: pixels.numpy()})
    with torch.no_grad():
        expected = _Graph(copy.deepcopy(model).float().cpu()).eval()(pixels)
    return max(
        (torch.from_numpy(one) - other).abs().max().item()
        for one, other in zip(found, expected, strict=True)
    )


class _Graph(nn.Module):
    """Pixels in, outputs as a tuple."""

    def __init__(self, model: CapsNet):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        output = self.model(self.model.preprocessing(pixels))
        return tuple(getattr(output, name) for name in outputs(self.model))


def _plain(model: CapsNet) -> CapsNet:
    """The same network on the CPU, of operations that every program knows."""
    options = {"routing_backend": "reference", "memory": "stored"}
    options = {k: v for k, v in options.items() if hasattr(model.config, k)}
    refuse_what_config_does_not_say(model)
    with torch.random.fork_rng(devices=[]):  # the weights it draws are replaced
        plain = type(model)(**vars(dataclasses.replace(model.config, **options)))  # type: ignore[arg-type]
    plain.load_state_dict(model.state_dict())
    plain.preprocessing = model.preprocessing
    return plain.eval().float().cpu()


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f'ONNX needs {name}: pip install "mocapsnet[onnx]"') from error
