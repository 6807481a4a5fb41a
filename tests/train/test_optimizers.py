"""Schedules, and that an optimiser can be put away and taken up again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mocapsnet import ConvMoCapsNet, ConvMoCapsNetConfig, MoCapsNet, build_model
from mocapsnet.train.optimizers import FusedAdam, build_optimizer, current_lr, parameter_groups
from mocapsnet.train.options import OptimOptions

from .helpers import assert_equal_nested, rows


def step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(8, 5, generator=generator)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adam_decays_once_per_epoch() -> None:
    optimizer, schedules = build_optimizer(OptimOptions(lr=1e-3), nn.Linear(5, 3).parameters(), 10)
    assert schedules.epoch is not None and schedules.step is None
    for epoch in range(4):
        assert current_lr(optimizer) == pytest.approx(1e-3 * 0.96**epoch, rel=1e-12)
        optimizer.step()
        schedules.epoch.step()


def test_the_cosine_rises_then_falls_to_zero() -> None:
    options = OptimOptions(lr=1e-2, schedule="cosine")
    optimizer, schedules = build_optimizer(options, nn.Linear(5, 3).parameters(), 200)
    assert schedules.step is not None and schedules.epoch is None
    rates = []
    for _ in range(200):
        rates.append(current_lr(optimizer))
        optimizer.step()
        schedules.step.step()
    assert rates[:10] == pytest.approx([1e-2 * (k + 1) / 11 for k in range(10)])
    assert rates[10] == max(rates) == 1e-2
    assert rates[105] == pytest.approx(1e-2 / 2)  # half way down
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-5
    assert current_lr(optimizer) == 0


def test_a_schedule_goes_on_where_it_was() -> None:
    options = OptimOptions(lr=1e-2, schedule="cosine")

    def begin() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer, schedules = build_optimizer(options, nn.Linear(5, 3).parameters(), 50)
        assert schedules.step is not None
        return optimizer, schedules.step

    (optimizer, schedule), (other, resumed) = begin(), begin()
    for k in range(50):
        if k == 20:  # as a checkpoint does
            other.load_state_dict(optimizer.state_dict())
            resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        if k >= 20:
            assert current_lr(other) == current_lr(optimizer)
            other.step()
            resumed.step()
        optimizer.step()
        schedule.step()


def test_weight_decay_is_that_of_adamw() -> None:
    """In the fused form that is the CPU's, bit for bit."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    other = copy.deepcopy(model)
    optimizer, _ = build_optimizer(OptimOptions(weight_decay=0.1), model.parameters(), 10)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for k in range(3):
        step(model, optimizer, k)
        step(other, adamw, k)
    assert_equal_nested(model.state_dict(), other.state_dict())


def conv(classes: int) -> ConvMoCapsNet:
    torch.manual_seed(0)
    config = ConvMoCapsNetConfig.preset((1, 8, 8), classes, capsules=2, stem=(4, 4), class_dim=4)
    return build_model("conv-mocapsnet", config)  # type: ignore[return-value]


@pytest.mark.parametrize("classes, factor, times", [(10, None, 1), (40, None, 4), (40, 1.0, 1)])
def test_class_capsules_learn_as_fast_with_many_classes(
    classes: int, factor: float | None, times: int
) -> None:
    model, options = conv(classes), OptimOptions(lr=1e-2, class_lr_factor=factor, schedule="cosine")
    optimizer, schedules = build_optimizer(options, parameter_groups(options, model), 20)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters())) and schedules.step is not None
    assert len(optimizer.param_groups) == (1 if times == 1 else 2)
    for name, parameter in model.named_parameters():
        own = times if name.startswith("last.") else 1
        assert rates[id(parameter)] == pytest.approx(own * current_lr(optimizer)), name
    before = model.last.weight.detach().clone()
    model(torch.rand(4, 1, 8, 8)).lengths.sum().backward()
    optimizer.step()
    moved = (model.last.weight - before).abs().max().item()
    assert moved == pytest.approx(times * current_lr(optimizer), rel=0.01)  # Adam's first step
    schedules.step.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(times * current_lr(optimizer))


def test_other_networks_and_ranger21_have_one_rate() -> None:
    for model in (conv(40), MoCapsNet((1, 8, 8), 40, channels=8, kernel_size=3, stride=1)):
        options = OptimOptions(optimizer="ranger21" if isinstance(model, ConvMoCapsNet) else "adam")
        assert len(parameter_groups(options, model)) == 1


