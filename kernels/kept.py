"""Files in the user's cache folder that tell what was found out about a GPU, for each place.

A place is the GPU model and all versions that make code for it, see `verification.where`. A folder
that cannot be written keeps nothing, which is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

WAIT = 600
"""Seconds that a process waits for another that finds out the same."""


def folder(kind: str) -> Path:
    """Where files of a kind lie. Raises: OSError if the user has no folder."""
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise FileNotFoundError(str(error)) from None
    return user / "mocapsnet" / kind


def name(stem: str, where: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
    return f"{stem}-{digest[:16]}"


def write(file: Path, text: str) -> bool:
    """Whether it could be kept; other processes see the whole file or none."""
    partial = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            partial.write(text)
        os.replace(partial.name, file)
        return True
    except OSError:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial.name)
        return False


@contextlib.contextmanager
def alone(kind: str, name: str) -> Iterator[None]:
    """One process at a time, if the folder can hold a lock and no other holds it too long."""
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            folder(kind).mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder(kind) / f"{name}.lock", timeout=WAIT))
        yield
