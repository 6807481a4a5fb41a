"""How long runs will take: from their epochs so far, else from a few steps of the real network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.state import AcceleratorState

from mocapsnet.train import data, graph
from mocapsnet.train.errors import InputError
from mocapsnet.train.evaluation import evaluate
from mocapsnet.train.experiments.runs import Run
from mocapsnet.train.experiments.schedule import Place
from mocapsnet.train.experiments.states import State
from mocapsnet.train.memory import KEPT
from mocapsnet.train.optimizers import build_optimizer, parameter_groups
from mocapsnet.train.option_values import flat
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.prepare import build, make_accelerator, make_criterion, network_config
from mocapsnet.train.trainer import Trainer

# Training and test images of the data sets with a name.
COUNTS = {
    "digits": (1347, 450),
    "mnist": (60_000, 10_000),
    "fashion-mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}

# Steps that are timed, after one that is not.
STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """Seconds that a run still takes, and how they were found."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Images:
    """What a data set is for a step: counts, shape, classes."""

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]


def estimate(
    runs: list[Run],
    states: dict[str, State],
    where: Place,
    tell: Callable[[str], None],
) -> dict[str, Estimate]:
    """Estimate what each run that is not finished still takes.

    Epochs of the same options but for the seed are the best measure, though tests are not counted
    in them. Else steps are timed, on
    random images, with the fewest and the most blocks; between them time is a straight line. A
    process takes as long to start as this one did.

    Args:
        tell: is told what is measured.
    """
    start = time.time() - psutil.Process().create_time()
    known: dict[Any, float] = {}
    for run in runs:
        seconds = states[run.name].seconds
        if seconds is not None:
            known.setdefault(_alike(run.options), seconds)
    images: dict[Any, Images] = {}
    measured: dict[Any, tuple[float, float]] = {}
    found: dict[str, Estimate] = {}
    for run in runs:
        state = states[run.name]
        if state.kind in ("finished", "other"):
            continue
        left = run.options.optim.epochs - state.epochs
        per_epoch = known.get(_alike(run.options))
        if per_epoch is not None:
            found[run.name] = Estimate(start + left * per_epoch, "its epochs")
            continue
        source = (run.options.data.dataset, run.options.data.data_dir)
        if source not in images:
            images[source] = _images(run.options)
        per_epoch, how = _between(run, runs, images[source], where, measured, tell)
        found[run.name] = Estimate(start + left * per_epoch, how)
    return found


def _alike(options: TrainOptions) -> tuple[Any, ...]:
    """What the time of an epoch depends on."""
    ignored = {"optim.seed", "optim.epochs", "optim.lr", "data.download", "out"}
    if options.data.dataset != "folder":
        ignored.add("data.data_dir")
    return tuple((k, v) for k, v in flat(options).items() if k not in ignored)


def _between(
    run: Run,
    runs: list[Run],
    images: Images,
    where: Place,
    measured: dict[Any, tuple[float, float]],
    tell: Callable[[str], None],
) -> tuple[float, str]:
    """Seconds of an epoch of a run, from steps with the fewest and the most blocks."""

    def with_blocks(blocks: int) -> TrainOptions:
        model = dataclasses.replace(run.options.model, blocks=blocks)
        return dataclasses.replace(run.options, model=model)

    def seconds(blocks: int) -> float:
        options = with_blocks(blocks)
        key = _alike(options)
        if key not in measured:
            tell(f"timing {STEPS} steps of {run.name.partition('-blocks-')[0]}, {blocks} block(s)")
            measured[key] = time_steps(options, images, where)
        step, test = measured[key]
        limit, batch = options.data.limit, options.optim.batch_size
        train_images = min(images.train, limit or images.train)
        test_images = min(images.test, limit or images.test)
        return step * -(-train_images // batch) + test * -(-test_images // batch)

    ours = _alike(with_blocks(0))
    blocks = sorted(
        {
            other.options.model.blocks
            for other in runs
            if _alike(
                dataclasses.replace(
                    other.options, model=dataclasses.replace(other.options.model, blocks=0)
                )
            )
            == ours
        }
    )
    low, high, own = blocks[0], blocks[-1], run.options.model.blocks
    if own in (low, high):
        return seconds(own), f"{STEPS} steps"
    share = (own - low) / (high - low)
    return (1 - share) * seconds(low) + share * seconds(high), (
        f"{STEPS} steps with {low} and with {high} blocks"
    )


def _images(options: TrainOptions) -> Images:
    """A data set with a name is known; a folder is read."""
    name = options.data.dataset
    if name in COUNTS:
        classes = tuple(map(str, range(100 if name == "cifar100" else 10)))
        return Images(*COUNTS[name], data.SHAPES[name], classes)
    train, test = data.load(options.data)
    return Images(len(train), len(test), train.image_shape, train.classes)


def time_steps(options: TrainOptions, images: Images, where: Place) -> tuple[float, float]:
    """Seconds of an optimiser step and of a batch of tests, on random images.

    The network, its optimiser and the loop are those of a training.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(where.threads)
    try:
        return _time_steps(options, images)
    finally:
        torch.set_num_threads(threads)


def _time_steps(options: TrainOptions, images: Images) -> tuple[float, float]:
    batch = options.optim.batch_size
    # Accelerate has one device and one precision in a process; another run may have another.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(options.machine, options.optim.gradient_accumulation)
    noise = np.random.default_rng(0)

    def random_images(count: int) -> data.ImageSet:
        pixels = noise.integers(0, 256, (count, *images.shape), np.uint8)
        labels = noise.integers(0, len(images.classes), count)
        files = ("random images", "random images")
        return data.image_set(pixels, labels, images.classes, files).to(accelerator.device)

    first, several = random_images(batch), random_images(batch * STEPS)
    model = build(options, first)
    groups = parameter_groups(options.optim, model)
    optimizer, _ = build_optimizer(options.optim, groups, 1000, accelerator.device)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    criterion = make_criterion(options)
    graphed = graph.why_eager(options, accelerator, batch) is None

    def trainer(images: data.ImageSet) -> Trainer:
        how = model.preprocessing, options
        return Trainer(accelerator, prepared, criterion, optimizer, images, *how, graphed=graphed)

    timed = trainer(several)
    warm = timed if graphed else trainer(first)  # a graph is captured for the images it trains with
    warm.epoch(0, "")
    row = timed.epoch(0, "")
    for _ in range(2):  # the first is not timed
        started = time.perf_counter()
        evaluate(accelerator, model, criterion, first, batch)
        tested = time.perf_counter() - started
    accelerator.free_memory()
    return row["train_seconds"] / STEPS, tested


def disk(runs: list[Run]) -> int:
    """Bytes that the checkpoints and networks of runs take when they are finished."""
    total = 0
    known: dict[Any, Images] = {}
    for run in runs:
        source = run.options.data.dataset, run.options.data.data_dir
        try:
            images = known[source] = known.get(source) or _images(run.options)
        except InputError:  # a folder that is gone
            continue
        pixels = np.zeros((1, *images.shape), np.uint8)
        config = network_config(run.options, data.image_set(pixels, [0], images.classes, ("", "")))
        # Weights twice, in the checkpoint and in the model, and the optimiser's numbers.
        total += 4 * KEPT[run.options.optim.optimizer] * config.parameters
    return total
