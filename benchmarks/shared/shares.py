"""Which part of the network a training step spends its time in, by PyTorch's profiler."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mocapsnet import CapsNet

from .candidates import Batch, training_step

PREFIX = "part: "
BACKWARD = {  # nodes of the backward pass, by their names, tried in this order
    "convolutions": r"Convolution|Threshold|Relu",
    "routing": r"Direct|Routing|Momentum|Primary|Squash",
    "decoder and losses": r"",
}
FORWARD = {"convolutions": "convolutions", "decoder": "decoder and losses"}
OPTIMIZER = re.compile(r"Optimizer\.(step|zero_grad)#")
NODE = "autograd::engine::evaluate_function: "
"""How the profiler names a node of the backward pass."""


def shares(model: CapsNet, batch: Batch, steps: int) -> dict[str, float]:
    """Share of time of each part, forward and backward, in `steps` steps after one that warms up.

    Routing includes primary capsules and the stack. What no part claims, such as the margin loss
    in forward and Python between operations, is "rest". On a GPU the time is that of its kernels.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    step = training_step(model, optimizer, batch)
    step()
    cuda = batch[0].device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    handles = [h for name, part in model.named_children() for h in marked(name, part)]
    try:
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function(PREFIX + "step"):
                    step()
                if cuda:
                    torch.cuda.synchronize()
    finally:
        for handle in handles:
            handle.remove()
    total = 0.0
    found = dict.fromkeys([*BACKWARD, "optimiser"], 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # a GPU's kernels; the ranges are seen once more
            total += 0.0 if event.is_user_annotation else event.self_device_time_total
        elif event.key == PREFIX + "step":
            total += 0.0 if cuda else event.cpu_time_total
        elif part := part_of(event.key):
            found[part] += event.device_time_total if cuda else event.cpu_time_total
    return {part: seconds / total for part, seconds in found.items()} | {
        "rest": 1 - sum(found.values()) / total
    }


def part_of(key: str) -> str | None:
    """The part that an event of this name belongs to as a whole; None for what lies within."""
    if key.startswith(PREFIX):
        return FORWARD.get(key.removeprefix(PREFIX), "routing")
    if key.startswith(NODE) and "AccumulateGrad" not in key:
        return next(part for part, names in BACKWARD.items() if re.search(names, key))
    return "optimiser" if OPTIMIZER.match(key) else None


def marked(name: str, part: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that give the forward pass of a part a name in the profile."""
    open_ranges: list[record_function] = []

    def enter(*_: object) -> None:
        open_ranges.append(record_function(PREFIX + name))
        open_ranges[-1].__enter__()

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
