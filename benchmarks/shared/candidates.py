"""The networks that are compared: three models, eager or fused, stored or recomputed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mocapsnet import CapsNet, CapsuleLoss, build_model
from mocapsnet.model import CapsNetConfig
from mocapsnet.reversible import ResidualStack
from mocapsnet.train import graph
from mocapsnet.train.optimizers import FusedAdam

from . import published
from .measure import relative_error

IMAGES, CLASSES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}, 10
"""Shapes of images; SVHN's are CIFAR-10's."""
TOLERANCE = 1e-4
SAME = 1e-8
ROUNDING = 8 * 2.0**-29
"""What stacks without shortcuts make of the rounding of float64, over what they make of float32's,
at most: it is 2^-29 of that, and each order of summation has its own."""


class Candidate(NamedTuple):
    """A model and how it routes and stores."""

    model: str
    routing: published.Routing | None
    """Eager routing; None for the fused one."""
    memory: str
    """"stored", "checkpoint" (residual stacks) or "reversible" (momentum stacks)."""

    def build(
        self,
        blocks: int,
        channels: int = 256,
        backend: str | None = None,
        images: str = "mnist",
    ) -> CapsNet:
        """The same weights for all candidates of one model."""
        torch.manual_seed(0)
        memory = "reversible" if self.memory == "reversible" else "stored"
        config = CapsNetConfig(
            IMAGES[images],
            CLASSES,
            blocks,
            channels=channels,
            memory=memory,
            routing_backend=backend,
        )
        model = build_model(self.model, config)
        if self.routing is not None:
            published.make_eager(model, self.routing)
        if self.memory == "checkpoint":
            assert isinstance(model.stack, ResidualStack)
            model.stack = published.CheckpointedStack(model.stack)
        return model


PUBLISHED, EINSUM = published.broadcast_matmul, published.einsum
CANDIDATES = {
    "CapsNet, published": Candidate("capsnet", PUBLISHED, "stored"),
    "ResCapsNet, published": Candidate("rescapsnet", PUBLISHED, "stored"),
    "MoCapsNet, published": Candidate("mocapsnet", PUBLISHED, "reversible"),
    "ResCapsNet, einsum": Candidate("rescapsnet", EINSUM, "stored"),
    "ResCapsNet, einsum, checkpoint": Candidate("rescapsnet", EINSUM, "checkpoint"),
    "CapsNet, fused": Candidate("capsnet", None, "stored"),
    "ResCapsNet, fused": Candidate("rescapsnet", None, "stored"),
    "MoCapsNet, fused, stored": Candidate("mocapsnet", None, "stored"),
    "MoCapsNet, fused, reversible": Candidate("mocapsnet", None, "reversible"),
}
STYLES = {  # colour: routing; line: model or memory
    "CapsNet, published": {"color": "C3", "linestyle": ":"},
    "ResCapsNet, published": {"color": "C3", "linestyle": "--"},
    "MoCapsNet, published": {"color": "C3"},
    "ResCapsNet, einsum": {"color": "C1", "linestyle": "--"},
    "ResCapsNet, einsum, checkpoint": {"color": "C1", "linestyle": "-."},
    "CapsNet, fused": {"color": "C0", "linestyle": ":"},
    "ResCapsNet, fused": {"color": "C0", "linestyle": "--"},
    "MoCapsNet, fused, stored": {"color": "C0", "linestyle": "-."},
    "MoCapsNet, fused, reversible": {"color": "C0"},
}

Batch = tuple[Tensor, Tensor, Tensor]


def batch_of(
    size: int, device: torch.device, image: tuple[int, int, int] = IMAGES["mnist"]
) -> Batch:
    """Normalised images, their pixels in [0, 1], and labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(size, *image, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return ((pixels - 0.5) * 12**0.5).to(device), pixels.to(device), labels.to(device)


def training_step(
    model: CapsNet, optimizer: torch.optim.Optimizer, batch: Batch, bfloat16: bool = False
) -> Callable[[], object]:
    """Forward, loss, backward and optimiser; convolutions in bfloat16 if asked for."""
    return partial(step_on_images(model, optimizer, bfloat16), *batch)


def graphed_step(
    model: CapsNet, optimizer: FusedAdam, batch: Batch, bfloat16: bool = False
) -> Callable[[], object]:
    """`training_step` captured as one CUDA graph, which each call replays.

    Raises: whatever says that it cannot be captured, see `graph.capture`.
    """
    step = step_on_images(model, optimizer, bfloat16)
    return partial(graph.capture(step, batch, model, optimizer), *batch)


def step_on_images(
    model: CapsNet, optimizer: torch.optim.Optimizer, bfloat16: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A training step as a function of images, pixels and labels; returns the loss [1]."""
    criterion = CapsuleLoss()

    def step(images: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(images, labels)
        total = criterion(output, pixels, labels).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach().reshape(1)

    return step


def network_results(
    model: CapsNet, *, batch: int, bfloat16: bool = False
) -> Iterator[Tensor | None]:
    """What the network puts out and all its gradients, in the dtype of its parameters.

    A network in float32 computes its convolutions in bfloat16 if asked for.
    """
    weight = model.last.weight
    bfloat16 &= weight.dtype == torch.float32
    images, pixels, labels = batch_of(batch, weight.device, model.config.image_shape)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        output = model(images.to(weight.dtype), labels)
    error = (output.reconstruction - pixels).square().sum()
    (output.lengths.square().sum() + error).backward()
    yield from (output.capsules, output.reconstruction)
    yield from (p.grad for p in model.parameters())


def without_kinks(model: nn.Module) -> None:
    """Puts SiLU in the place of ReLU: of the millions of numbers that a batch sends there some are
    so near to zero that rounding alone decides whether they have a gradient."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())


def check(
    candidates: Mapping[str, Candidate],
    blocks: int,
    channels: int,
    device: torch.device,
    results: Callable[[CapsNet], Iterable[Tensor | None]],
    images: str = "mnist",
) -> None:
    """Raises SystemExit unless every candidate, without kinks, computes what the reference does.

    Baselines are computed in float64, to be the same function. The library's are in float32, and
    as close to float64 as eager code is: that is `TOLERANCE` and twice the eager error in the same
    precision, which is larger in deep stacks without shortcuts. `results` gives what a model, which
    may be in float64, puts out, and all its gradients.
    """
    known: dict[str, tuple[list[Any], list[float]]] = {}

    def found(candidate: Candidate, backend: str | None, dtype: torch.dtype) -> list[Any]:
        model = candidate.build(blocks, channels, backend, images)
        without_kinks(model)
        return list(results(model.to(device, dtype)))

    def errors(got: list[Any], truth: list[Any]) -> list[float]:
        return [relative_error(*pair) for pair in zip(got, truth, strict=True)]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name, candidate in candidates.items():
            if candidate.model not in known:
                plain = Candidate(candidate.model, None, "stored")
                truth = [t.detach() for t in found(plain, "reference", torch.float64)]
                eager = found(plain, "reference", torch.float32)
                known[candidate.model] = truth, errors(eager, truth)
            truth, allowed = known[candidate.model]
            baseline = candidate.routing is not None
            dtype = torch.float64 if baseline else torch.float32
            got = errors(found(candidate, None, dtype), truth)
            for error, least in zip(got, allowed, strict=True):
                if not error <= (SAME + ROUNDING * least if baseline else TOLERANCE + 2 * least):
                    sys.exit(
                        f"{name}, {blocks} blocks: relative error {error:.1e}, eager code "
                        f"{least:.1e}; nothing was measured"
                    )
