"""How a run starts, RUN/start.json: layer by layer before the first step, and its first losses.

images      how many, the first batch of the first epoch, the numbers below are of
loss, margin, reconstruction, accuracy      of the network as it was drawn, means per image
layers      every layer with weights, in the order of the network:
    layer           its name in it
    weights         their number
    weight_norm     their Euclidean norm
    gradient_norm   that of their gradient, of the loss summed over the batch as in training
    gradient_rms    the root mean square of the gradient; Adam moves nothing by gradients far
                    below its epsilon of 1e-8
    in_length, out_length       of a capsule layer, the mean length of the capsules that enter
                    it and of those that it makes, before a residual stack adds its input
losses      by steps done, "100" and so on, as far as the run has got: loss, margin,
            reconstruction and accuracy, means over the images of the last 20 steps, or of as
            many of them as the epoch has done
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocapsnet import CapsNet
from mocapsnet.inspection import layer_calls
from mocapsnet.train import data
from mocapsnet.train.files import write_whole
from mocapsnet.train.metrics import PARTS
from mocapsnet.train.options import ModelOptions
from mocapsnet.train.trainer import Trainer

FILE = "start.json"
STEPS = (100, 300, 1000)
WINDOW = 20
DEAD = 1e-10
"""Gradients below it are reported: steps are less than a hundredth of the learning rate."""


def write(run: Path, trainer: Trainer, model: CapsNet) -> str | None:
    """Measure the network on the first batch, and write RUN/start.json.

    One process does it, a micro-batch at a time, so that it needs no more memory than a step.

    Args:
        model: the bare model that the trainer trains; it stays as it is.
    Returns: a warning, if it starts so that it will hardly learn.
    """
    options, accelerator = trainer.options, trainer.accelerator
    count = len(trainer.train_set)
    views = data.epoch_views(count, options.data, options.optim.seed, 0)
    images = min(options.optim.batch_size, count)
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    first = views.to(accelerator.device).split(images)[0]
    shares = [part for weight, *part in trainer.shares(first, parts, 0, 0) if weight]
    weights = list(model.parameters())
    sums = torch.zeros(4, device=accelerator.device)
    gradients = [torch.zeros_like(w) for w in weights]
    lengths: dict[str, Tensor] = {}
    buffers = [buffer.clone() for buffer in model.buffers()]  # running statistics
    model.train()
    for share in shares:
        pixels, _ = share
        for name, length in capsule_lengths(model, trainer.preprocessing(pixels)).items():
            lengths[name] = lengths.get(name, 0) + length
        loss, found = trainer.losses(model, *share)
        sums += found
        new = torch.autograd.grad(loss, weights, allow_unused=True)
        for gradient, part in zip(gradients, new, strict=True):
            gradient += 0 if part is None else part
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    of = {id(w): g for w, g in zip(weights, gradients, strict=True)}
    layers = []
    for name, layer in model.named_modules():
        own = list(layer.parameters(recurse=False))
        if own:
            row = {"layer": name, **norms(own, [of[id(w)] for w in own])}
            if name in lengths:
                row["in_length"], row["out_length"] = (lengths[name] / images).tolist()
            layers.append(row)
    content = {"images": images, **means(sums, images), "layers": layers, "losses": {}}
    write_whole(run / FILE, json.dumps(content, indent=2) + "\n")
    return dead(layers[0]["gradient_rms"], options.model)


def dead(gradient: float, model: ModelOptions) -> str | None:
    """A warning if the root mean square gradient of the first layer is next to nothing."""
    if not gradient < DEAD:
        return None
    way = "see mocapsnet compare RUN"
    if model.init == "paper":
        way = "--init length starts with longer capsules"
    elif model.method == "sda" and model.bias is None:
        way = "--bias 0.1 starts with longer capsules"
    return (
        f"mocapsnet: warning: gradients of the first layer are {gradient:.0e} at the start, far "
        f"below the optimiser's epsilon of 1e-08; the network will learn late or never: {way}"
    )


def capsule_lengths(model: CapsNet, images: Tensor) -> dict[str, Tensor]:
    """Of every capsule layer: mean lengths of the capsules that enter and leave [2], summed over
    the images."""
    return {
        name: torch.stack([x.norm(dim=-1).flatten(1).mean(1).sum() for x in (call.u, call.v)])
        for name, call in layer_calls(model, images).items()
    }


def norms(weights: list[Tensor], gradients: list[Tensor]) -> dict[str, Any]:
    """What start.json says of the parameters of a layer, in float64, as squares of 1e-20 are 0 in
    float32 long before their roots are."""
    count = sum(w.numel() for w in weights)
    weight, gradient = (
        torch.stack([t.detach().double().square().sum() for t in part]).sum().sqrt().item()
        for part in (weights, gradients)
    )
    return {
        "weights": count,
        "weight_norm": weight,
        "gradient_norm": gradient,
        "gradient_rms": gradient / count**0.5,
    }


def means(sums: Tensor, images: int) -> dict[str, float]:
    """Total, margin and reconstruction loss and correct predictions [4], per image."""
    return dict(zip(PARTS, (sums.double() / images).tolist(), strict=True))


def note_losses(run: Path, epoch: int, steps: Tensor, images: int, batch_size: int) -> None:
    """Add to RUN/start.json the losses after those of `STEPS` that an epoch has done.

    Args:
        epoch: 0 for the first.
        steps: sums over the images of each step of it [steps, 4], as `Trainer.steps`.
        images: in the epoch.
    """
    path, before = run / FILE, epoch * len(steps)
    done = [n - before for n in STEPS if before < n <= before + len(steps)]
    if not done or not path.exists():  # runs that began before there was such a file
        return
    content = json.loads(path.read_bytes())
    for last in done:
        first = max(0, last - WINDOW)
        count = min(last * batch_size, images) - first * batch_size
        content["losses"][str(before + last)] = means(steps[first:last].sum(0), count)
    write_whole(path, json.dumps(content, indent=2) + "\n")
