"""The ways a command ends early, each one message and one exit code; none shows a traceback."""

from __future__ import annotations

import torch


class Stop(Exception):
    """A command cannot go on; str() is the message for the user."""

    exit_code = 1


class InputError(Stop):
    """Something the user gave cannot be used; the message says what, and what to do instead."""

    exit_code = 2


class Diverged(Stop):
    """The loss or the parameters stopped being finite."""


class Failed(Stop):
    """The machine failed in the middle of a training; the message says how to go on."""


class Interrupted(Stop):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    exit_code = 130


def what_failed(error: Exception) -> str | None:
    """One line about an error of the machine, its files or its memory; None for any other."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    # PyTorch has a class for GPUs' memory only.
    words = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "calculation overflowed",
    )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    ):
        first = (str(error).splitlines() or ["no more could be had"])[0]
        return (
            f"not enough memory: {first}. Fewer images at a time need less (--batch-size, or "
            "--gradient-accumulation for batches of the same size), and so do smaller networks"
        )
    return None
