"""The options of the command line, and the presets of the data sets.

An option whose value is None takes the data set's preset; `option_values.resolve` puts the preset
in, so that everything after it, and the run's config.json, holds plain values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

DatasetName = Literal["digits", "mnist", "fashion-mnist", "svhn", "cifar10", "cifar100", "folder"]
ModelName = Literal["mocapsnet", "rescapsnet", "capsnet", "conv-mocapsnet", "cnn", "resnet18"]
RecipeName = Literal["published"]
PresetName = Literal["8x8", "32x32", "64x64", "224x224"]


@dataclass(frozen=True)
class Preset:
    """The sizes that suit a data set.

    Attributes:
        pad: black pixels added on each side before the random crop in training.
        epochs, batch_size: length of a run, samples per optimiser step.
        channels, kernel_size, stride: of the two convolutions; stride is that of the second.
    """

    pad: int = 2
    epochs: int = 60
    batch_size: int = 128
    channels: int = 256
    kernel_size: int = 9
    stride: int = 2


PRESETS: dict[str, Preset] = {
    "digits": Preset(pad=1, epochs=30, batch_size=32, channels=64, kernel_size=3, stride=1),
    "mnist": Preset(epochs=30),
    "fashion-mnist": Preset(epochs=30),
    "svhn": Preset(),
    "cifar10": Preset(),
    "cifar100": Preset(),
    "folder": Preset(),
}


def preset(text: str) -> Any:
    """A help string for an option that defaults to the data set's preset, values included."""
    name, _, text = text.partition(": ")
    digits, mnist, others = (getattr(PRESETS[d], name) for d in ("digits", "mnist", "cifar10"))
    hint = f"digits {digits}, others {others}"
    if mnist != others:
        hint = f"digits {digits}, (fashion-)mnist {mnist}, others {others}"
    return arg(help=text, help_behavior_hint=f"(default: {hint})", metavar="INT")


def sizes(text: str, dense: int) -> Any:
    """A help string for an option whose default is this, or that of `ConvOptions.preset`."""
    hint = f"(default: {dense}, conv-mocapsnet by its preset)"
    return arg(help=text, help_behavior_hint=hint, metavar="INT")


# None until `resolve` has put the preset in; for the type checker always an integer.
if TYPE_CHECKING:
    Size = int
else:
    Size = int | None
FROM_PRESET: Any = None


