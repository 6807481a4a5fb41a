"""How long an experiment will take."""

from __future__ import annotations

from typing import Any

import pytest

from mocapsnet.train.experiments import estimate, runs, schedule
from mocapsnet.train.experiments.states import State

from .helpers import GRID, OWN, parsed, runs_of


def test_time_is_a_line_between_the_fewest_and_the_most_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = []

    def time_steps(options: Any, images: Any, where: Any) -> tuple[float, float]:
        timed.append(options.model.blocks)
        return 1.0 + options.model.blocks, 0.5

    monkeypatch.setattr(estimate, "time_steps", time_steps)
    found = parsed(OWN | {"cases": [], "grid": GRID | {"blocks": [1, 2, 5], "seed": [0, 1]}})
    mine = runs_of(found, epochs=2)
    every = {run.name: State("missing") for run in mine}
    guesses = estimate.estimate(mine, every, schedule.place(1, "cpu"), lambda _: None)
    assert sorted(timed) == [1, 5]
    start = guesses[mine[0].name].seconds - 2 * (2.0 * 1 + 0.5 * 1)
    for run in mine:
        expected = start + 2 * ((1.0 + run.keys["blocks"]) * 1 + 0.5 * 1)
        assert guesses[run.name].seconds == pytest.approx(expected)
    assert guesses["digits-mocapsnet-blocks-2-seed-1"].source == "3 steps with 1 and with 5 blocks"


def test_steps_are_timed_with_the_real_network() -> None:
    images = estimate.Images(16, 16, (1, 8, 8), tuple("0123456789"))
    for precision in ("no", "bf16"):  # in one process, which has one of Accelerate's states
        (run, _) = runs_of(parsed(), device="cpu", mixed_precision=precision)
        step, test = estimate.time_steps(run.options, images, schedule.place(1, "cpu"))
        assert 0 < step < 10 and 0 < test < 10


def test_folders_of_images_are_data_sets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a": estimate.Images(1600, 16, (1, 28, 28), tuple("01"))}
    sizes["b"] = estimate.Images(3200, 16, (3, 32, 32), tuple("01"))
    found = parsed(OWN | {"cases": [], "grid": GRID | {"dataset": ["digits", "mnist"]}})
    folders = {"digits": "a", "mnist": "b"}
    mine = runs.build(found, runs.select(found, {}), {"epochs": 1, "limit": 10**6}, folders)
    monkeypatch.setattr(estimate, "_images", lambda options: sizes[options.data.data_dir])
    monkeypatch.setattr(estimate, "time_steps", lambda *_: (1.0, 0.0))
    every = {run.name: State("missing") for run in mine}
    guesses = estimate.estimate(mine, every, schedule.place(1, "cpu"), lambda _: None)
    first, second = (guesses[run.name].seconds for run in mine)
    assert second - first == pytest.approx(100)  # steps of 16 images
    assert estimate.disk(mine) > estimate.disk(mine[:1]) > 0
