"""A whole run: what it needs, its epochs, its end."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from mocapsnet import CapsNet
from mocapsnet.train import (
    bundles,
    checkpoints,
    console,
    graph,
    memory,
    model_folder,
    result,
    run_folder,
    start,
    tracking,
)
from mocapsnet.train.best import Best, better, gave_up
from mocapsnet.train.data import ImageSet, hold_out
from mocapsnet.train.errors import Diverged, Failed, InputError, Interrupted, what_failed
from mocapsnet.train.evaluation import Evaluation, evaluate
from mocapsnet.train.metrics import MetricsLog, Row, read_rows
from mocapsnet.train.optimizers import build_optimizer, parameter_groups
from mocapsnet.train.option_values import RESNET
from mocapsnet.train.options import TrainOptions
from mocapsnet.train.plots import write_pictures
from mocapsnet.train.prepare import (
    agree,
    build,
    load_data,
    make_accelerator,
    make_criterion,
    make_repeatable,
    network_config,
    settled,
)
from mocapsnet.train.start_from import seen_before, take_weights
from mocapsnet.train.trainer import Position, Trainer

CHECKPOINT_EVERY = 600.0
"""Seconds after which the state within an epoch is kept, in case that the machine fails."""


SAY_EVERY = 60.0
"""Seconds after which a training says that it still holds its folder."""


@dataclass(frozen=True)
class Images:
    """The images of a run; those to validate with, where some are held out."""

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet

    def judging(self) -> tuple[str, ImageSet]:
        """What every epoch is judged by, and its name."""
        return ("test", self.test) if self.validation is None else ("validation", self.validation)

    def counts(self) -> dict[str, int]:
        sets = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: len(images) for name, images in sets.items() if images is not None}


def train(options: TrainOptions) -> Path:
    """Train, or continue, as `options` (resolved) say.

    Returns: the run folder.
    Raises: InputError before anything is written; Diverged; Interrupted; Failed.
    """
    tracking.check(options.watch.track)
    accelerator = make_accelerator(options.machine, options.optim.gradient_accumulation)
    make_repeatable(options.optim.seed)
    run = run_folder.choose(options)
    new = options.resume is None
    with ExitStack() as held:
        if not new:
            held.enter_context(run_folder.claimed(run, accelerator, new=False))
            ended = finished(run, options)
            if ended is not None:
                if accelerator.is_main_process:
                    print(ended)
                return run
        images = _images(options, accelerator)
        if not new:
            run_folder.check_images(run, images.train, images.test)
        options = settled(options, images.train)
        _check_fit(options, images.train, accelerator)
        eager = graph.why_eager(options, accelerator, len(images.train))
        model = build(options, images.train)
        if options.start_from is not None and (new or checkpoints.latest(run) is None):
            told = take_weights(model, options.start_from)
            if accelerator.is_main_process:
                print(told)
                for warning in seen_before(options, images.train, images.test):
                    print(f"mocapsnet: warning: {warning}", file=sys.stderr)
        if new:
            held.enter_context(run_folder.claimed(run, accelerator, new=True))
        held.callback(tracking.close, accelerator)
        _train(options, run, accelerator, model, images, eager)
    accelerator.end_training()
    return run


def _images(options: TrainOptions, accelerator: Accelerator) -> Images:
    train_set, test_set = load_data(options.data, accelerator, options.optim.seed)
    share = options.watch.validation_share
    if share is None:
        return Images(train_set, None, test_set)
    return Images(*hold_out(train_set, share, options.data.split_seed), test_set)


def finished(run: Path, options: TrainOptions) -> str | None:
    """What to say of a run that has nothing left to do; None if it has.

    Raises: InputError if it has done more than asked.
    """
    found = checkpoints.latest(run)
    if found is None:
        return None
    checkpoint, done = found
    epochs = options.optim.epochs
    if epochs < done:
        raise InputError(
            f"--epochs {epochs}: {run} has done {done} epochs already; give more to go on"
        )
    best = checkpoints.best(checkpoint)
    stopped = gave_up(best, done, options.watch.patience)
    # The result is the last thing that a run writes. One that was killed just before writes it when
    # continued.
    if (epochs > done and not stopped) or result.epochs_done(run) != done:
        return None
    if epochs > done:
        return f"{run} {_why_early(best, done, options)}; give a larger --patience to go on"
    return f"{run} is finished, {epochs} of {epochs} epochs; give --epochs to go on"


def _why_early(best: Best | None, done: int, options: TrainOptions) -> str:
    return (
        f"stopped early after epoch {done} of {options.optim.epochs}: {options.watch.patience} "
        f"epochs brought no better validation accuracy than {best}"
    )


def _check_fit(options: TrainOptions, train_set: ImageSet, accelerator: Accelerator) -> None:
    parts = accelerator.num_processes * options.optim.gradient_accumulation
    images = -(-min(options.optim.batch_size, len(train_set)) // parts)
    _check_shares(options, train_set, parts)
    if options.model.sda_mean == "batch" and parts > 1:
        raise InputError(
            "--sda-mean batch takes a mean over the images that a network sees together, so that "
            "parts of a batch, by --gradient-accumulation or several processes, would change the "
            "result: train without either, or with --sda-mean input"
        )
    config = network_config(options, train_set)
    problem = ""
    try:
        memory.check_fit(config, options.optim, images, accelerator.device)
    except InputError as error:  # perhaps of this process's device alone
        problem = str(error)
    agree(accelerator, problem)


def _check_shares(options: TrainOptions, train_set: ImageSet, parts: int) -> None:
    """Refuse shares of a batch that a network cannot normalise over: where one place is left of an
    image, as of one of 32 pixels, these are the images alone."""
    if options.model.name != RESNET or max(train_set.image_shape[1:]) > 32:
        return
    count, batch_size = len(train_set), options.optim.batch_size
    for images in {min(batch_size, count), count % batch_size or batch_size}:
        if images // parts < 2:
            split = f", split {parts} ways" if parts > 1 else ""
            raise InputError(
                f"{RESNET} normalises over the images that it sees together, and of images no "
                f"larger than 32 pixels needs two; of {count:,} training images a batch has "
                f"{images}{split}; choose another --batch-size, --limit or --gradient-accumulation"
            )


def _train(
    options: TrainOptions,
    run: Path,
    accelerator: Accelerator,
    bare_model: CapsNet,
    images: Images,
    eager: str | None,
) -> None:
    """The epochs of a run, from its last checkpoint, and its end.

    `eager` says why steps are not a CUDA graph; None if they are.
    """
    batch_size, epochs, watch = options.optim.batch_size, options.optim.epochs, options.watch
    count = len(images.train)
    optimizer, schedules = build_optimizer(
        options.optim,
        parameter_groups(options.optim, bare_model),
        epochs * -(-count // batch_size),
        accelerator.device,
    )
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    state = checkpoints.State(bare_model, optimizer, schedules.epoch or schedules.step)
    found = checkpoints.latest(run)
    best: Best | None = None
    begun: Position | None = None
    if found is not None:
        checkpoint, done = found
        best = checkpoints.best(checkpoint)
        ends = done >= epochs or gave_up(best, done, watch.patience)
        within = None if ends else checkpoints.within(run, done)
        kept_before = checkpoints.kept(run, watch.keep)  # or the end would miss it
        if accelerator.is_main_process and kept_before is not None:
            _mend_model(run, options, bare_model, *kept_before)
        checkpoints.restore(within or checkpoint, state)
        if within is not None:
            begun = checkpoints.position(within)
    else:
        checkpoint, done = checkpoints.folder(run, 0), 0
    accelerator.wait_for_everyone()
    tracking.start(accelerator, run, options, done)
    log = None
    if accelerator.is_main_process:
        run_folder.write_config(run, options, images.train, images.test)
        if found is None:  # also a run that is stopped in its first epoch can be resumed
            if options.bundles:
                bundles.record(run, bare_model, images.train, options.optim, 0)
            checkpoints.save(state, run, 0)
        log = MetricsLog(run, done)
        steps_done = len(begun.steps) if begun else 0
        counts = images.counts()
        console.describe(options, bare_model, counts, accelerator, run, done, steps_done, eager)

    criterion = make_criterion(options)
    trainer = Trainer(
        accelerator,
        model,
        criterion,
        optimizer,
        images.train,
        bare_model.preprocessing,
        options,
        schedules.step,
        graphed=eager is None,
    )
    at_start = log is not None and done == 0 and begun is None
    if at_start and (warning := start.write(run, trainer, bare_model)):
        print(warning, file=sys.stderr)
    split, judging = images.judging()

    def judge(by: ImageSet, text: str) -> Evaluation:
        target = options.optim.reconstruction_target
        broadcast(list(bare_model.buffers()))  # each process has running statistics of its own
        return evaluate(accelerator, bare_model, criterion, by, batch_size, target, text)

    def record(row: Row, epochs_done: int) -> None:
        """Keep the state after an epoch, and the network if it is the one to keep."""
        nonlocal checkpoint
        if options.bundles:
            bundles.record(run, bare_model, images.train, options.optim, epochs_done)
        checkpoints.save(state, run, epochs_done, best, watch.keep)
        checkpoint = checkpoints.folder(run, epochs_done)
        if best is None or watch.keep == "last" or best.epoch == epochs_done:
            accuracies = (row.get("test_accuracy"), row.get("validation_accuracy"))
            model_folder.write(run, bare_model, options, epochs_done, *accuracies)

    judged: Evaluation | None = None
    resume = f"mocapsnet train --resume {run}"
    stopper = trainer.stopper
    kept_at = said_at = time.monotonic()
    several = accelerator.num_processes > 1

    def together(asked: bool) -> bool:
        """Whether any process is asked to stop; all are told the same. Collective."""
        wish = torch.tensor([float(asked)], device=accelerator.device)
        return bool(accelerator.reduce(wish, "sum").item()) if several else asked

    def keep_position() -> None:
        """Keep the state within the epoch, if it is between two steps and finite."""
        nonlocal kept_at
        if trainer.position is not None and not _finite(bare_model):
            trainer.position = None
        if log is not None and trainer.position is not None:
            checkpoints.save(state, run, done, best, watch.keep, trainer.position)
        kept_at = time.monotonic()

    def keep_position_at_times() -> None:
        nonlocal said_at
        now = time.monotonic()
        if log is not None and now - said_at > SAY_EVERY:
            run_folder.still_held(run)
            said_at = now
        if now - kept_at > CHECKPOINT_EVERY:
            keep_position()

    try:
        with stopper.watching():
            try:
                while done < epochs and not gave_up(best, done, watch.patience):
                    good = f"last good checkpoint: {checkpoint}"
                    with stopper.held(together):
                        row = trainer.epoch(done, good, begun, keep_position_at_times)
                    begun = None
                    text = "testing" if split == "test" else "validating"
                    # One process may stop at once; several must not wait for one that has.
                    with stopper.held(together) if several else nullcontext():
                        judged = judge(judging, text)
                        row |= judged.row(split)
                        _check_finite(bare_model, split, judged, row, checkpoint)
                    with stopper.held(together):
                        trainer.position = None
                        if schedules.epoch is not None:
                            with warnings.catch_warnings():
                                # no step of the optimiser before it, if all were done earlier
                                warnings.filterwarnings("ignore", "Detected call of")
                                schedules.epoch.step()
                        if images.validation is not None:
                            best = better(best, done + 1, judged.accuracy)
                        if log is not None:
                            log.append(row)
                            start.note_losses(run, done, trainer.steps, count, batch_size)
                            left = trainer.clock.left(count * (epochs - done - 1))
                            print(console.summary(row, epochs, left), flush=True)
                            record(row, done + 1)
                            tracking.log(accelerator, row, done + 1)
                            tracking.log_reconstructions(accelerator, bare_model, judging, done + 1)
                        done += 1
                        checkpoint = checkpoints.folder(run, done)
                        kept_at = time.monotonic()
            except KeyboardInterrupt:
                with stopper.held(lambda _: False):  # told by another process, and by torchrun next
                    keep_position()
                raise
    except KeyboardInterrupt:
        place = f"in epoch {done + 1}"
        if trainer.position is not None:
            place += f" after {len(trainer.position.steps):,} of {len(trainer.steps):,} steps"
        raise Interrupted(f"stopped {place}; continue with: {resume}") from None
    except Exception as error:
        said = what_failed(error)
        if said is None:
            raise
        with suppress(Exception):  # as where a disk is full
            keep_position()
        raise Failed(
            f"{said}; stopped in epoch {done + 1}. The last checkpoint, {checkpoint}, is whole; "
            f"continue with: {resume}"
        ) from error
    kept = done
    if best is not None and watch.keep == "best":
        kept = best.epoch
        checkpoints.load_weights(checkpoints.folder(run, kept), bare_model)
    if split == "test" and judged is not None:
        tested = judged
    else:
        tested = judge(images.test, "testing")
        if split == "validation":
            tracking.log(accelerator, tested.row("test"), done)
    if log is not None:
        early = done < epochs
        if early:
            print(_why_early(best, done, options))
        print(result.sentence(tested, kept, best, watch.keep))
        write_pictures(run, log.rows, bare_model, images.test, tested, kept)
        validated = {row["epoch"]: row.get("validation_accuracy") for row in log.rows}.get(kept)
        model_folder.write(run, bare_model, options, kept, tested.accuracy, validated)
        result.write(run, kept, done, early, best, tested, images.test)
        console.list_folder(run)


def _mend_model(
    run: Path, options: TrainOptions, model: CapsNet, checkpoint: Path, epochs_done: int
) -> None:
    """Write RUN/model anew if it is not the network of a checkpoint, which `model` becomes: a
    training may have failed between the two."""
    if epochs_done == 0 or model_folder.holds(run, checkpoint):
        return
    row = {row["epoch"]: row for row in read_rows(run).rows}.get(epochs_done, {})
    accuracies = (row.get("test_accuracy"), row.get("validation_accuracy"))
    try:
        checkpoints.load_weights(checkpoint, model)
        model_folder.write(run, model, options, epochs_done, *accuracies)
    except InputError:  # a damaged checkpoint, which is told of where it is needed
        return
    except OSError as error:
        print(
            f"mocapsnet: warning: {run / model_folder.FOLDER} is not the network after epoch "
            f"{epochs_done}, and could not be written anew: {error}",
            file=sys.stderr,
        )


def _finite(model: nn.Module) -> bool:
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def _check_finite(
    model: nn.Module, split: str, judged: Evaluation, row: Row, checkpoint: Path
) -> None:
    """Keep a state that is not finite from becoming a checkpoint."""
    if not (_finite(model) and torch.isfinite(torch.tensor(judged.loss))):
        raise Diverged(
            f"after step {row['step']} (epoch {row['epoch']}) the weights or the {split} loss are "
            f"not finite: {split} loss {judged.loss}, margin {judged.margin}, reconstruction "
            f"{judged.reconstruction}; last good checkpoint: {checkpoint}"
        )