@dataclass(frozen=True)
class DataOptions:
    """Images and how they are presented."""

    dataset: DatasetName = "digits"
    """Data set. digits is embedded; folder is any folder of images, DATA_DIR/train/CLASS/*.png and
    DATA_DIR/test/CLASS/*.png or only DATA_DIR/CLASS/*.png, also .jpg and the like; the others are
    read from their files."""
    data_dir: str = "data"
    """Folder that holds the data sets' files, or the images."""
    download: bool = False
    """Download the data set if its files are missing."""
    pad: Annotated[Size, preset("pad: Pixels padded on each side for the random crop.")] = (
        FROM_PRESET
    )
    normalisation: Literal["image", "fixed", "none"] = "image"
    """Zero mean and unit variance of each image, or a fixed mean and deviation subtracted and
    divided by, or pixels as they are."""
    pixel_mean: tuple[float, ...] | None = None
    """With --normalisation fixed, the mean, one or one a channel, of pixels in [0, 1] (None: as in
    the published code, mnist 0.1307, others 0.5)."""
    pixel_std: tuple[float, ...] | None = None
    """With --normalisation fixed, the deviation (None: mnist 0.3081, others 0.5)."""
    crop: Literal["padded", "resized"] = "padded"
    """Training images are padded and cropped at their size, or a random part of each is enlarged to
    its size, for photographs."""
    crop_area: float = 0.25
    """With --crop resized, the least share of an image that is seen."""
    flip: bool = False
    """Mirror every other training image, left to right."""
    mix: Literal["none", "cutmix", "mixup", "both"] = "none"
    """Mix every training image with another of its batch: a rectangle of one on the other (cutmix),
    one shining through the other (mixup), or by turns. Classes count by the share that is seen."""
    test_crop: Literal["centre", "random"] = "centre"
    """Test images as they are, or each cropped at random as in training, drawn from --seed: another
    seed tests other crops."""
    limit: int | None = None
    """Use only the first N training images and the first N test images (None: all)."""
    image_size: int | None = None
    """With --dataset folder, the images' height and width in pixels; others are resized and cut
    (None: as they are, or 32 if their sizes differ)."""
    test_share: float | None = None
    """With --dataset folder and no test folder, the share of each class that is held out (None: a
    fifth)."""
    split_seed: int = 0
    """Seed of which images are held out; not --seed, so that runs are compared on the same ones."""
    broken_images: Literal["refuse", "skip"] = "refuse"
    """With --dataset folder, what to do with images that cannot be read."""


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    name: Annotated[ModelName, arg(name="model")] = "mocapsnet"
    """Momentum blocks, residual blocks, or a plain stack of capsule layers; conv-mocapsnet has
    momentum blocks of convolutional capsule layers behind a residual stem, for natural images. Or,
    to compare with, cnn: the same convolutions and a dense layer, of as many parameters as
    mocapsnet has with the same options, or resnet18, torchvision's; both trained with
    cross-entropy."""
    blocks: int = 1
    """Blocks of two capsule layers each; in every stage of conv-mocapsnet."""
    capsules: Annotated[Size, sizes("Capsules per hidden layer, at every place of a grid.", 32)] = (
        FROM_PRESET
    )
    capsule_dim: Annotated[Size, sizes("Dimensions of a hidden capsule.", 8)] = FROM_PRESET
    class_dim: int = 16
    """Dimensions of a class capsule."""
    channels: Annotated[Size, preset("channels: Channels of the two convolutions.")] = FROM_PRESET
    kernel_size: Annotated[Size, preset("kernel_size: Kernel width of the convolutions.")] = (
        FROM_PRESET
    )
    stride: Annotated[Size, preset("stride: Stride of the second convolution.")] = FROM_PRESET
    grouping: Literal["channels", "pixels"] = "channels"
    """Primary capsules of neighbouring channels, or of neighbouring pixels as in the published
    code."""
    iterations: int = 3
    """Routing iterations."""
    method: Literal["rba", "sda"] = "rba"
    """Routing by agreement, or scaled-distance agreement."""
    routing_grad: Literal["final", "full"] = "final"
    """Gradient through the last routing iteration only, or through all of them."""
    sda_mean: Literal["input", "batch"] = "input"
    """Mean distance of SDA per input capsule, or over the batch as in the published code."""
    sda_scale: Literal["paper", "published"] = "paper"
    """Scale of SDA's logits as in its paper, or as in the published code, which leaves out a
    parenthesis."""
    bias: float | None = None
    """Every capsule layer adds a learned bias before squash, which starts at this value (None: no
    bias; the published code has 0.1 with SDA)."""
    init: Literal["length", "paper"] = "length"
    """Length-preserving initial weights, or the paper's N(0, 0.01)."""
    gamma: float = 0.9
    """Momentum coefficient, between 0 and 1."""
    velocity: Literal["network", "block"] = "network"
    """One velocity through all blocks, or a new one in every block."""
    skip: Literal["once", "twice"] = "once"
    """Blocks add their input once, or once more as in the published code, which needs --velocity
    block."""
    memory: Literal["reversible", "stored"] = "reversible"
    """Recompute the blocks' activations in the backward pass, or store them."""
    anchor_every: int | None = None
    """With reversible memory, store the activations of every so many layers (None: chosen)."""
    decoder: Annotated[
        tuple[int, ...] | None,
        arg(
            help="Widths of the decoder's hidden layers; with none a linear decoder. Dense "
            "networks always have one: --reconstruction-weight 0 leaves it untrained.",
            help_behavior_hint="(default: 512 1024, conv-mocapsnet no decoder)",
        ),
    ] = None