def test_the_fused_forms_of_adam_are_adam() -> None:
    """But for rounding, at every rate of a schedule; what they save holds numbers for rates."""
    torch.manual_seed(0)
    nets = [nn.Linear(5, 3) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    options = OptimOptions(lr=1e-2, schedule="cosine", weight_decay=0.1)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}
    cpu, schedules = build_optimizer(options, nets[0].parameters(), 20)
    fused = FusedAdam(nets[1].parameters(), **settings)
    adam = torch.optim.Adam(nets[2].parameters(), fused=False, **settings)
    assert schedules.step is not None and cpu.param_groups[0]["fused"]
    for k in range(20):
        for net, optimizer in zip(nets, (cpu, fused, adam), strict=True):
            optimizer.param_groups[0]["lr"] = current_lr(cpu)
            step(net, optimizer, k)
        schedules.step.step()
    for net in nets[:2]:
        torch.testing.assert_close(net.state_dict(), nets[2].state_dict(), rtol=1e-5, atol=1e-7)
    for optimizer in (cpu, fused):
        json.dumps(optimizer.state_dict()["param_groups"])
    assert fused.rates[0] == pytest.approx(fused.param_groups[0]["lr"])


@pytest.mark.parametrize("lr", [1e-2, 1e-5], ids=["above its least rate", "below"])
def test_ranger21_follows_the_true_number_of_steps(lr: float) -> None:
    model = nn.Linear(5, 3)
    options = OptimOptions(optimizer="ranger21", lr=lr)
    optimizer, schedules = build_optimizer(options, model.parameters(), steps=100)
    assert schedules == (None, None)
    rates = []
    for k in range(100):
        step(model, optimizer, k)
        rates.append(current_lr(optimizer))
    # Warm-up over 22 steps, peak to step 71, then down to the least rate.
    least = min(3e-5, lr)
    assert rates[:22] == pytest.approx([lr * (k + 1) / 22 for k in range(22)])
    assert rates[22:71] == pytest.approx([lr] * 49)
    assert rates[72:] == sorted(rates[72:], reverse=True)
    assert rates[-1] == pytest.approx(least, rel=1e-6)


def test_ranger21_plans_for_other_steps_than_there_are() -> None:
    """As the published code has it: the batch size, for the steps of an epoch."""
    model = nn.Linear(5, 3)
    options = OptimOptions(optimizer="ranger21", lr=1e-2, epochs=2, planned_steps=50)
    optimizer, _ = build_optimizer(options, model.parameters(), steps=130)
    rates = []
    for k in range(130):
        step(model, optimizer, k)
        rates.append(current_lr(optimizer))
    # Of 100 steps planned: warm-up over 22, from step 72 down to 3e-5 over 28, and there for good.
    down = [1e-2 - (1e-2 - 3e-5) * (k + 1) / 29 for k in range(28)]
    assert rates[:22] == pytest.approx([1e-2 * (k + 1) / 22 for k in range(22)])
    assert rates[22:71] == pytest.approx([1e-2] * 49)
    assert rates[71:99] == pytest.approx(down)
    assert rates[99:] == pytest.approx([3e-5] * 31)


# 7: not a multiple of Ranger21's look-ahead of 5, odd as its two momenta take turns, and within
# its warm-up; 16: in its warm-down.
@pytest.mark.parametrize("stop", [7, 16])
@pytest.mark.parametrize("name", ["adam", "ranger21"])
def test_state_survives_bit_for_bit(name: str, stop: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    options = OptimOptions(optimizer=name)  # type: ignore[arg-type]
    optimizer, _ = build_optimizer(options, model.parameters(), 20)
    for k in range(stop):
        step(model, optimizer, k)
    resumed = copy.deepcopy(model)
    resumed_optimizer, _ = build_optimizer(options, resumed.parameters(), 20)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(stop, 20):
        step(model, optimizer, k)
        step(resumed, resumed_optimizer, k)
        assert current_lr(optimizer) == current_lr(resumed_optimizer)
    assert_equal_nested(model.state_dict(), resumed.state_dict())
    assert_equal_nested(optimizer.state_dict(), resumed_optimizer.state_dict())


def test_the_rate_of_ranger21_is_told_of_a_training(train: Callable[..., Path]) -> None:
    run = train("run", "--optimizer", "ranger21", "--epochs", "3")
    first, _, last = [row["lr"] for row in rows(run)]
    assert 3e-5 < last < first == 1e-3
