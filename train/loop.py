"""A whole run: what it needs, its epochs, its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mocapsnet import CapsuleLoss
from mocapsnet.train import checkpoints, console, model_folder
from mocapsnet.train.errors import Diverged, Interrupted
from mocapsnet.train.evaluation import Evaluation, evaluate
from mocapsnet.train.metrics import MetricsLog, Row
from mocapsnet.train.optimizers import build_optimizer
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.plots import write_pictures
from mocapsnet.train.prepare import (
    build,
    load_data,
    make_accelerator,
    make_repeatable,
    new_run_folder,
)
from mocapsnet.train.run_folder import write_config
from mocapsnet.train.trainer import Trainer


def train(options: TrainOptions) -> Path:
    """Train, or continue, as `options` (resolved) say.

    Returns: the run folder.
    Raises: InputError before anything is written; Diverged; Interrupted.
    """
    accelerator = make_accelerator(options.machine, options.optim.gradient_accumulation)
    make_repeatable(options.optim.seed)
    train_set, test_set = load_data(options.data, accelerator)
    model = build(options, train_set)
    batch_size, epochs = options.optim.batch_size, options.optim.epochs
    steps_per_epoch = -(-len(train_set) // batch_size)
    optimizer, schedule = build_optimizer(
        options.optim, model.parameters(), epochs * steps_per_epoch
    )
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    state = checkpoints.State(bare_model, optimizer, schedule)
    if options.resume is not None:
        run = Path(options.resume)
        checkpoint, epochs_done = checkpoints.latest(run)
        checkpoints.restore(checkpoint, state)
    else:
        # Also a run that is stopped in its first epoch can be resumed.
        run, epochs_done = new_run_folder(options, accelerator), 0
        checkpoint = checkpoints.folder(run, 0)
    log = None
    if accelerator.is_main_process:
        write_config(run, options)
        if options.resume is None:
            checkpoints.save(state, run, 0)
        log = MetricsLog(run, epochs_done)
        console.describe(
            options, bare_model, len(train_set), len(test_set), accelerator, run, epochs_done
        )

    criterion = CapsuleLoss(options.optim.reconstruction_weight)
    trainer = Trainer(accelerator, model, criterion, optimizer, train_set, options)
    tested: Evaluation | None = None
    epoch = epochs_done
    try:
        with _terminate_as_interrupt():
            for epoch in range(epochs_done, epochs):
                row = trainer.epoch(epoch, f"last good checkpoint: {checkpoint}")
                if schedule is not None:
                    schedule.step()
                tested = evaluate(accelerator, bare_model, criterion, test_set, batch_size)
                row |= tested.row()
                _check_finite(bare_model, tested, row, checkpoint)
                if log is not None:
                    log.append(row)
                    left = trainer.clock.left(len(train_set) * (epochs - epoch - 1))
                    print(console.summary(row, epochs, left), flush=True)
                    checkpoints.save(state, run, epoch + 1)
                    model_folder.write(run, bare_model, options, tested.accuracy, epoch + 1)
                checkpoint = checkpoints.folder(run, epoch + 1)
                accelerator.wait_for_everyone()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped in epoch {epoch + 1}; continue with: mocapsnet train --resume {run}"
        ) from None
    if tested is None:
        tested = evaluate(accelerator, bare_model, criterion, test_set, batch_size)
    if log is not None:
        log.close()
        write_pictures(run, log.rows, bare_model, test_set, tested)
        model_folder.write(run, bare_model, options, tested.accuracy, max(epochs, epochs_done))
        console.list_folder(run)
    accelerator.end_training()
    return run


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
def _terminate_as_interrupt() -> Iterator[None]:
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
