"""Adam with exponential decay, and Ranger21, each with the learning rate it is using."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from mocapsnet.train.options import OptimOptions

DECAY_PER_EPOCH = 0.96


def build_optimizer(
    options: OptimOptions, parameters: Iterable[nn.Parameter], steps: int
) -> tuple[Optimizer, ExponentialLR | None]:
    """The optimiser, and the schedule to step once per epoch if there is one.

    Args:
        options: resolved options.
        parameters: what to optimise.
        steps: optimiser steps in the whole run. Ranger21 warms up over the first steps (at most
            2,000, or 22 % of a short run) and down over the last 28 %, so it needs the true
            number, unless `planned_steps` says for how many an epoch to plan: the rate stays where
            the warm-down ends, or does not get there. It gets no schedule besides its own.
    """
    if options.optimizer == "adam":
        adam = Adam(parameters, lr=options.lr)
        return adam, ExponentialLR(adam, gamma=DECAY_PER_EPOCH)
    from pytorch_optimizer import Ranger21

    # min(): its warm-down ends at 3e-5 whatever lr is, and would rise for a smaller lr.
    warm_down_min_lr = min(3e-5, options.lr)
    if options.planned_steps is not None:
        steps = options.epochs * options.planned_steps
    return Ranger21(
        parameters, num_iterations=steps, lr=options.lr, warm_down_min_lr=warm_down_min_lr
    ), None


def current_lr(optimizer: Optimizer) -> float:
    """The learning rate of the last step (Ranger21 keeps its own) or of the next one (Adam)."""
    return float(getattr(optimizer, "current_lr", optimizer.param_groups[0]["lr"]))
