"""Small things about files and folders that no link may lead astray: nothing here follows one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mlxd_client.errors import ModelInvalid


class UnsafeFolder(ModelInvalid):
    """Something else lies where a folder of the cache belongs; nothing is written or deleted there."""


def lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def readlink(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def walk(folder: Path) -> Iterator[Path]:
    """All that lies in a folder, at any depth, but for folders; linked folders count as links, and are not entered.

    Raises: OSError: it cannot be read. What may be linked from there has to be known, or nothing is deleted.
    """
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
        else:
            yield Path(entry.path)


def is_at(fd: int, path: Path) -> bool:
    status = lstat(path)
    return status is not None and os.path.samestat(os.fstat(fd), status)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir()
    except FileExistsError:
        require_folder(folder)


def require_folder(folder: Path) -> None:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise UnsafeFolder(f"{folder} is no folder, or a link to one; nothing is written or deleted through it")


def replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except IsADirectoryError:
        raise UnsafeFolder(f"{target} is a folder where a file belongs") from None


def touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or whatever else is there. Links are removed, never followed."""
    status = lstat(path)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        path.unlink(missing_ok=True)
        return
    for name in os.listdir(path):
        remove_tree(path / name)
    path.rmdir()


def fsync_folder(folder: Path) -> None:
    """Have what was renamed in a folder survive a power cut, as far as the file system offers that."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def try_lock(fd: int) -> bool:
    """Take the lock on an open file or folder if nobody has it. Returns False while somebody else does.

    A file system that knows no locks grants it: there, nobody can be kept out.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock on a file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)
