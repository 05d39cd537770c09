"""Small files that are written as a whole: whoever reads one finds what was there before or what was written, never a
part of either, whatever happened to the writer. All state of the daemon's own goes through here.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["write_whole"]

_NEW = ".new"


def write_whole(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True, shared: bool = False) -> None:
    """Write a file beside its place, then put it there.

    Args:
        mode: its permissions.
        durable: whether it has to survive a power cut from then on, which costs a wait for the disk.
        shared: whether several processes may write it at once. Else what a killed writer left aside is taken over by
            the next write.

    Raises:
        OSError: it could not be written; what was there before still is, and nothing lies beside it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{_NEW}" if shared else f".{path.name}{_NEW}")
    # What lies there is a killed writer's, or a link that somebody else has made: neither is written through.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the rename itself survive a power cut, as far as the file system offers that."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
