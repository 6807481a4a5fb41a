"""What every command does first: machine, data, model."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mocapsnet import (
    CapsNet,
    CapsNetConfig,
    CapsuleLoss,
    CNNLoss,
    ConvMoCapsNetConfig,
    MarginLoss,
    ResNetConfig,
    build_model,
)
from mocapsnet.doctor import cpu_has_bfloat16
from mocapsnet.train import data
from mocapsnet.train.allocator import keep_freed_memory
from mocapsnet.train.errors import InputError, what_failed
from mocapsnet.train.option_values import CONV, DENSE, RESNET, preprocessing
from mocapsnet.train.options import DataOptions, MachineOptions, TrainOptions


def make_accelerator(machine: MachineOptions, micro_batches: int = 1) -> Accelerator:
    """Accelerate on the device asked for. Raises: InputError if there is no such device."""
    cuda = torch.cuda.is_available()
    if machine.device == "cuda" and not cuda:
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    on_cpu = machine.device == "cpu" or not cuda
    if on_cpu:
        keep_freed_memory()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=machine.mixed_precision,
        gradient_accumulation_steps=micro_batches,
    )
    if accelerator.num_processes > 1:
        # PyTorch says so of sides that have one element, whose strides mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if on_cpu and machine.mixed_precision == "bf16" and not cpu_has_bfloat16():
        if accelerator.is_main_process:
            print(
                "mocapsnet: warning: this CPU has no bfloat16 instructions: with --mixed-precision "
                "bf16 the convolutions will be many times slower than in float32 (about 15 times "
                "on an AVX2 server); --mixed-precision no is faster and more exact",
                file=sys.stderr,
            )
    return accelerator


def make_repeatable(seed: int) -> None:
    """Seed PyTorch and choose deterministic kernels: the same run gives the same bits."""
    torch.manual_seed(seed)
    # cuBLAS reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory it has not written, so filling it would only cost time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def agree(accelerator: Accelerator, problem: str) -> None:
    """Raises: InputError, in all processes alike, if one of them has a problem. Collective."""
    problems = [one for one in gather_object([problem]) if one]
    if problems:
        raise InputError(problems[0])


def load_data(
    options: DataOptions, accelerator: Accelerator, seed: int, tested: data.Known = data.UNKNOWN
) -> tuple[data.ImageSet, data.ImageSet]:
    """Training and test images on the device. One process fetches or decodes for all. Collective.

    Args:
        seed: of the run, for `test_crop`.
        tested: what a run that is to be tested knows; see `data.load`.
    Raises: InputError, in all processes alike.
    """
    main = accelerator.is_main_process
    if main:
        source = "" if options.dataset == "digits" else f" below {options.data_dir}"
        print(f"reading {options.dataset}{source}", flush=True)
    found = None
    for first in (True, False):  # what the main process leaves is read by the others
        problem = ""
        if main is first:
            try:
                found = data.load(options, quiet=not main, tested=tested)
            except Exception as error:
                said = str(error) if isinstance(error, InputError) else what_failed(error)
                if said is None:
                    raise
                problem = said
        agree(accelerator, problem)
    assert found is not None
    train_set, test_set = found
    limit, device = options.limit, accelerator.device
    train_set, test_set = train_set.first(limit), test_set.first(limit)
    if options.test_crop == "random":
        offsets = data.test_offsets(len(test_set), options.pad, seed)
        crops = data.random_crop(test_set.images, offsets, options.pad)
        test_set = dataclasses.replace(test_set, images=crops)
    return train_set.to(device), test_set.to(device)


def settled(options: TrainOptions, images: data.ImageSet) -> TrainOptions:
    """Resolved options with what depends on the images, the preset of a convolutional network.

    Raises: InputError if the sizes do not fit.
    """
    if options.model.name != CONV:
        return options
    config = network_config(options, images)
    assert isinstance(config, ConvMoCapsNetConfig)
    unused = (
        {"backbone_stage"} if config.backbone is None else {"stem", "stem_stride", "stem_blocks"}
    )

    def fill(group: Any) -> Any:
        fields = {f.name for f in dataclasses.fields(group)} - unused
        known = {f.name for f in dataclasses.fields(config)}
        return dataclasses.replace(group, **{n: getattr(config, n) for n in fields & known})

    return dataclasses.replace(options, model=fill(options.model), conv=fill(options.conv))


def network_config(
    options: TrainOptions, images: data.ImageSet
) -> CapsNetConfig | ConvMoCapsNetConfig | ResNetConfig:
    """The network that resolved options describe, for such images.

    Raises: InputError if the sizes do not fit.
    """
    cropped = options.data.crop == "padded" or options.data.test_crop == "random"
    if cropped and options.data.pad >= min(images.image_shape[1:]):
        _, H, W = images.image_shape
        raise InputError(
            f"--pad {options.data.pad} must be less than the images' size of {H} x {W} pixels, or "
            "a crop may show none of them"
        )
    given, colours = options.data.pixel_mean, images.image_shape[0]
    if given is not None and len(given) not in (1, colours):
        raise InputError(
            f"--pixel-mean and --pixel-std have {len(given)} values; the images have {colours} "
            "channels, so give one or as many"
        )
    sizes = dataclasses.asdict(options.model)
    del sizes["name"]
    shape, classes = images.image_shape, len(images.classes)
    try:
        if options.model.name == RESNET:
            return ResNetConfig(shape, classes)
        if options.model.name != CONV:
            return CapsNetConfig(shape, classes, **sizes)
        sizes = {k: v for k, v in sizes.items() if k not in DENSE} | dataclasses.asdict(
            options.conv
        )
        preset = sizes.pop("preset")
        size = None if preset is None else int(preset.split("x")[0])
        sizes = {k: v for k, v in sizes.items() if v is not None}
        return ConvMoCapsNetConfig.preset(shape, classes, size, **sizes)
    except ValueError as error:
        raise InputError(str(error)) from error


def build(options: TrainOptions, images: data.ImageSet) -> CapsNet:
    """The network of `network_config`. Raises: InputError if the sizes do not fit."""
    try:
        model = build_model(options.model.name, network_config(options, images))
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    model.class_names = images.classes
    model.preprocessing = preprocessing(options.data)
    return model


def make_criterion(options: TrainOptions) -> CapsuleLoss:
    """The loss that a network is trained and tested with."""
    if options.model.name in ("cnn", RESNET):
        return CNNLoss()
    margin = MarginLoss(down_weight=options.optim.down_weight)
    return CapsuleLoss(options.optim.reconstruction_weight, margin=margin)
