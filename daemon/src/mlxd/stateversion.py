"""The one rule for state that outlives a daemon: it carries a version, an older one is read, a newer one is refused.

What was refused is left as it is, for the mlxd that wrote it. Each file's owner says which version it understands.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from mlxd_client.errors import MlxdError

from . import __version__

__all__ = ["StateTooNew", "json_version", "refuse_newer", "too_new"]

_MAX_BYTES = 4 * 1024 * 1024


class StateTooNew(MlxdError):
    """A newer mlxd wrote this; the message names the file, both versions, and what to do.

    Attributes:
        path: what is too new.
        found, understood: its version, and the newest that is understood here.
    """

    def __init__(self, path: Path, found: int, understood: int) -> None:
        super().__init__(too_new(path, found, understood))
        self.path, self.found, self.understood = path, found, understood


def too_new(path: Path, found: int, understood: int) -> str:
    """The sentence, where something else than StateTooNew has to carry it."""
    return (
        f"{path} was written by a newer mlxd: it has version {found}, and mlxd {__version__} reads versions up to "
        f"{understood}; start the newer mlxd, or move the file away to go on without it (it was left as it is)"
    )


def refuse_newer(path: Path, found: int, understood: int) -> None:
    """Raises StateTooNew where `found` is newer than `understood`."""
    if found > understood:
        raise StateTooNew(path, found, understood)


class _Versioned(msgspec.Struct):
    version: int = 1


def json_version(path: Path) -> int:
    """The `version` of a file that holds a JSON object. Files that say nothing, hold something else or cannot be read
    have version 1: what becomes of these is their reader's to decide."""
    try:
        # A FIFO must not block the start, nor a link lead elsewhere.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 1
    with open(fd, "rb") as file:
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                return 1
            return msgspec.json.decode(file.read(), type=_Versioned).version
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return 1