@dataclass(frozen=True)
class ConvOptions:
    """For --model conv-mocapsnet; what is not given is taken from --preset."""

    preset: PresetName | None = None
    """Sizes that suit images of so many pixels (None: the nearest to the images)."""
    stem: tuple[int, ...] | None = None
    """Channels of the stem's stages of residual blocks; each but the first halves the image."""
    stem_stride: int | None = None
    """Stride of the stem's first convolution."""
    stem_blocks: int | None = None
    """Residual blocks in every stage of the stem."""
    backbone: Literal["resnet18", "resnet34", "resnet50"] | None = None
    """Instead of the stem a network of torchvision, with random weights, normalised within each
    sample."""
    backbone_stage: int | None = None
    """Its last stage used, 1 to 4; stage n divides the image by 2^(n + 1)."""
    stage_strides: tuple[int, ...] | None = None
    """A stage of momentum blocks for each; one with stride 2 begins by halving the grid."""
    window: int | None = None
    """Height and width of the windows of convolutional capsule layers."""


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation."""

    optimizer: Literal["adam", "ranger21"] = "adam"
    """adam, or ranger21 with its own warm-up and warm-down of the learning rate."""
    schedule: Literal["exponential", "cosine"] | None = None
    """adam's learning rate: x 0.96 after each epoch, or risen over the first 5 % of all steps and
    then lowered to zero by half a cosine (None: cosine for conv-mocapsnet and resnet18, else
    exponential)."""
    weight_decay: float = 0.0
    """Share of the weights, times the learning rate, that adam takes off in each step (AdamW)."""
    planned_steps: int | None = None
    """Steps an epoch for which ranger21 plans warm-up and warm-down (None: those that there are;
    the published code takes the batch size)."""
    lr: float = 1e-3
    """Learning rate at the start (exponential) or at the peak (cosine, ranger21)."""
    epochs: Annotated[Size, preset("epochs: Passes through the training images.")] = FROM_PRESET
    batch_size: Annotated[
        Size,
        preset("batch_size: Images per optimiser step, over all processes and micro-batches."),
    ] = FROM_PRESET
    gradient_accumulation: int = 1
    """Micro-batches each process splits its share of a batch into; saves memory, same result, but
    for resnet18, which normalises over each of them; --sda-mean batch refuses it."""
    class_lr_factor: float | None = None
    """The weights of the class capsules are learned at so many times the learning rate, with adam
    (None: conv-mocapsnet a tenth of the number of classes, at least 1, else 1). A capsule
    divides its vote among the classes: with N the same step moves class capsules N/10 times less
    than with 10. Of those weights --weight-decay, a share of the rate, takes as much more."""
    down_weight: float | None = None
    """Weight of each absent class in the margin loss (None: 0.5; conv-mocapsnet with more than 10
    classes 4.5 / (classes - 1), so that all of them together weigh as with 10)."""
    reconstruction_weight: float = 5e-4
    """Weight of the summed squared reconstruction error beside the margin loss."""
    reconstruction_target: Literal["pixels", "normalised"] = "pixels"
    """What the decoder is to draw: the pixels in [0, 1], or the normalised image, which its sigmoid
    cannot reach, as in the published code."""
    decoder_mask: Literal["label", "prediction"] = "label"
    """While training the decoder sees the capsule of the true class, or of the predicted one as in
    the published code; in tests the predicted one."""
    seed: int = 0
    """Seed of weights, order of the images and crops."""


@dataclass(frozen=True)
class WatchOptions:
    """What is watched while it trains, and what is kept of it."""

    validation_share: float | None = None
    """Share of each class of the training images that is held out and validated with after every
    epoch; the test images then are used once, at the end (None: tested after every epoch). Which
    images those are is drawn from --split-seed."""
    keep: Literal["last", "best"] = "last"
    """The network to report and to use: after the last epoch, or after the one with the best
    validation accuracy, whose checkpoint is kept beside the last."""
    patience: int | None = None
    """Stop when so many epochs have not brought a better validation accuracy (None: never)."""
    track: tuple[str, ...] = ("tensorboard",)
    """Where the numbers go besides metrics.jsonl: any of Accelerate's trackers, aim, clearml,
    comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb; nothing after it: none."""


@dataclass(frozen=True)
class MachineOptions:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one, else the CPU."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: the convolutions in bfloat16, all else in float32."""
    graph: Literal["auto", "on", "off"] = "auto"
    """On a CUDA device a training step is captured once as one CUDA graph and then replayed, with
    the same numbers and without the time that Python takes; auto: where that can be, on: refuse to
    train where it cannot, as on the CPU, off: never."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a capsule network."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    conv: ConvOptions = field(default_factory=ConvOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    recipe: RecipeName | None = None
    """Other defaults: published, those of the published code, where it departs from the paper; an
    option that is given besides wins (None: our defaults)."""
    start_from: str | None = None
    """Begin with the weights of a trained network, of a run or a folder that save_pretrained wrote,
    instead of random ones. It must be the same network, but for its classes and decoder: where
    the classes are others, class capsules and decoder are drawn anew."""
    out: str | None = None
    """Run folder, new or empty (None: runs/DATASET-MODEL-TIME)."""
    resume: str | None = None
    """Run folder to continue. Its options are kept; --epochs, --patience, --track, --data-dir,
    --download, --device, --graph, --gradient-accumulation and --bundles may be given anew."""
    bundles: bool = False
    """Measure before training and after every epoch which layers no longer tell training images of
    different classes apart (conflicting bundles); `mocapsnet visualize RUN --bundles` draws it."""


@dataclass(frozen=True)
class RunOptions:
    """What a command needs to read a run."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder that `mocapsnet train` wrote."""
    data_dir: str | None = None
    """Folder that holds the data sets' files (None: the one the run used)."""
    download: bool = False
    """Download the data set if its files are missing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one, else the CPU."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure the test accuracy of the networks that runs have kept, also on moved and on
    overlapping images: of one run in words, of several, or on such images, as a Markdown table."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    """Run folders that `mocapsnet train` wrote, of one data set."""
    shift: Annotated[int, arg(metavar="PIXELS")] = 0
    """Also test images moved at random, by up to so many whole pixels in each direction. With the
    next two options an image is scaled and turned about its centre, then shifted."""
    rotate: Annotated[float, arg(metavar="DEGREES")] = 0.0
    """The same, turned by up to so many degrees either way."""
    scale: Annotated[tuple[float, float], arg(metavar="LEAST GREATEST")] = (1.0, 1.0)
    """The same, height and width multiplied by one factor between these; above 1 enlarges."""
    keep_whole: bool = False
    """Draw the shift of an image from those that leave nothing outside that is not black; for
    images on black, such as MNIST's."""
    overlap: bool = False
    """Also test two images of different classes in one, each moved as these options say, the
    brighter of two pixels shown; right if the two most likely classes are both there."""
    seed: int = 0
    """Seed of what is drawn; all runs are given the same images."""
    json: bool = False
    """Print JSON instead."""
    data_dir: str | None = None
    """Folder that holds the data sets' files (None: the one the run used)."""
    download: bool = False
    """Download the data set if its files are missing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one, else the CPU."""


