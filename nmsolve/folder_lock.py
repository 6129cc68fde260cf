"""A folder that one process at a time may use."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock"]


def lock(folder: Path) -> int | None:
    """A locked descriptor of ``folder``; closing it, or the end of the process, frees the folder.

    None where the file system or this system has no such locks.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    OSError
        If it is no folder that can be read.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
