"""`mocapsnet evaluate`: runs side by side, on test images as they are, moved, and overlapping."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mocapsnet import CapsNet
from mocapsnet.train import checkpoints, console, data
from mocapsnet.train.data.motion import Motion, both_right, move, overlap
from mocapsnet.train.errors import InputError
from mocapsnet.train.options import EvaluateOptions, MachineOptions, RunOptions, TrainOptions
from mocapsnet.train.prepare import build, load_data, make_accelerator, make_repeatable
from mocapsnet.train.reports import kept_checkpoint, report
from mocapsnet.train.run_folder import check_test_images, known

COLUMNS = {"accuracy": "as they are", "moved": "moved", "overlap": "two overlapping"}


def evaluate_runs(command: EvaluateOptions) -> None:
    """Print the accuracies of what runs have kept, each computed in its own precision.

    A single run without any option of these is reported in words.

    Raises: InputError if an option, a run, its data or the device cannot be used, or runs were
        tested on different images.
    """
    motion = _motion(command)
    if len(command.runs) == 1 and motion.still and not (command.overlap or command.json):
        report(RunOptions(command.runs[0], command.data_dir, command.download, command.device))
        return
    accelerator = make_accelerator(MachineOptions(device=command.device))
    make_repeatable(command.seed)
    runs = [(Path(run), *kept_checkpoint(Path(run))) for run in command.runs]
    with contextlib.redirect_stdout(sys.stderr) if command.json else contextlib.nullcontext():
        test_set = _test_set(command, runs, accelerator)
        facts: dict[str, Any] = {"images": len(test_set), "seed": command.seed}
        facts["dataset"] = runs[0][1].data.dataset
        sets = {"accuracy": (test_set.images, test_set.labels.cpu())}
        if not motion.still:
            moved = move(test_set, motion, command.seed)
            facts["motion"], facts["lost"] = motion.words(), moved.lost
            sets["moved"] = (moved.images.images, test_set.labels.cpu())
        if command.overlap:
            try:
                sets["overlap"] = overlap(test_set, motion, command.seed)
            except ValueError as error:
                raise InputError(f"--overlap: {error}") from error
        rows = [_row(accelerator, run, test_set, sets) for run in runs]
    if accelerator.is_main_process:
        found = facts | {"runs": rows}
        print(json.dumps(found, indent=2) if command.json else "\n".join(table(found)))
    accelerator.end_training()


def _motion(command: EvaluateOptions) -> Motion:
    """Raises: InputError naming the first option that is out of range."""
    least, greatest = command.scale
    if not command.runs:
        raise InputError("RUN: name run folders that `mocapsnet train` wrote")
    if not 0 <= command.shift < 2**31:
        raise InputError(f"--shift must be 0 or greater, got {command.shift}")
    if not 0 <= command.rotate <= 180:
        raise InputError(f"--rotate must be between 0 and 180 degrees, got {command.rotate}")
    if not 0 < least <= greatest < math.inf:
        raise InputError(
            f"--scale must be two factors greater than 0, the least first, got {least} {greatest}"
        )
    if command.keep_whole and not command.shift:
        raise InputError("--keep-whole limits shifts: give --shift with it")
    if not 0 <= command.seed < 2**64:
        raise InputError(f"--seed must be between 0 and 2^64 - 1, got {command.seed}")
    return Motion(command.shift, command.rotate, (least, greatest), command.keep_whole)


Run = tuple[Path, TrainOptions, Path, int]


def _test_set(command: EvaluateOptions, runs: list[Run], accelerator: Accelerator) -> data.ImageSet:
    """The images that all runs were tested on; read once if their options are the same."""
    read: dict[Any, data.ImageSet] = {}
    for run, options, _, _ in runs:
        source = dataclasses.replace(
            options.data,
            data_dir=command.data_dir or options.data.data_dir,
            download=command.download,
        )
        # What changes neither the test images nor their classes.
        key: Any = dataclasses.replace(
            source, normalisation="image", pixel_mean=None, pixel_std=None
        )
        key = (key, known(run))
        if options.data.test_crop == "random":
            key = (*key, options.optim.seed)
        if key not in read:
            read[key] = load_data(source, accelerator, options.optim.seed, known(run))[1]
        check_test_images(run, read[key])
        first = next(iter(read.values()))
        if not torch.equal(read[key].images, first.images):
            raise InputError(
                f"{run} was tested on other images than {runs[0][0]}: compare runs of one data "
                "set, with the same --limit and --test-crop"
            )
    return first


def _row(
    accelerator: Accelerator, run: Run, test_set: data.ImageSet, sets: dict[str, Any]
) -> dict[str, Any]:
    """What is known of a run, and its share of right answers on every set of images."""
    path, options, checkpoint, epochs = run
    model = build(options, test_set)
    checkpoints.load_weights(checkpoint, model)
    model.to(accelerator.device)
    row: dict[str, Any] = {
        "run": str(path),
        "network": type(model).__name__,
        "blocks": model.config.blocks if model.has_capsules else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "seed": options.optim.seed,
    }
    for name, (images, labels) in sets.items():
        bfloat16 = options.machine.mixed_precision == "bf16"
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bfloat16):
            lengths = class_lengths(accelerator, model, images, options.optim.batch_size)
        right = both_right(lengths, labels) if name == "overlap" else lengths.argmax(1) == labels
        row[name] = float(right.double().mean())
    return row


@torch.no_grad()
def class_lengths(
    accelerator: Accelerator, model: CapsNet, images: Tensor, batch_size: int
) -> Tensor:
    """Lengths of the class capsules, or probabilities, [N, classes] on the CPU.

    Collective: each process takes its share, all get the result.

    Args:
        images: [N, C, H, W] uint8.
    """
    model.eval()
    found = torch.zeros(len(images), model.config.classes, device=images.device)
    with console.Progress("testing", len(images), accelerator.is_main_process) as progress:
        for batch in torch.arange(len(images), device=images.device).split(batch_size):
            share = batch.tensor_split(accelerator.num_processes)[accelerator.process_index]
            if len(share):
                pixels = data.to_pixels(images[share])
                found[share] = model(model.preprocessing(pixels)).lengths
            progress.update(len(batch))
    whole: Tensor = accelerator.reduce(found, "sum")  # an image is one process's
    return whole.cpu()


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown: what was tested, and a row for every run."""
    lines = [f"{found['images']:,} test images of {found['dataset']}."]
    if "motion" in found:
        lines[0] += (
            f" Moved: {found['motion']} (seed {found['seed']}); {found['lost']:.2%} of the "
            "brightness is left outside."
        )
    shown = [name for name in COLUMNS if name in found["runs"][0]]
    if "overlap" in shown:
        each = ", each moved so," if "motion" in found else ""
        lines[0] += (
            f" Overlapping: two images of different classes{each} in one; right if both are."
        )
    heads = ["run", "network", "parameters", "epochs", *(COLUMNS[name] for name in shown)]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for row in found["runs"]:
        blocks = row["blocks"]
        depth = "" if blocks is None else f", {blocks} block{'s' * (blocks != 1)}"
        cells = [row["run"], row["network"] + depth, f"{row['parameters']:,}", str(row["epochs"])]
        cells += [f"{row[name]:.2%}" for name in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
