"""Adam with exponential or cosine decay, and Ranger21, each with the learning rate it is using."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler

from mocapsnet import CapsNet, ConvMoCapsNet
from mocapsnet.train.options import OptimOptions

DECAY_PER_EPOCH = 0.96
CLASSES = 10
"""Of the data sets by which the learning rate was chosen."""
WARM_UP = 0.05
"""Share of a run's steps over which the cosine schedule rises."""
GRAPHED = ("cuda",)
"""Kinds of devices on which Adam is a `FusedAdam`; on a CPU it is PyTorch's, one pass too."""


class Schedules(NamedTuple):
    """Of the learning rate: to step once per epoch, or with every step, or none."""

    epoch: LRScheduler | None = None
    step: LRScheduler | None = None


class FusedAdam(Adam):
    """Adam as one kernel that reads its learning rate from a tensor, so that a CUDA graph of a step
    takes the rate that it is given before each replay.

    In `param_groups` the rate is a number, as it is for Adam: schedules and checkpoints know of no
    tensor. Steps outside of a graph read the tensor too, so both give the same bits; they differ by
    rounding from those of Adam, whose rate is not rounded to float32.
    """

    rates: tuple[Tensor, ...] = ()
    """One for each group, on its device; made when they are first set."""

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **options: Any
    ):
        super().__init__(parameters, fused=True, **options)

    def set_rates(self) -> None:
        """Give the rates of `param_groups` to the tensors. Waits for nothing."""
        if not self.rates:
            self.rates = tuple(
                torch.zeros((), device=group["params"][0].device) for group in self.param_groups
            )
        for rate, group in zip(self.rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Steps inside are captured by a CUDA graph: they leave the rates' tensors as they are."""
        self.set_rates()
        for group in self.param_groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in self.param_groups:
                group["capturable"] = False

    def step(self, closure: Any = None) -> Any:
        if not all(group["capturable"] for group in self.param_groups):
            self.set_rates()
        numbers = [group["lr"] for group in self.param_groups]
        try:
            for rate, group in zip(self.rates, self.param_groups, strict=True):
                group["lr"] = rate
            return super().step(closure)
        finally:
            for number, group in zip(numbers, self.param_groups, strict=True):
                group["lr"] = number


def parameter_groups(options: OptimOptions, model: CapsNet) -> list[dict[str, Any]]:
    """The parameters of a network for `build_optimizer`, with a learning rate for each group.

    Adam moves a weight by about its learning rate, whatever the weight's size. A vote for one of J
    classes counts 1/J at the start, so length-preserving initialisation draws the weights about J
    times as large, and a step of one size moves the class capsules J times less. A rate in
    proportion to the number of classes moves them as far as with ten.

    Returns: one group, or the class capsules' weights as a second one.
    """
    factor = options.class_lr_factor
    if factor is None:
        conv = isinstance(model, ConvMoCapsNet) and options.optimizer == "adam"
        factor = max(1.0, model.config.classes / CLASSES) if conv else 1.0
    if factor == 1:
        return [{"params": list(model.parameters())}]
    last = list(model.last.parameters())
    rest = [p for p in model.parameters() if all(p is not own for own in last)]
    return [{"params": rest}, {"params": last, "lr": factor * options.lr}]


def build_optimizer(
    options: OptimOptions,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    steps: int,
    device: torch.device | None = None,
) -> tuple[Optimizer, Schedules]:
    """The optimiser, and the schedule of its learning rate.

    Args:
        options: resolved options.
        parameters: what to optimise, or `parameter_groups`.
        device: where they will be; None for the CPU.
        steps: optimiser steps in the whole run. Ranger21 warms up over the first steps (at most
            2,000, or 22 % of a short run) and down over the last 28 %, so it needs the true
            number, unless `planned_steps` says for how many an epoch to plan: the rate stays where
            the warm-down ends, or does not get there. It gets no schedule besides its own.
    """
    if options.optimizer == "adam":
        kind = "cpu" if device is None else device.type
        settings: dict[str, Any] = {
            "lr": options.lr,
            "weight_decay": options.weight_decay,
            "decoupled_weight_decay": True,
        }
        adam: Adam
        if kind in GRAPHED:
            adam = FusedAdam(parameters, **settings)
        else:
            adam = Adam(parameters, fused=kind == "cpu" or None, **settings)
        if options.schedule == "cosine":
            return adam, Schedules(step=LambdaLR(adam, cosine(steps)))
        return adam, Schedules(epoch=ExponentialLR(adam, gamma=DECAY_PER_EPOCH))
    from pytorch_optimizer import Ranger21

    # min(): its warm-down ends at 3e-5 whatever lr is, and would rise for a smaller lr.
    warm_down_min_lr = min(3e-5, options.lr)
    if options.planned_steps is not None:
        steps = options.epochs * options.planned_steps
    return Ranger21(
        parameters, num_iterations=steps, lr=options.lr, warm_down_min_lr=warm_down_min_lr
    ), Schedules()


def cosine(steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by in each of so many steps: it rises evenly over the
    first WARM_UP of them, then falls by half a cosine, to zero after the last.

    Source: Loshchilov and Hutter 2017, "SGDR", without restarts.
    """
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1, (step - warm) / max(1, steps - warm))
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


def current_lr(optimizer: Optimizer) -> float:
    """The learning rate of the last step (Ranger21 keeps its own) or of the next one (Adam)."""
    own = getattr(optimizer, "optimizer", optimizer)  # not Accelerate's around it
    return float(getattr(own, "current_lr", own.param_groups[0]["lr"]))
