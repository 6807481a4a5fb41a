"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside `path`, then rename: after a kill it holds the old content or the new.

    The file gets the mode that the umask gives, and is on disk when this returns.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it meanwhile
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def hidden(path: Path) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def is_partial(name: str, of: str) -> bool:
    """Whether a file is what a kill left of a file `of` that was being written."""
    return name.startswith(f"{of}.") and name.endswith(".tmp")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