@dataclass(frozen=True)
class VisualizeOptions(RunOptions):
    """Draw the pictures of a run again, from its metrics and the network it has kept, and what goes
    on inside that: what the dimensions of class capsules stand for, couplings, lengths."""

    image: str = "0"
    """Whose couplings are drawn: a test image's number, counted from 0, or an image file."""
    bundles: bool = False
    """Also draw which layers no longer tell training images of different classes apart
    (conflicting bundles); over all epochs, if the run was trained with --bundles."""


@dataclass(frozen=True)
class CompareOptions:
    """Print what runs differ in, how they started, and how far they have got, as tables."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")]
    """Run folders that `mocapsnet train` wrote, finished or not."""
    picture: Annotated[str | None, arg(metavar="FILE")] = None
    """Draw the numbers of the tables as well, into this PNG file."""


@dataclass(frozen=True)
class PredictOptions:
    """Say which class is in each image, by a table or as JSON."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder that `mocapsnet train` wrote, or a folder that save_pretrained wrote."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")]
    """Image files, and folders of them. Other sizes are scaled to cover the network's and cut
    around the centre; colour becomes grey, or grey colour, as it was trained."""
    pictures: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder to write a picture for each image to, beside its reconstruction."""
    json: bool = False
    """Print JSON instead of a table."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one, else the CPU."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained network to an ONNX file, and run that beside it."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder that `mocapsnet train` wrote, or a folder that save_pretrained wrote."""
    out: Annotated[str, arg(metavar="FILE")] = "model.onnx"
    """The file, which must not exist. Needs pip install "mocapsnet[onnx]"."""


