"""Networks of the published code of Momentum Capsule Networks, github.com/moejoe95/MoCapsNet."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .convert import matrices
from .preprocessing import Preprocessing
from .reversible import MomentumStack

if TYPE_CHECKING:
    from .model import CapsNet

LAYOUT = "1 J N D K"


class TwiceSkippedStack(nn.Module):
    """x <- x + block(x), block after block, each a momentum stack of two layers.

    The momentum block returns x + v1 + v2 already, so a block makes 2x + v1 + v2, as in the
    published code, where a block that adds x calls a momentum network that does.

    Args:
        stack: its layers are taken, two to a block, and its gamma, memory and anchors.
    Shapes: x [...] -> x [...].
    """

    def __init__(self, stack: MomentumStack):
        super().__init__()
        options = dict(gamma=stack.gamma, memory=stack.memory, anchor_every=stack.anchor_every)
        self.blocks = nn.ModuleList(
            MomentumStack(stack.layers[n : n + 2], **options)  # type: ignore[arg-type]
            for n in range(0, len(stack.layers), 2)
        )

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for block in self.blocks for layer in block.layers]  # type: ignore[union-attr]

    def stream_weights(self, n: int) -> list[float]:
        """Those of blocks that add x once, by which initial weights are drawn."""
        blocks = (block.stream_weights(min(2, n - 2 * b)) for b, block in enumerate(self.blocks))  # type: ignore[operator]
        return [weight for block in blocks for weight in block]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def load_published(
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    residual: bool = True,
    gamma: float = 0.9,
    iterations: int = 3,
    preprocessing: Preprocessing | None = None,
) -> CapsNet:
    """A network trained with the published code, with the same outputs.

    Its sizes follow from the weights. Its options do not, and are those of that code's command
    line. Whether it was trained with momentum, and by which routing, is read from the names of the
    weights. Of scaled-distance agreement it takes the mean distance over the batch, as that code
    does: the outputs for an image depend on what it is given together with.

    Args:
        checkpoint: a file that it wrote, `checkpoints/*.pth.tar`, of which tensors alone are
            unpickled, or the state dict in it.
        residual: --residual was given.
        gamma, iterations: --gamma and --num_routing.
        preprocessing: None for that code's: mean 0.1307 and deviation 0.3081 for grey images, which
            are MNIST's there, and 0.5 and 0.5 for colour.
    Returns: a `MoCapsNet`, `ResCapsNet` or `CapsNet` in evaluation mode. Set its `class_names`, and
        keep it by `save_pretrained`.
    Raises: ValueError if this is no such checkpoint.
    """
    from .model import CapsNetConfig, build_model

    state = {name.removeprefix("module."): w for name, w in _state(checkpoint).items()}
    found = [re.fullmatch(r"blocks\.(\d+)\.functions\.(0\.network\.)?\d\.0\.W", n) for n in state]
    layers = [match for match in found if match]
    momentum = any(match[2] for match in layers)
    inside = "0.network." if momentum else ""
    blocks = 1 + max((int(match[1]) for match in layers), default=-1)
    names = {
        "first": "caps1",
        "last": "caps2",
        **{
            f"layer {2 * b + k}": f"blocks.{b}.functions.{inside}{k}.0"
            for b in range(blocks)
            for k in range(2)
        },
    }
    sda = "caps1.bias" in state
    try:
        layer_states = {
            ours: {"weight": matrices(state.pop(f"{theirs}.W"), LAYOUT)}
            | ({"bias": state.pop(f"{theirs}.bias").squeeze(0)} if sda else {})  # [1, J, D]
            for ours, theirs in names.items()
        }
        conv, primary = (
            {part: state.pop(f"{name}.{part}") for part in ("weight", "bias")}
            for name in ("conv1", "primary.conv")
        )
        decoder = {
            n: {part: state.pop(f"decoder.{n}.{part}") for part in ("weight", "bias")}
            for n in (0, 2, 4)
        }
    except KeyError as error:
        raise ValueError(f"not a checkpoint of the published code: it has no {error}") from None
    if state:
        raise ValueError(f"not a checkpoint of the published code: {min(state)} is not known")

    channels, colours, kernel = conv["weight"].shape[:3]
    _, capsule_dim, capsules, _ = layer_states["first"]["weight"].shape
    classes, class_dim = layer_states["last"]["weight"].shape[2:]
    side = math.isqrt(len(decoder[4]["bias"]) // colours)  # its images are square
    config = CapsNetConfig(
        (colours, side, side),
        classes,
        blocks=blocks,
        capsules=capsules,
        capsule_dim=capsule_dim,
        class_dim=class_dim,
        channels=channels,
        kernel_size=kernel,
        grouping="pixels",
        decoder=tuple(len(decoder[n]["bias"]) for n in (0, 2)),
        iterations=iterations,
        method="sda" if sda else "rba",
        sda_mean="batch",
        sda_scale="published",
        bias=0.1 if sda else None,
        init="paper",
        gamma=gamma,
        velocity="block",
        skip="twice" if momentum and residual else "once",
    )
    name = "mocapsnet" if momentum else "rescapsnet" if residual else "capsnet"
    with torch.random.fork_rng(devices=[]):  # the weights it draws are replaced
        model = build_model(name, config)
    stack: Any = getattr(model.stack, "layers", model.stack)
    ours = {
        model.convolutions[0]: conv,
        model.convolutions[2]: primary,
        model.first: layer_states["first"],
        model.last: layer_states["last"],
        **{layer: layer_states[f"layer {n}"] for n, layer in enumerate(stack)},
        **{model.decoder.layers[n]: decoder[n] for n in decoder},
    }
    try:
        for module, part in ours.items():
            module.load_state_dict(part, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's sizes do not fit one another: {error}") from error
    grey, colour = (
        Preprocessing("fixed", (0.1307,), (0.3081,)),
        Preprocessing("fixed", (0.5,), (0.5,)),
    )
    model.preprocessing = preprocessing or (grey if colours == 1 else colour)
    return model.requires_grad_(True).eval()


def _state(checkpoint: str | os.PathLike[str] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        state, name = checkpoint, "checkpoint"
    else:
        name = os.fspath(checkpoint)
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file, or one that holds more than tensors
            raise ValueError(
                f"{name} cannot be read as a file of torch.save that holds tensors alone: give the "
                "*.pth.tar that the published code wrote"
            ) from error
    if not isinstance(state, Mapping) or not all(isinstance(w, Tensor) for w in state.values()):
        raise ValueError(f"{name} holds no state dict, which has tensors by their names")
    return {key: weight.clone() for key, weight in state.items()}
