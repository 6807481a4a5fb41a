"""Training steps as one CUDA graph, played on the CPU, see fake_graph.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import fake_graph
from .helpers import assert_same_run

Train = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]

# Batches of 16, 16 and 8 images.
SHORT = ("--limit", "40", "--epochs", "2", "--track")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> list[fake_graph.CUDAGraph]:
    return fake_graph.install(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        # A fused stack; the rate falls with each epoch.
        "",
        # Layers that are called again, from anchors; the rate changes with each step.
        "--blocks 2 --anchor-every 2 --method sda --sda-mean batch --routing-grad full --bias 0.1 "
        "--schedule cosine --weight-decay 0.1 --flip --crop resized --normalisation fixed "
        "--mixed-precision bf16",
        # Images mixed before the graph; labels that are shares; the published code's blocks.
        "--mix both --skip twice --velocity block --memory stored --decoder-mask prediction",
        "--model cnn --mix mixup",
    ],
)
def test_a_graphed_run_is_the_eager_one(
    options: str, train: Train, graphs: list[fake_graph.CUDAGraph]
) -> None:
    eager = train("eager", *SHORT, *options.split(), "--graph", "off")
    assert not graphs
    graphed = train("graphed", *SHORT, *options.split())
    assert_same_run(eager, graphed)
    (graph,) = graphs
    assert graph.replays == 3 + 2 * 2  # the short batch of each epoch goes eagerly