@dataclass(frozen=True)
class ImportOptions:
    """Turn a checkpoint of the published code (github.com/moejoe95/MoCapsNet) into a folder."""

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """The file *.pth.tar; of it tensors alone are unpickled."""
    out: Annotated[str, arg(metavar="DIR")]
    """The folder, new or empty, for mocapsnet predict and mocapsnet.load."""
    plain: bool = False
    """It was trained without --residual."""
    gamma: float = 0.9
    """Its --gamma."""
    iterations: int = 3
    """Its --num_routing."""
    classes: tuple[str, ...] | None = None
    """Names of its classes (None: their numbers)."""


@dataclass(frozen=True)
class ExploreOptions:
    """Open a local page where one draws an image and sees what a network makes of it."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder that `mocapsnet train` wrote, or a folder that save_pretrained wrote."""
    port: Annotated[int | None, arg(metavar="INT")] = None
    """Port of the page, on this machine alone (None: one that is free)."""
    no_browser: bool = False
    """Do not open the page in a browser."""
    data_dir: str | None = None
    """Folder that holds the data sets' files, for test images (None: the one the run used)."""


@dataclass(frozen=True)
class ExperimentOptions:
    """Train what a table of the paper, or an experiment of your own, is made of.

    Runs that are finished are skipped, interrupted ones are continued, and after each the table is
    written beside the paper's numbers. Any other option of `mocapsnet train` may be given as well,
    and then holds for all runs.
    """

    name: Annotated[Positional[str], arg(metavar="NAME|FILE")] = ""
    """table1, table2, table3, table5, figure3 (with Table 4 and Figure 4) or deep; departures or
    collapse, of the published recipe; or a JSON file like theirs. Without it they are listed."""
    out: Annotated[str, arg(metavar="DIR")] = "runs"
    """Folder for the experiment's folder, DIR/NAME."""
    jobs: Annotated[int | None, arg(metavar="INT")] = None
    """Runs at a time, each on a GPU of its own as far as there are some; on the CPU they share the
    threads (None: one, or one on every GPU)."""
    dry_run: bool = False
    """List the runs, their states, and how long they will take by a few steps of each network."""
    report: bool = False
    """Only write the table anew, from the runs that are there."""
    copy: Annotated[str | None, arg(metavar="FILE")] = None
    """Write the experiment's JSON file here, to make one of your own of it."""
    datasets: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """Only these data sets, or others than the experiment's."""
    models: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")] = None
    """Only these networks, or others."""
    blocks: Annotated[tuple[int, ...] | None, arg(metavar="INT ...")] = None
    """Only these numbers of blocks, or others."""
    seeds: Annotated[tuple[int, ...] | None, arg(metavar="INT ...")] = None
    """Only these seeds, or others."""
    epochs: Annotated[int | None, arg(metavar="INT")] = None
    """Epochs of every run; more than before makes runs longer."""
    channels: Annotated[int | None, arg(metavar="INT")] = None
    """Channels of the two convolutions."""
    limit: Annotated[int | None, arg(metavar="INT")] = None
    """Use only the first N training images and the first N test images."""
    data_dir: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder that holds the data sets' files (None: data)."""
    folders: Annotated[tuple[str, ...], arg(metavar="DATASET=DIR ...")] = ()
    """Read a data set from a folder of images instead, as --dataset folder does."""
    train: Annotated[Any, Suppress] = None
    """{name: value} of the other options of `mocapsnet train`, put in by the command line."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure speed, memory and precision; `mocapsnet benchmark --help` lists the benchmarks."""


@dataclass(frozen=True)
class DoctorOptions:
    """Compare what runs here with its reference, and name what is slow; exit status 1 if wrong."""
