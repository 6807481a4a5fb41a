"""Makes the page of the command line, of what the commands print for --help."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from functools import partial

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "commands.md"
INTRODUCTION = """# The command line

What `--help` prints. `python -m mocapsnet` is the same as `mocapsnet`; `torchrun` takes the former.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mocapsnet.benchmarks.cli import main as benchmark
    from mocapsnet.cli import parse
    from mocapsnet.doctor import main as doctor

    of_their_own = {"benchmark": benchmark, "doctor": doctor}
    parts = [INTRODUCTION]
    for name in subcommands(help_of(partial(parse, ["--help"]))):
        own = of_their_own.get(name)
        text = help_of(partial(own, ["--help"]) if own else partial(parse, [name, "--help"]))
        parts.append(f"## mocapsnet {name}\n\n```text\n{text}\n```\n")
    files.append(File.generated(config, PAGE, content="\n".join(parts)))
    return files


def subcommands(text: str) -> list[str]:
    """The names in the braces of a usage line."""
    return text.partition("{")[2].partition("}")[0].split(",")


def help_of(ask: Callable[[], object]) -> str:
    printed = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "88"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            ask()
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return printed.getvalue().strip()
