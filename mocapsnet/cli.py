"""The `mocapsnet` command, the one module that stands above training and benchmarks.

Nothing imports it, and it imports a part of the library only when a command line asks for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import __version__

if TYPE_CHECKING:
    from mocapsnet.train.options import (
        CompareOptions,
        EvaluateOptions,
        ExperimentOptions,
        ExploreOptions,
        ExportOptions,
        ImportOptions,
        PredictOptions,
        RunOptions,
        TrainOptions,
    )

    Command = (
        TrainOptions
        | CompareOptions
        | EvaluateOptions
        | ExperimentOptions
        | ExploreOptions
        | PredictOptions
        | ExportOptions
        | ImportOptions
        | RunOptions
    )

# Import names of what `pip install "mocapsnet[train]"` adds.
EXTRA = [
    "PIL",
    "accelerate",
    "filelock",
    "matplotlib",
    "psutil",
    "pytorch_optimizer",
    "sklearn",
    "tensorboard",
    "torchvision",
    "tqdm",
    "tyro",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process); returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"mocapsnet {__version__}")
        return 0
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if arguments[:1] == ["doctor"]:
        from mocapsnet.doctor import main as doctor

        return doctor(arguments[1:], missing)
    if missing:
        print(
            f"mocapsnet: not installed: {', '.join(missing)}; mocapsnet needs "
            'pip install "mocapsnet[train]"',
            file=sys.stderr,
        )
        return 2
    from mocapsnet.train.errors import Failed, Stop, what_failed

    try:
        _run(arguments)
    except Stop as stop:
        # All processes of a torchrun stop alike, and one says why; but one may fail alone.
        if os.environ.get("RANK", "0") == "0" or isinstance(stop, Failed):
            print(f"mocapsnet: {stop}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        said = what_failed(error)
        if said is None:
            raise
        print(f"mocapsnet: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["benchmark"]:  # each benchmark reads options of its own
        from mocapsnet.benchmarks.cli import main as benchmark

        return benchmark(arguments[1:])

    from mocapsnet.train.options import (
        CompareOptions,
        EvaluateOptions,
        ExperimentOptions,
        ExploreOptions,
        ExportOptions,
        ImportOptions,
        PredictOptions,
        TrainOptions,
    )

    command = parse(arguments)
    if isinstance(command, TrainOptions):
        from mocapsnet.train.loop import train

        train(command)
    elif isinstance(command, ExperimentOptions):
        from mocapsnet.train.experiments import experiment

        experiment(command)
    elif isinstance(command, CompareOptions):
        from mocapsnet.train.compare import compare

        compare(command)
    elif isinstance(command, EvaluateOptions):
        from mocapsnet.train.robustness import evaluate_runs

        evaluate_runs(command)
    elif isinstance(command, PredictOptions):
        from mocapsnet.train.predict import predict

        predict(command)
    elif isinstance(command, ExportOptions):
        from mocapsnet.train.export import export

        export(command)
    elif isinstance(command, ImportOptions):
        from mocapsnet.train.import_published import import_published

        import_published(command)
    elif isinstance(command, ExploreOptions):
        from mocapsnet.train.explore import explore

        explore(command)
    else:
        from mocapsnet.train.reports import report

        report(command)


def parse(arguments: list[str]) -> Command:
    """Read a command line. On --help or an unknown option tyro prints and leaves with 0 or 2.

    With --resume the options of that run are the defaults, and most of them are fixed.

    Raises: InputError for values that cannot be used.
    """
    from mocapsnet.train.option_values import check_continuation, resolve
    from mocapsnet.train.options import TrainOptions

    if arguments[:1] == ["experiment"]:
        return _experiment(arguments)
    command, _ = _cli(arguments, TrainOptions())
    if not isinstance(command, TrainOptions):
        return command
    if command.resume is None:
        if command.recipe is not None:
            from mocapsnet.train import recipes

            command, _ = _cli(arguments, recipes.defaults(command))
            assert isinstance(command, TrainOptions)
        return resolve(command)

    from mocapsnet.train.run_folder import read_config

    saved = read_config(Path(command.resume))
    # A flag that is on by default could not be given again.
    bundles = saved.bundles
    saved = dataclasses.replace(
        saved, out=None, data=dataclasses.replace(saved.data, download=False), bundles=False
    )
    command, _ = _cli(arguments, saved)
    assert isinstance(command, TrainOptions)
    command = dataclasses.replace(command, bundles=bundles or command.bundles)
    check_continuation(saved, command)
    return resolve(command)


def _experiment(arguments: list[str]) -> Command:
    """What `mocapsnet experiment` does not know are options for `mocapsnet train`."""
    from mocapsnet.train.option_values import flag, flat
    from mocapsnet.train.options import TrainOptions

    command, others = _cli(arguments, TrainOptions(), unknown=True)
    train, _ = _cli(["train", *others], TrainOptions())
    words = {word.partition("=")[0].replace("_", "-") for word in others}
    names = {name: flag(name) for name in flat(train) if flag(name) in words}
    given = {option[2:].replace("-", "_"): flat(train)[name] for name, option in names.items()}
    return dataclasses.replace(command, train=given)  # type: ignore[arg-type]


def _cli(
    arguments: list[str], train: TrainOptions, unknown: bool = False
) -> tuple[Command, list[str]]:
    """The command, and the words that were not understood, of which there are none but if asked."""
    import tyro

    from mocapsnet.train.options import (
        BenchmarkOptions,
        CompareOptions,
        DoctorOptions,
        EvaluateOptions,
        ExperimentOptions,
        ExploreOptions,
        ExportOptions,
        ImportOptions,
        PredictOptions,
        TrainOptions,
        VisualizeOptions,
    )

    subcommand = tyro.conf.subcommand
    Command = (
        Annotated[TrainOptions, subcommand("train", default=train)]
        | Annotated[EvaluateOptions, subcommand("evaluate")]
        | Annotated[VisualizeOptions, subcommand("visualize")]
        | Annotated[CompareOptions, subcommand("compare")]
        | Annotated[PredictOptions, subcommand("predict")]
        | Annotated[ExportOptions, subcommand("export")]
        | Annotated[ImportOptions, subcommand("import")]
        | Annotated[ExploreOptions, subcommand("explore")]
        | Annotated[ExperimentOptions, subcommand("experiment")]
        | Annotated[BenchmarkOptions, subcommand("benchmark")]
        | Annotated[DoctorOptions, subcommand("doctor")]
    )
    read: Any = partial(
        tyro.cli,
        Command,
        prog="mocapsnet",
        description="Train, examine and measure momentum capsule networks. --version prints the "
        "version and leaves.",
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
        ),
    )
    command, others = read(return_unknown_args=True) if unknown else (read(), [])
    # These two are there for --help; their names are looked for before.
    assert not isinstance(command, (BenchmarkOptions, DoctorOptions))
    return command, others
