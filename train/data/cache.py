"""Decoded images kept in one file beside the data, as long as the data stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NAME = "mocapsnet-cache.safetensors"


def fingerprint(root: Path, paths: list[str], how: str) -> str:
    """What a cache depends on: names, sizes and times of the files, and how they are decoded."""
    digest = hashlib.sha256(how.encode())
    prefix = len(str(root))
    for path in paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # as of a link to nowhere, which decoding will name
            state = "none"
        digest.update(os.fsencode(f"{path[prefix:]}\0{state}\n"))
    return digest.hexdigest()


def places(root: Path) -> list[Path]:
    """Where a cache may lie: beside the data, or where that is not writable, with the user's."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / NAME, user / "mocapsnet" / f"{name}.safetensors"]


def read(root: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and notes of the cache that was written with this key, if there is a whole one."""
    for path in places(root):
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("key") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # none there, or cut off
    return None


def write(root: Path, key: str, tensors: dict[str, Tensor], notes: dict[str, str]) -> Path | None:
    """Keep tensors and notes under a key. Returns: the file, or None if no place can be written."""
    for path in places(root):
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()  # with the mode that files have here; the writer's own is narrower
            mode = partial.stat().st_mode
            save_file(tensors, partial, notes | {"key": key})
            partial.chmod(mode)
            partial.replace(path)
            return path
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                partial.unlink()
    return None
