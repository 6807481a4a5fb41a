"""One epoch of training.

A batch is `batch_size` images over all processes and micro-batches. Which images, in which order
and how cropped is drawn once for all processes; each takes its slice. The loss is a sum over
images, so the gradient of a batch is the sum over slices whatever their sizes, and a run gives the
same result, but for rounding, however its batches are split.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from mocapsnet import CapsuleLoss, Preprocessing
from mocapsnet.train import console, data, graph
from mocapsnet.train.errors import Diverged
from mocapsnet.train.metrics import Row
from mocapsnet.train.optimizers import current_lr
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.stopping import Stopper

# On a GPU, reading the losses waits for the device, so they are read once in so many steps.
STEPS_PER_CHECK = 20


@dataclass(frozen=True)
class Position:
    """How far an epoch has come.

    Attributes:
        steps: what each of its steps found [steps, 4], see `Trainer`.
        lr: the learning rate at its start.
        seconds: that these steps took.
    """

    steps: Tensor
    lr: float
    seconds: float


@dataclass
class Trainer:
    """What an epoch works with.

    Attributes:
        steps: of the last epoch, for each of its steps the total, margin and reconstruction loss
            and the correct predictions, summed over its images [steps, 4].
        position: how far the epoch is, between two steps; None while weights are changing, and on a
            GPU in steps whose losses have not been read yet.
    """

    accelerator: Accelerator
    model: nn.Module
    criterion: CapsuleLoss
    optimizer: torch.optim.Optimizer
    train_set: data.ImageSet
    preprocessing: Preprocessing
    options: TrainOptions
    schedule: LRScheduler | None = None
    """Of the learning rate, if it changes with every step."""
    graphed: bool = False
    """Whether steps on whole batches are one CUDA graph, which the first of them captures; see
    graph.py. One that cannot be captured makes it False."""
    clock: console.Clock = field(default_factory=console.Clock)
    steps: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    position: Position | None = None
    stopper: Stopper = field(default_factory=Stopper)
    _graph: graph.Graph | None = None

    def epoch(
        self,
        epoch: int,
        last_good: str,
        begun: Position | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Row:
        """One pass over the training images.

        Args:
            epoch: 0 for the first.
            last_good: text for the message of Diverged.
            begun: where to go on in it.
            between: called whenever `position` is known.
        Returns: the epoch's training numbers; losses and accuracy are means per image.
        Raises: Diverged at the latest STEPS_PER_CHECK steps after a loss that is not finite;
            KeyboardInterrupt, with `position` known, if the stopper of any process is asked.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        batch_size = self.options.optim.batch_size
        count = len(self.train_set)
        self._seed(epoch)
        views = data.epoch_views(count, self.options.data, self.options.optim.seed, epoch)
        batches = views.to(device).split(batch_size)
        sums = torch.zeros(len(batches), 4, device=device)
        every = 1 if device.type == "cpu" else STEPS_PER_CHECK
        begun = begun or Position(torch.zeros(0, 4), current_lr(self.optimizer), 0.0)
        seen = len(begun.steps)
        self.steps = torch.zeros(len(batches), 4, dtype=torch.float64)
        self.steps[:seen] = begun.steps
        self.position = begun if seen else None
        totals = self.steps.sum(0)
        started = time.perf_counter() - begun.seconds
        self.model.train()
        done_images = min(seen * batch_size, count)
        still = count * (self.options.optim.epochs - epoch) - done_images
        self.clock.start()
        text = f"epoch {epoch + 1}/{self.options.optim.epochs}"
        progress = console.Progress(text, count, accelerator.is_main_process, done_images)
        facts = ""
        with progress:
            for step in range(seen, len(batches)):
                batch = batches[step]
                images = len(batch.indices)
                self.position = None
                sums[step] = self._step(batch, epoch, step)
                self.clock.add(images)
                still -= images
                if (step + 1) % every == 0 or step + 1 == len(batches):
                    # and whether a process is asked to stop, so that all stop at the same step
                    wish = sums.new_tensor([[float(self.stopper.asked), 0, 0, 0]])
                    found = torch.cat([wish, sums[seen : step + 1]])
                    found = accelerator.reduce(found, "sum").cpu().double()
                    asked, done = bool(found[0].any()), found[1:]
                    self._stop_if_not_finite(done, epoch * len(batches) + seen, epoch, last_good)
                    totals += done.sum(0)
                    self.steps[seen : step + 1] = done
                    seen = step + 1
                    done_images = min(seen * batch_size, count)
                    facts = (
                        f"loss {totals[0] / done_images:.4f}, "
                        f"accuracy {totals[3] / done_images:.2%}, "
                        f"whole run {self.clock.left(still)} left"
                    )
                progress.update(images, facts)
                if seen == step + 1:
                    seconds = time.perf_counter() - started
                    self.position = Position(self.steps[:seen], begun.lr, seconds)
                    between()
                    if asked:
                        self.stopper.asked = True
                        if seen < len(batches):
                            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        means = (self.steps.sum(0) / count).tolist()  # in one order, however often it was stopped
        return {
            "epoch": epoch + 1,
            "step": (epoch + 1) * len(batches),
            "lr": begun.lr,
            "train_loss": means[0],
            "train_margin": means[1],
            "train_reconstruction": means[2],
            "train_accuracy": means[3],
            "train_images_per_second": count / seconds,
            "train_seconds": seconds,
        }

    def _seed(self, epoch: int) -> None:
        """Whatever draws random numbers in an epoch draws the same ones after a resume."""
        process = self.accelerator.process_index
        source = np.random.SeedSequence([self.options.optim.seed, epoch, process + 1])
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))

    def _step(self, batch: data.Views, epoch: int, step: int) -> Tensor:
        """One optimiser step on this process's share of a batch; returns the share's sums [4]."""
        sums = None
        if self.graphed and len(batch.indices) == self.options.optim.batch_size:
            sums = self._replay(batch, epoch, step)
        if sums is None:
            sums = self._eagerly(batch, epoch, step)
        if self.schedule is not None:
            self.schedule.step()
        return sums

    def _replay(self, batch: data.Views, epoch: int, step: int) -> Tensor | None:
        """`_eagerly` by the graph; None, with nothing done, if the step cannot be captured."""
        inputs: tuple[Tensor, ...] = batch
        if self.options.data.mix != "none":  # torchvision draws how in Python
            ((_, *mixture),) = self.shares(batch, 1, epoch, step)
            inputs = tuple(mixture)
        if self._graph is None:
            optimizer: Any = self.optimizer  # Accelerate's, around a FusedAdam
            try:
                self._graph = graph.capture(self._captured, inputs, self.model, optimizer.optimizer)
            except Exception as error:  # whatever a driver or a compiler may raise
                reason = (str(error).splitlines() or ["no reason given"])[0]
                failure = f"{type(error).__name__}: {reason}"
        if self._graph is None:
            self.graphed = False
            tqdm.write(
                "mocapsnet: warning: a training step could not be captured as a CUDA graph, so "
                f"training goes on without ({failure})",
                file=sys.stderr,
            )
            return None
        return self._graph(*inputs)

    def _captured(self, *inputs: Tensor) -> Tensor:
        """What the graph repeats: `_eagerly` for a whole batch, without Accelerate, whose factors
        are all 1 then. Images are chosen and cropped within the graph, and mixed before it.

        Args:
            inputs: those of `data.Views`; pixels and labels, if images are mixed.
        """
        if self.options.data.mix == "none":
            views = data.Views(*inputs)
            pixels = data.view(self.train_set, views, self.options.data.pad)
            labels = self.train_set.labels[views.indices]
        else:
            pixels, labels = inputs
        total, parts = self.losses(self.model, pixels, labels)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return parts

    def _eagerly(self, batch: data.Views, epoch: int, step: int) -> Tensor:
        """A step, operation by operation, with as many shares and micro-batches as there are."""
        accelerator = self.accelerator
        processes, micro_batches = (
            accelerator.num_processes,
            accelerator.gradient_accumulation_steps,
        )
        sums = torch.zeros(4, device=accelerator.device)
        own = slice(accelerator.process_index, None, processes)
        parts_of_all = processes * micro_batches
        for weight, pixels, labels in self.shares(batch, parts_of_all, epoch, step, own):
            with accelerator.accumulate(self.model):
                total, parts = self.losses(self.model, pixels, labels)
                # Accelerate divides by the number of micro-batches, and data parallelism averages
                # over the processes; the gradient wanted is that of the sum.
                accelerator.backward(total * (weight * processes * micro_batches))
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += weight * parts
        return sums

    def losses(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of these images, and without gradients: total, margin and reconstruction loss
        and correct predictions, all summed over the images [4]."""
        optim = self.options.optim
        images = self.preprocessing(pixels)
        out = model(images, labels if optim.decoder_mask == "label" else None)
        target = pixels if optim.reconstruction_target == "pixels" else images
        loss = self.criterion(out, target, labels)
        largest = labels if labels.dim() == 1 else labels.argmax(1)  # of a mixture
        correct = (out.lengths.argmax(1) == largest).sum()
        parts = [loss.total, loss.margin, loss.reconstruction, correct]
        return loss.total, torch.stack([part.detach().float() for part in parts])

    def shares(
        self, batch: data.Views, count: int, epoch: int, step: int, which: slice = slice(None)
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Weight, pixels and labels of some of the shares of a batch that is split into `count`.

        Every process has to take part in the exchange of gradients, so where a small last batch
        leaves it without images it works on one with weight zero. Images are mixed before the batch
        is split, so that mixtures do not depend on how it is.
        """
        options, labels = self.options.data, self.train_set.labels
        if options.mix == "none":
            for share in batch.shares(count)[which]:
                weight = 1.0 if len(share.indices) else 0.0
                share = share if weight else batch.first()
                pixels = data.view(self.train_set, share, options.pad)
                yield weight, pixels, labels[share.indices]
            return
        pixels = data.view(self.train_set, batch, options.pad)
        classes, seed = len(self.train_set.classes), self.options.optim.seed
        pixels, present = data.mixed(
            pixels, labels[batch.indices], classes, options.mix, seed, epoch, step
        )
        parts = list(zip(pixels.tensor_split(count), present.tensor_split(count), strict=True))
        for part in parts[which]:
            weight = 1.0 if len(part[0]) else 0.0
            yield weight, *(part if weight else (pixels[:1], present[:1]))

    def _stop_if_not_finite(self, sums: Tensor, first: int, epoch: int, last_good: str) -> None:
        bad = (~sums.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            total, margin, reconstruction, _ = sums[bad[0]].tolist()
            raise Diverged(
                f"the loss is not finite at step {first + int(bad[0]) + 1} (epoch {epoch + 1}): "
                f"total {total}, margin {margin}, reconstruction {reconstruction}; {last_good}"
            )
