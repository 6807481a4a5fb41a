"""The values of the options: presets, ranges, JSON, and what a continued run may change.

Whatever way options came, by the command line or from a run's config.json, `resolve` judges them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from mocapsnet.preprocessing import Preprocessing
from mocapsnet.train import recipes
from mocapsnet.train.errors import InputError
from mocapsnet.train.options import (
    PRESETS,
    ConvOptions,
    DataOptions,
    MachineOptions,
    ModelOptions,
    OptimOptions,
    RecipeName,
    TrainOptions,
    WatchOptions,
)

# What may differ between a run and its continuation: the result does not depend on it, but for
# epochs and patience, which only say how far to go.
RESUMABLE = {
    "data.data_dir",
    "data.download",
    "optim.epochs",
    "optim.gradient_accumulation",
    "watch.patience",
    "watch.track",
    "machine.device",
    "machine.graph",
    "resume",
    "bundles",
}

# Mean and deviation of pixels by which the published code normalises; 0.5 and 0.5 for others.
PUBLISHED_PIXELS = {"mnist": (0.1307, 0.3081)}

# Options that a network without momentum has no use for.
MOMENTUM = ["model.gamma", "model.velocity", "model.memory", "model.anchor_every"]

CONV, RESNET = "conv-mocapsnet", "resnet18"

# Options of the dense networks that the convolutional one has not.
DENSE = "channels kernel_size stride grouping sda_mean sda_scale bias init skip".split()

# Left to the images, where a convolutional network's options are None; see `prepare.settled`.
SETTLED = [
    "model.capsules",
    "model.capsule_dim",
    *(f"conv.{f.name}" for f in dataclasses.fields(ConvOptions)),
]

# What the dense networks have where `PRESETS` have nothing.
DENSE_SIZES: dict[str, Any] = {"capsules": 32, "capsule_dim": 8, "decoder": (512, 1024)}

_GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "conv": ConvOptions,
    "optim": OptimOptions,
    "watch": WatchOptions,
    "machine": MachineOptions,
}


def resolve(options: TrainOptions) -> TrainOptions:
    """Put the data set's preset where the user gave nothing, and check the numbers.

    What the network's sizes must be is checked by `CapsNetConfig`, which knows the images.

    Raises: InputError naming the first option that is out of range.
    """
    chosen = PRESETS[options.data.dataset]

    def fill(group: Any) -> Any:
        missing = {
            f.name: getattr(chosen, f.name)
            for f in dataclasses.fields(group)
            if getattr(group, f.name) is None and hasattr(chosen, f.name)
        }
        return dataclasses.replace(group, **missing)

    data = options.data
    if data.crop == "resized" and data.test_crop == "centre":
        if data.pad:
            raise InputError(f"--pad {data.pad} is for --crop padded, or for --test-crop random")
        data = dataclasses.replace(data, pad=0)
    data = fill(data)
    if data.normalisation == "fixed" and data.pixel_mean is None and data.pixel_std is None:
        mean, std = PUBLISHED_PIXELS.get(data.dataset, (0.5, 0.5))
        data = dataclasses.replace(data, pixel_mean=(mean,), pixel_std=(std,))
    model, optim = options.model, fill(options.optim)
    if model.name not in (CONV, RESNET):
        model = fill(model)
        missing = {k: v for k, v in DENSE_SIZES.items() if getattr(model, k) is None}
        model = dataclasses.replace(model, **missing)
    if optim.schedule is None and optim.optimizer == "adam":
        schedule = "cosine" if model.name in (CONV, RESNET) else "exponential"
        optim = dataclasses.replace(optim, schedule=schedule)
    if model.name in ("mocapsnet", "rescapsnet", "capsnet"):  # else by the number of classes
        published = {"class_lr_factor": 1.0, "down_weight": 0.5}
        missing = {k: v for k, v in published.items() if getattr(optim, k) is None}
        optim = dataclasses.replace(optim, **missing)
    options = dataclasses.replace(options, data=data, model=model, optim=optim)
    _check_ranges(options)
    _check_use(options)
    preprocessing(options.data)
    return options


def preprocessing(options: DataOptions) -> Preprocessing:
    """How pixels are normalised. Raises: InputError if mean and deviation cannot be used."""
    try:
        return Preprocessing(options.normalisation, options.pixel_mean, options.pixel_std)
    except ValueError as error:
        raise InputError(f"--pixel-mean and --pixel-std: {error}") from error


def _check_ranges(options: TrainOptions) -> None:
    values = flat(options)
    positive = "optim.epochs optim.batch_size optim.gradient_accumulation optim.lr data.limit"
    for name in [
        *positive.split(),
        "optim.class_lr_factor",
        "data.image_size",
        "optim.planned_steps",
        "watch.patience",
    ]:
        if values[name] is not None and not 0 < values[name] < math.inf:
            raise InputError(f"{flag(name)} must be greater than 0, got {values[name]}")
    seeds = ["optim.seed", "data.split_seed"]
    weights = [f"optim.{n}" for n in ("reconstruction_weight", "weight_decay", "down_weight")]
    for name in ["data.pad", *weights, *seeds]:
        if values[name] is not None and not 0 <= values[name] < math.inf:
            raise InputError(f"{flag(name)} must be 0 or greater, got {values[name]}")
    for name, value in values.items():
        bits = 64 if name in seeds else 31
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number >= 2**bits:
                raise InputError(f"{flag(name)} must be below 2^{bits}, got {number}")
    for name in ("data.test_share", "watch.validation_share"):
        if values[name] is not None and not 0 < values[name] < 1:
            raise InputError(f"{flag(name)} must be between 0 and 1, got {values[name]}")
    if not 0 < options.data.crop_area <= 1:
        raise InputError(f"--crop-area must be above 0 and at most 1, got {options.data.crop_area}")
    parts, batch_size = options.optim.gradient_accumulation, options.optim.batch_size
    if parts > batch_size:
        raise InputError(
            f"--gradient-accumulation {parts}: a batch of {batch_size} images (--batch-size) has "
            "no more parts than images"
        )


def _check_use(options: TrainOptions) -> None:
    """An option that would have no effect is a mistake."""
    values, defaults = flat(options), flat(TrainOptions())

    def refuse(names: list[str], reason: str) -> None:
        for name in names:
            if values[name] != defaults[name]:
                raise InputError(f"{flag(name)} {values[name]} {reason}")

    if options.data.dataset != "folder":
        refuse(
            [f"data.{n}" for n in ("image_size", "test_share", "broken_images")],
            f"is for --dataset folder; {options.data.dataset} has images of one size and a test "
            "set of its own",
        )
    if options.watch.validation_share is None:
        if options.data.dataset != "folder":
            refuse(
                ["data.split_seed"],
                "is for --validation-share and for --dataset folder; nothing is held out here",
            )
        refuse(
            ["watch.keep", "watch.patience"],
            "needs --validation-share, such as 0.1: what is chosen on the test images would be "
            "better on them than on any others",
        )
    name = options.model.name
    if name not in ("mocapsnet", CONV):
        refuse(
            MOMENTUM,
            f"is for --model mocapsnet; {name} has no momentum",
        )
    if name in ("cnn", RESNET):
        model = "grouping iterations method routing_grad sda_mean sda_scale bias init skip".split()
        if name == RESNET:
            model = [f.name for f in dataclasses.fields(ModelOptions) if f.name != "name"]
        optim = (
            "class_lr_factor down_weight reconstruction_weight reconstruction_target decoder_mask"
        ).split()
        refuse(
            [*(f"model.{n}" for n in model), *(f"optim.{n}" for n in optim), "bundles"],
            f"is for networks of capsules; {name} has no routing and no decoder"
            + (", and its sizes are fixed" if name == RESNET else ""),
        )
    if name == CONV:
        refuse([f"model.{n}" for n in DENSE], f"is for the dense networks; {CONV} has it not")
        own, other = ["stem", "stem_stride", "stem_blocks"], ["backbone_stage"]
        if options.conv.backbone is not None:
            refuse([f"conv.{n}" for n in own], "is for the stem that --backbone replaces")
        else:
            refuse([f"conv.{n}" for n in other], "is for --backbone")
        if options.model.decoder is None:
            decoding = ("reconstruction_weight", "reconstruction_target", "decoder_mask")
            refuse([f"optim.{n}" for n in decoding], "needs --decoder, of which there is none")
    else:
        fields = dataclasses.fields(ConvOptions)
        refuse([f"conv.{f.name}" for f in fields], f"is for --model {CONV}")
    if options.data.crop == "padded":
        refuse(["data.crop_area"], "is for --crop resized")
    if options.optim.optimizer != "adam":
        names = ["optim.schedule", "optim.weight_decay"]
        refuse(names, f"is for --optimizer adam; {options.optim.optimizer} has its own")
        if options.optim.class_lr_factor not in (None, 1.0):
            refuse(["optim.class_lr_factor"], "is for --optimizer adam")
    if options.model.method != "sda":
        refuse(["model.sda_mean", "model.sda_scale"], "is for --method sda")
    if options.model.memory == "stored":
        refuse(["model.anchor_every"], "is for --memory reversible")
    if options.optim.optimizer != "ranger21":
        refuse(["optim.planned_steps"], "is for --optimizer ranger21")
    if options.data.pad == 0:
        refuse(["data.test_crop"], "needs --pad of at least 1")


def flat(options: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ...} for every option."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{f.name}.")
        else:
            values[prefix + f.name] = value
    return values


def flag(name: str) -> str:
    """The command-line spelling of an option named as in `flat`."""
    return "--model" if name == "model.name" else "--" + name.split(".")[-1].replace("_", "-")


def arguments(values: dict[str, Any]) -> list[str]:
    """Words of a command line that give some options, by the names that `kinds` has."""
    words: list[str] = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [option] if value else []
        elif value is not None:
            several = value if isinstance(value, (list, tuple)) else [value]
            words += [option, *map(str, several)]
    return words


def planned(options: OptimOptions) -> bool:
    """Whether the learning rate is planned over all epochs, so that a run cannot go on longer."""
    return options.optimizer == "ranger21" or options.schedule == "cosine"


def check_continuation(saved: TrainOptions, asked: TrainOptions) -> None:
    """Raises: InputError if `asked` would make another run of the one that was saved."""
    new = flat(asked)
    for name, value in flat(saved).items():
        if new[name] == value:
            continue
        if name not in RESUMABLE:
            raise InputError(
                f"{flag(name)} {new[name]} does not go with --resume: the run has {value}. "
                f"Only {', '.join(flag(n) for n in sorted(RESUMABLE - {'resume'}))} may change"
            )
        if name == "optim.gradient_accumulation" and saved.model.name == RESNET:
            raise InputError(
                f"--gradient-accumulation {new[name]}: the run has {value}, and {RESNET} "
                "normalises over each part of a batch, so another number would change its result"
            )
        if name == "optim.epochs" and planned(saved.optim):
            who = "ranger21" if saved.optim.optimizer == "ranger21" else "--schedule cosine"
            raise InputError(
                f"--epochs {new[name]}: {who} plans its learning rate over the run's {value} "
                "epochs, so this run cannot be made longer or shorter; start a new one"
            )


def to_json(options: TrainOptions) -> dict[str, Any]:
    """Options as JSON, readable from any working directory."""
    data = dataclasses.replace(options.data, data_dir=str(Path(options.data.data_dir).absolute()))
    start = options.start_from and str(Path(options.start_from).absolute())
    return dataclasses.asdict(
        dataclasses.replace(options, data=data, start_from=start, resume=None)
    )


def from_json(saved: Any, complete: bool = True) -> TrainOptions:
    """The inverse of `to_json`.

    Args:
        complete: refuse missing options; else they have their defaults.
    Raises: InputError naming the first option that is unknown, missing, or of another type, or
        that `resolve` refuses.
    """
    return resolve(_read(saved, complete))


def _read(saved: Any, complete: bool) -> TrainOptions:
    """`from_json`, not resolved."""
    if not isinstance(saved, dict):
        raise InputError(f"options must be an object, not {saved!r}")
    groups = {name: _group(name, kind, saved, complete) for name, kind in _GROUPS.items()}
    out = of_kind("out", saved.get("out"), str | None)
    recipe = of_kind("recipe", saved.get("recipe"), RecipeName | None)
    start_from = of_kind("start_from", saved.get("start_from"), str | None)
    for name in saved:
        if name not in {*groups, "recipe", "start_from", "out", "resume", "bundles"}:
            raise InputError(f"unknown options {name}")
    bundles = of_kind("bundles", saved.get("bundles", False), bool)
    return TrainOptions(**groups, recipe=recipe, start_from=start_from, out=out, bundles=bundles)


@functools.cache
def kinds() -> dict[str, tuple[str, Any]]:
    """Group, and name in it, and type of every option, by the name it has on the command line."""
    found = {
        flag(f"{group}.{name}")[2:].replace("-", "_"): (f"{group}.{name}", kind)
        for group, options in _GROUPS.items()
        for name, kind in _hints(options).items()
    }
    others = {name: (name, kind) for name, kind in _hints(TrainOptions).items()}
    return found | {n: k for n, k in others.items() if n not in (*_GROUPS, "out", "resume")}


def from_names(values: dict[str, Any]) -> TrainOptions:
    """Resolved options of some values, by the names that `kinds` has, as a command line has them.

    Raises: InputError as `from_json`.
    """
    known, recipe = kinds(), values.get("recipe")

    def filled(defaults: dict[str, Any]) -> TrainOptions:
        groups = {group: dict(defaults.get(group, {})) for group in _GROUPS}
        others: dict[str, Any] = {}
        for name, value in values.items():
            group, _, own = known[name][0].partition(".")
            holder, key = (groups[group], own) if own else (others, group)
            holder[key] = list(value) if isinstance(value, tuple) else value
        return _read(groups | others, complete=False)

    options = filled({})
    if recipe is not None:
        options = filled(json.loads(json.dumps(dataclasses.asdict(recipes.defaults(options)))))
    return resolve(options)


def _group(group: str, kind: type, saved: dict[str, Any], complete: bool) -> Any:
    values = saved.get(group, {})
    if not isinstance(values, dict):
        raise InputError(f"{group} must be an object, not {values!r}")
    kinds = _hints(kind)
    for name in values:
        if name not in kinds:
            raise InputError(f"unknown option {group}.{name}")
    for name in kinds:
        if complete and name not in values:
            raise InputError(f"{group}.{name} is missing")
    return kind(**{name: of_kind(f"{group}.{name}", v, kinds[name]) for name, v in values.items()})


@functools.cache
def _hints(options: type) -> dict[str, Any]:
    return typing.get_type_hints(options)


def of_kind(name: str, value: Any, kind: Any) -> Any:
    """A value of a JSON file as an option of that type.

    Raises: InputError that begins with `name`.
    """
    if not _fits(value, kind):
        raise InputError(f"{name} is {value!r}, but must be {_describe(kind)}")
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in choices
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in choices)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(v, choices[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _describe(kind: Any) -> str:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(choices)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_describe(choice) for choice in choices)
    if typing.get_origin(kind) is tuple:
        return f"a list, of each {_describe(choices[0])}"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return words.get(kind, "null")
