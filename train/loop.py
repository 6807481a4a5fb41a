"""The training loop.

A batch is `batch_size` images over all processes and micro-batches. Which images, in which order
and how cropped is drawn once for all processes; each takes its slice. The loss is a sum over
images, so the gradient of a batch is the sum over slices whatever their sizes, and a run gives the
same result, but for rounding, however its batches are split.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from mocapsnet import CapsuleLoss
from mocapsnet.train import checkpoints, console, data, model_folder
from mocapsnet.train.errors import Diverged, Interrupted
from mocapsnet.train.evaluation import Evaluation, evaluate
from mocapsnet.train.metrics import MetricsLog, Row
from mocapsnet.train.optimizers import build_optimizer, current_lr
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.plots import write_pictures
from mocapsnet.train.prepare import (
    build,
    load_data,
    make_accelerator,
    make_repeatable,
    new_run_folder,
)

# On a GPU, reading the losses waits for the device, so they are read once in so many steps.
STEPS_PER_CHECK = 20


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
    if schedule is not None:
        accelerator.register_for_checkpointing(schedule)
    checkpoints.keep_unwrapped(accelerator)

    if options.resume is not None:
        run = Path(options.resume)
        checkpoint, epochs_done = checkpoints.latest(run)
        checkpoints.restore(accelerator, checkpoint, bare_model)
    else:
        # Also a run that is stopped in its first epoch can be resumed.
        run, epochs_done = new_run_folder(options, accelerator), 0
        checkpoint = checkpoints.save(accelerator, run, 0)
    log = None
    if accelerator.is_main_process:
        checkpoints.write_config(run, options)
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
                    print(console.summary(row, epochs), flush=True)
                checkpoint = checkpoints.save(accelerator, run, epoch + 1)
                if log is not None:
                    model_folder.write(run, bare_model, options, tested.accuracy, epoch + 1)
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


@dataclass
class Trainer:
    """What an epoch works with."""

    accelerator: Accelerator
    model: nn.Module
    criterion: CapsuleLoss
    optimizer: torch.optim.Optimizer
    train_set: data.ImageSet
    options: TrainOptions

    def epoch(self, epoch: int, last_good: str) -> Row:
        """One pass over the training images.

        Args:
            epoch: 0 for the first.
            last_good: text for the message of Diverged.
        Returns: the epoch's training numbers; losses and accuracy are means per image.
        Raises: Diverged at the latest STEPS_PER_CHECK steps after a loss that is not finite.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        batch_size, pad = self.options.optim.batch_size, self.options.data.pad
        count = len(self.train_set)
        order, offsets = data.epoch_order(count, pad, self.options.optim.seed, epoch)
        batches = list(
            zip(
                order.to(device).split(batch_size),
                offsets.to(device).split(batch_size),
                strict=True,
            )
        )
        # Per step: total, margin and reconstruction loss and correct predictions, all summed.
        sums = torch.zeros(len(batches), 4, device=device)
        every = 1 if device.type == "cpu" else STEPS_PER_CHECK
        totals = torch.zeros(4, dtype=torch.float64)
        lr, seen = current_lr(self.optimizer), 0
        started = time.perf_counter()
        self.model.train()
        # disable=None: no bar where the output is not a terminal.
        bar = tqdm(
            total=count,
            desc=f"epoch {epoch + 1}/{self.options.optim.epochs}",
            unit=" images",
            leave=False,
            disable=None if accelerator.is_main_process else True,
        )
        with bar:
            for step, (indices, crops) in enumerate(batches):
                sums[step] = self._step(indices, crops)
                if (step + 1) % every == 0 or step + 1 == len(batches):
                    done = accelerator.reduce(sums[seen : step + 1], "sum").cpu().double()
                    self._stop_if_not_finite(done, epoch * len(batches) + seen, epoch, last_good)
                    totals += done.sum(0)
                    seen = step + 1
                    images = min(seen * batch_size, count)
                    bar.set_postfix(
                        loss=f"{totals[0] / images:.4f}",
                        accuracy=f"{totals[3] / images:.2%}",
                        refresh=False,
                    )
                bar.update(len(indices))
        seconds = time.perf_counter() - started
        means = (totals / count).tolist()
        return {
            "epoch": epoch + 1,
            "step": (epoch + 1) * len(batches),
            "lr": lr,
            "train_loss": means[0],
            "train_margin": means[1],
            "train_reconstruction": means[2],
            "train_accuracy": means[3],
            "train_images_per_second": count / seconds,
            "train_seconds": seconds,
        }

    def _step(self, indices: Tensor, crops: Tensor) -> Tensor:
        """One optimiser step on this process's share of a batch; returns the share's sums [4]."""
        accelerator = self.accelerator
        processes, micro_batches = (
            accelerator.num_processes,
            accelerator.gradient_accumulation_steps,
        )
        sums = torch.zeros(4, device=accelerator.device)
        shares = list(
            zip(
                indices.tensor_split(processes * micro_batches),
                crops.tensor_split(processes * micro_batches),
                strict=True,
            )
        )
        for share, crop in shares[accelerator.process_index :: processes]:
            # Every process has to take part in the exchange of gradients, so where a small last
            # batch leaves it without images it works on one with weight zero.
            weight = 1.0 if len(share) else 0.0
            if not len(share):
                share, crop = indices[:1], crops[:1]
            with accelerator.accumulate(self.model):
                images, pixels, labels = data.training_batch(
                    self.train_set, share, crop, self.options.data.pad
                )
                out = self.model(images, labels)
                loss = self.criterion(out, pixels, labels)
                # Accelerate divides by the number of micro-batches, and data parallelism averages
                # over the processes; the gradient wanted is that of the sum.
                accelerator.backward(loss.total * (weight * processes * micro_batches))
                self.optimizer.step()
                self.optimizer.zero_grad()
            correct = (out.lengths.argmax(1) == labels).sum()
            parts = [loss.total, loss.margin, loss.reconstruction, correct]
            sums += weight * torch.stack([part.detach().float() for part in parts])
        return sums

    def _stop_if_not_finite(self, sums: Tensor, first: int, epoch: int, last_good: str) -> None:
        bad = (~sums.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            total, margin, reconstruction, _ = sums[bad[0]].tolist()
            raise Diverged(
                f"the loss is not finite at step {first + int(bad[0]) + 1} (epoch {epoch + 1}): "
                f"total {total}, margin {margin}, reconstruction {reconstruction}; {last_good}"
            )


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
