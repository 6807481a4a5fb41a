"""Verdicts on kernels, kept in the user's cache folder: one file for each family and place.

A file that is missing, damaged or of another place is no verdict; a folder that cannot be written
keeps none. Neither is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WAIT = 600
"""Seconds that a process waits for another that verifies the same."""


class Verdict(NamedTuple):
    """What came of comparing a family of kernels with its reference."""

    family: str
    where: dict[str, str]
    """GPU and versions that it holds for."""
    cases: list[str]
    """Names of what was compared."""
    failures: dict[str, str]
    """Names of cases that failed, and how."""
    seconds: float
    """That it took."""
    unfinished: str = ""
    """Why the comparison could not be made, if so; then nothing is known."""

    @property
    def passed(self) -> bool:
        return not self.failures


def folder() -> Path:
    """Where verdicts lie. Raises: OSError if the user has no folder."""
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise FileNotFoundError(str(error)) from None
    return user / "mocapsnet" / "verified"


def name(family: str, where: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
    return f"{family}-{digest[:16]}"


def read(family: str, where: dict[str, str]) -> Verdict | None:
    try:
        found = json.loads((folder() / f"{name(family, where)}.json").read_bytes())
        verdict = Verdict(**found)
        whole = (verdict.family, verdict.where) == (family, where) and bool(verdict.cases)
        whole = whole and set(verdict.failures) <= set(verdict.cases) and verdict.seconds >= 0
        return verdict if whole and not verdict.unfinished else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write(verdict: Verdict) -> bool:
    """Whether it could be kept; other processes see the whole file or none."""
    partial = None
    try:
        file = folder() / f"{name(verdict.family, verdict.where)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as partial:
            json.dump(verdict._asdict(), partial, indent=1)
        os.replace(partial.name, file)
        return True
    except OSError:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial.name)
        return False


@contextlib.contextmanager
def alone(family: str, where: dict[str, str]) -> Iterator[None]:
    """One process at a time, if the folder can hold a lock and no other holds it too long."""
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            folder().mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder() / f"{name(family, where)}.lock", timeout=WAIT))
        yield
