"""A whole run: what it needs, its epochs, its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mocapsnet import CapsNet
from mocapsnet.train import (
    bundles,
    checkpoints,
    console,
    memory,
    model_folder,
    run_folder,
    start,
)
from mocapsnet.train.data import ImageSet
from mocapsnet.train.errors import Diverged, Failed, InputError, Interrupted, what_failed
from mocapsnet.train.evaluation import Evaluation, evaluate
from mocapsnet.train.metrics import MetricsLog, Row
from mocapsnet.train.optimizers import build_optimizer
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.plots import write_pictures
from mocapsnet.train.prepare import (
    build,
    load_data,
    make_accelerator,
    make_criterion,
    make_repeatable,
    network_config,
    settled,
)
from mocapsnet.train.trainer import Trainer


def train(options: TrainOptions) -> Path:
    """Train, or continue, as `options` (resolved) say.

    Returns: the run folder.
    Raises: InputError before anything is written; Diverged; Interrupted; Failed.
    """
    accelerator = make_accelerator(options.machine, options.optim.gradient_accumulation)
    make_repeatable(options.optim.seed)
    run = run_folder.choose(options)
    new = options.resume is None
    with ExitStack() as held:
        if not new:
            held.enter_context(run_folder.claimed(run, accelerator, new=False))
            if finished(run, options):
                if accelerator.is_main_process:
                    epochs = options.optim.epochs
                    print(f"{run} is finished, {epochs} of {epochs} epochs; give --epochs to go on")
                return run
        train_set, test_set = load_data(options.data, accelerator, options.optim.seed)
        if not new:
            run_folder.check_images(run, train_set)
        options = settled(options, train_set)
        _check_fit(options, train_set, accelerator)
        model = build(options, train_set)
        if new:
            held.enter_context(run_folder.claimed(run, accelerator, new=True))
        _train(options, run, accelerator, model, train_set, test_set)
    accelerator.end_training()
    return run


def finished(run: Path, options: TrainOptions) -> bool:
    """Whether a run has nothing left to do. Raises: InputError if it has done more than asked."""
    found = checkpoints.latest(run)
    if found is None:
        return False
    checkpoint, done = found
    if options.optim.epochs < done:
        raise InputError(
            f"--epochs {options.optim.epochs}: {run} has done {done} epochs already; give more to "
            "go on"
        )
    # The last thing that a run writes. One that was killed just before writes it when continued.
    card = run / model_folder.FOLDER / "README.md"
    written = (checkpoint / checkpoints.STATE, card, run / "confusion_matrix.png")
    if options.optim.epochs > done or not all(path.exists() for path in written):
        return False
    return card.stat().st_mtime >= written[-1].stat().st_mtime >= written[0].stat().st_mtime


def _check_fit(options: TrainOptions, train_set: ImageSet, accelerator: Accelerator) -> None:
    parts = accelerator.num_processes * options.optim.gradient_accumulation
    images = -(-min(options.optim.batch_size, len(train_set)) // parts)
    config = network_config(options, train_set)
    memory.check_fit(config, options.optim, images, accelerator.device)


def _train(
    options: TrainOptions,
    run: Path,
    accelerator: Accelerator,
    bare_model: CapsNet,
    train_set: ImageSet,
    test_set: ImageSet,
) -> None:
    """The epochs of a run, from its last checkpoint, and its end."""
    batch_size, epochs = options.optim.batch_size, options.optim.epochs
    target = options.optim.reconstruction_target
    steps_per_epoch = -(-len(train_set) // batch_size)
    optimizer, schedules = build_optimizer(
        options.optim, bare_model.parameters(), epochs * steps_per_epoch
    )
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    state = checkpoints.State(bare_model, optimizer, schedules.epoch or schedules.step)
    found = checkpoints.latest(run)
    if found is not None:
        checkpoint, epochs_done = found
        checkpoints.restore(checkpoint, state)
    else:
        checkpoint, epochs_done = checkpoints.folder(run, 0), 0
    accelerator.wait_for_everyone()
    log = None
    if accelerator.is_main_process:
        run_folder.write_config(run, options, train_set)
        if found is None:  # also a run that is stopped in its first epoch can be resumed
            if options.bundles:
                bundles.record(run, bare_model, train_set, options.optim, 0)
            checkpoints.save(state, run, 0)
        log = MetricsLog(run, epochs_done)
        console.describe(
            options, bare_model, len(train_set), len(test_set), accelerator, run, epochs_done
        )

    criterion = make_criterion(options)
    trainer = Trainer(
        accelerator,
        model,
        criterion,
        optimizer,
        train_set,
        bare_model.preprocessing,
        options,
        schedules.step,
    )
    if log is not None and epochs_done == 0:
        start.write(run, trainer, bare_model)
    tested: Evaluation | None = None
    epoch = epochs_done
    resume = f"mocapsnet train --resume {run}"
    try:
        with terminate_as_interrupt():
            for epoch in range(epochs_done, epochs):
                row = trainer.epoch(epoch, f"last good checkpoint: {checkpoint}")
                if schedules.epoch is not None:
                    schedules.epoch.step()
                tested = evaluate(accelerator, bare_model, criterion, test_set, batch_size, target)
                row |= tested.row()
                _check_finite(bare_model, tested, row, checkpoint)
                if log is not None:
                    log.append(row)
                    start.note_losses(run, epoch, trainer.steps, len(train_set), batch_size)
                    left = trainer.clock.left(len(train_set) * (epochs - epoch - 1))
                    print(console.summary(row, epochs, left), flush=True)
                    if options.bundles:
                        bundles.record(run, bare_model, train_set, options.optim, epoch + 1)
                    checkpoints.save(state, run, epoch + 1)
                    model_folder.write(run, bare_model, options, tested.accuracy, epoch + 1)
                checkpoint = checkpoints.folder(run, epoch + 1)
                accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped in epoch {epoch + 1}; continue with: {resume}") from None
    except Exception as error:
        said = what_failed(error)
        if said is None:
            raise
        raise Failed(
            f"{said}; stopped in epoch {epoch + 1}. The last checkpoint, {checkpoint}, is whole; "
            f"continue with: {resume}"
        ) from error
    if tested is None:
        tested = evaluate(accelerator, bare_model, criterion, test_set, batch_size, target)
    if log is not None:
        log.close()
        write_pictures(run, log.rows, bare_model, test_set, tested)
        model_folder.write(run, bare_model, options, tested.accuracy, epochs)
        console.list_folder(run)


def _check_finite(model: nn.Module, tested: Evaluation, row: Row, checkpoint: Path) -> None:
    """Keep a state that is not finite from becoming a checkpoint."""
    weights = torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all()
    if not (weights and torch.isfinite(torch.tensor(tested.loss))):
        raise Diverged(
            f"after step {row['step']} (epoch {row['epoch']}) the weights or the test loss are not "
            f"finite: test loss {tested.loss}, margin {tested.margin}, reconstruction "
            f"{tested.reconstruction}; last good checkpoint: {checkpoint}"
        )


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, as sent by job schedulers and torchrun, end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Not by raising SIGINT, which a shell lets its background processes ignore.
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
