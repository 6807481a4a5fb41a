"""`mocapsnet evaluate` and `mocapsnet visualize`: what the network that a run has kept can do."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from torch import Tensor

from mocapsnet.train import bundles, checkpoints
from mocapsnet.train.data import ImageSet, Known, hold_out
from mocapsnet.train.errors import InputError
from mocapsnet.train.evaluation import Evaluation, Judged, evaluate
from mocapsnet.train.metrics import describe_damage, read_rows
from mocapsnet.train.options import RunOptions, TrainOptions, VisualizeOptions
from mocapsnet.train.pictures.mistakes import worst
from mocapsnet.train.prepare import (
    build,
    load_data,
    make_accelerator,
    make_criterion,
    make_repeatable,
)
from mocapsnet.train.run_folder import check_test_images, known, read_config

# Classes whose accuracy is printed; of more, the least accurate.
SHOWN = 20


def kept_checkpoint(run: Path) -> tuple[TrainOptions, Path, int]:
    """A run's options, and the checkpoint of the network that it has kept, with its epochs.

    Raises: InputError if there is none.
    """
    options = read_config(run)
    found = checkpoints.kept(run, options.watch.keep)
    if found is None:
        raise InputError(f"{run} was stopped before it began; mocapsnet train --resume {run}")
    return options, *found


def report(command: RunOptions) -> Evaluation:
    """Print the test accuracy of the network that a run has kept; draw pictures if asked for them.

    Raises: InputError if the run, its data or the device cannot be used.
    """
    run = Path(command.run)
    options, checkpoint, kept = kept_checkpoint(run)
    which = ", the best by validation accuracy" if options.watch.keep == "best" else ""
    source = dataclasses.replace(
        options.data,
        data_dir=command.data_dir or options.data.data_dir,
        download=command.download,
    )
    accelerator = make_accelerator(dataclasses.replace(options.machine, device=command.device))
    make_repeatable(options.optim.seed)
    bundled = isinstance(command, VisualizeOptions) and command.bundles
    then = Known() if bundled else known(run)
    train_set, test_set = load_data(source, accelerator, options.optim.seed, then)
    check_test_images(run, test_set)
    if bundled and options.watch.validation_share is not None:  # those that the run trained with
        share, seed = options.watch.validation_share, options.data.split_seed
        train_set, _ = hold_out(train_set, share, seed)
    if isinstance(command, VisualizeOptions):  # before anything takes long
        from mocapsnet.train.pictures import inside

        chosen = inside.chosen_image(command.image, test_set)
    model = build(options, test_set)
    checkpoints.load_weights(checkpoint, model)
    accelerator.prepare(model)
    criterion = make_criterion(options)
    tested = evaluate(
        accelerator,
        model,
        criterion,
        test_set,
        options.optim.batch_size,
        options.optim.reconstruction_target,
    )
    if accelerator.is_main_process:
        parts = f"margin {tested.margin:.4f}"
        if model.decoder is not None:
            parts += f", reconstruction {tested.reconstruction:.2f}"
        if not model.has_capsules:
            parts = model.class_loss
        when = f"after epoch {kept}" if kept else "not trained yet (its first epoch is not done)"
        print(
            f"{run}, {when}{which}: test accuracy {tested.accuracy:.2%} "
            f"({tested.correct:,} of {tested.images:,}), loss {tested.loss:.4f} "
            f"({parts})"
        )
        by_class = tested.by_class()
        shown = list(by_class.items())[:SHOWN]
        print(
            ("accuracy by class: " if len(shown) == len(by_class) else "least accurate classes: ")
            + ", ".join(f"{test_set.name(c)} {share:.1%}" for c, share in shown)
        )
        mistakes = [
            f"{test_set.name(true)} taken for {test_set.name(guess)} ({count:,})"
            for true, guess, count in tested.most_confused(3)
        ]
        if mistakes:
            print(f"most frequent mistakes: {', '.join(mistakes)}")
        if tested.judged is not None:
            print(f"largest {model.class_loss}: {', '.join(worst_images(test_set, tested.judged))}")
        if isinstance(command, VisualizeOptions):
            from mocapsnet.train.plots import write_pictures

            rows, damaged = read_rows(run)
            if damaged:
                what = describe_damage(run / "metrics.jsonl", damaged)
                print(f"mocapsnet: warning: {what}", file=sys.stderr)
            last = max(checkpoints.whole(run).values())
            rows = [row for row in rows if row["epoch"] <= last]
            for path in write_pictures(run, rows, model, test_set, tested, kept):
                print(path)
            assert tested.judged is not None
            for line in inside.write(run, model, test_set, options, chosen, tested.judged):
                print(line, flush=True)
            if bundled and model.has_capsules:
                measured = bundles.history(run, model, train_set, options.optim, last)
                for line in inside.write_bundles(run, model, measured):
                    print(line)
    accelerator.end_training()
    return tested


def worst_images(images: ImageSet, judged: Judged) -> list[str]:
    """The images with the largest margin losses in words."""

    def name(label: Tensor) -> str:
        return images.name(int(label))

    described = []
    for i in worst(judged, 3):
        label, guess = judged.labels[i], judged.guesses[i]
        taken = "seen as such" if label == guess else f"taken for {name(guess)}"
        described.append(f"{images.title(i)}, {name(label)} {taken} ({judged.margins[i]:.3f})")
    return described
