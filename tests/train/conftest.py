"""Fixtures that run the command in this process, without what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from mocapsnet.cli import main

from .helpers import TINY


@pytest.fixture(autouse=True)
def fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and none of the global state that a command leaves behind."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `mocapsnet ARGUMENTS` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as leave:  # tyro's way out
            code = int(leave.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def train(command: Callable[..., tuple[int, str, str]]) -> Callable[..., Path]:
    """Train the tiny network into the folder named first; fails unless the command succeeds."""

    def run(out: str, *arguments: str) -> Path:
        code, _, errors = command("train", *TINY, "--out", out, *arguments)
        assert code == 0, errors
        return Path(out)

    return run


@pytest.fixture
def pictures() -> None:
    """Runs draw their pictures at the end. Others do not: it takes most of a tiny run's time."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("mocapsnet.train.loop.write_pictures", lambda *_: [])
