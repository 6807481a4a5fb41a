"""What every command does first: machine, data, model, run folder."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mocapsnet import CapsNet, CapsNetConfig, build_model
from mocapsnet.train import data
from mocapsnet.train.errors import InputError
from mocapsnet.train.options import DataOptions, MachineOptions, TrainOptions


def make_accelerator(machine: MachineOptions, micro_batches: int = 1) -> Accelerator:
    """Accelerate on the device asked for. Raises: InputError if there is no such device."""
    cuda = torch.cuda.is_available()
    if machine.device == "cuda" and not cuda:
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    on_cpu = machine.device == "cpu" or not cuda
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=machine.mixed_precision,
        gradient_accumulation_steps=micro_batches,
    )
    if on_cpu and machine.mixed_precision == "bf16" and not _cpu_has_bfloat16():
        if accelerator.is_main_process:
            print(
                "mocapsnet: warning: this CPU has no bfloat16 instructions: with --mixed-precision "
                "bf16 the convolutions will be many times slower than in float32 (about 15 times "
                "on an AVX2 server); --mixed-precision no is faster and more exact",
                file=sys.stderr,
            )
    return accelerator


def _cpu_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 natively; True where that cannot be found out."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


def make_repeatable(seed: int) -> None:
    """Seed PyTorch and choose deterministic kernels: the same run gives the same bits."""
    torch.manual_seed(seed)
    # cuBLAS reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory it has not written, so filling it would only cost time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def load_data(
    options: DataOptions, accelerator: Accelerator
) -> tuple[data.ImageSet, data.ImageSet]:
    """Training and test images on the device. One process fetches or decodes for all."""
    main = accelerator.is_main_process
    if main:
        source = "" if options.dataset == "digits" else f" below {options.data_dir}"
        print(f"reading {options.dataset}{source}", flush=True)
    shared_work = options.download or options.dataset == "folder"
    if shared_work and not main:
        accelerator.wait_for_everyone()
    train_set, test_set = data.load(options, quiet=not main)
    if shared_work and main:
        accelerator.wait_for_everyone()
    limit, device = options.limit, accelerator.device
    return train_set.first(limit).to(device), test_set.first(limit).to(device)


def build(options: TrainOptions, images: data.ImageSet) -> CapsNet:
    """The network that resolved options describe, for such images.

    Raises: InputError if the sizes do not fit.
    """
    sizes = dataclasses.asdict(options.model)
    name = sizes.pop("name")
    try:
        config = CapsNetConfig(image_shape=images.image_shape, classes=len(images.classes), **sizes)
        model = build_model(name, config)
    except ValueError as error:
        raise InputError(str(error)) from error
    model.class_names = images.classes
    return model


def new_run_folder(options: TrainOptions, accelerator: Accelerator) -> Path:
    """Create the run folder, the same for all processes. Raises: InputError if it is in use."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [options.out or f"runs/{options.data.dataset}-{options.model.name}-{now}"]
    broadcast_object_list(names)
    run = Path(names[0])
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(
            f"{run} exists and is not an empty folder; choose another --out, or continue that run "
            f"with --resume {run}"
        )
    accelerator.wait_for_everyone()
    run.mkdir(parents=True, exist_ok=True)
    return run
