"""Verdicts on kernels, kept in the user's cache folder: one file for each family and place.

A file that is missing, damaged or of another place is no verdict. That is no error.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from . import kept


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
    return kept.folder("verified")


def read(family: str, where: dict[str, str]) -> Verdict | None:
    try:
        found = json.loads((folder() / f"{kept.name(family, where)}.json").read_bytes())
        verdict = Verdict(**found)
        whole = (verdict.family, verdict.where) == (family, where) and bool(verdict.cases)
        whole = whole and set(verdict.failures) <= set(verdict.cases) and verdict.seconds >= 0
        return verdict if whole and not verdict.unfinished else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write(verdict: Verdict) -> bool:
    """Whether it could be kept; other processes see the whole file or none."""
    try:
        file = folder() / f"{kept.name(verdict.family, verdict.where)}.json"
    except OSError:
        return False
    return kept.write(file, json.dumps(verdict._asdict(), indent=1))


def alone(family: str, where: dict[str, str]) -> AbstractContextManager[None]:
    """One process at a time, if the folder can hold a lock and no other holds it too long."""
    return kept.alone("verified", kept.name(family, where))
