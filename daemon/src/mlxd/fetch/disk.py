"""Whether there is room for a download, and what the disk's refusals mean to people."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from mlxd_client.errors import DownloadFailed, InsufficientDisk, PermissionDenied, RpcError

from ..store.layout import RESERVE_BYTES, RepoCache, disk_free
from .listing import File
from .parts import allocated

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def require_room(cache: RepoCache, missing: Iterable[File]) -> None:
    """Raises InsufficientDisk unless these files fit, counting in what their parts take already."""
    needed = sum(file.size - allocated(cache, file.oid, file.size) for file in missing)
    if needed == 0:
        return
    try:
        free = disk_free(cache.cache)
    except OSError as error:
        raise disk_error(error, cache, ()) from None
    if free < needed + RESERVE_BYTES:
        raise _full(needed + RESERVE_BYTES, free)


def disk_error(error: OSError, cache: RepoCache, missing: Iterable[File]) -> RpcError:
    """What an error of the disk comes to; `missing` are the files that are not whole yet."""
    if error.errno in _FULL:
        needed = RESERVE_BYTES + sum(file.size - allocated(cache, file.oid, file.size) for file in missing)
        try:
            free = disk_free(cache.cache)
        except OSError:
            free = 0
        return _full(needed, min(free, needed - 1))
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _FORBIDDEN:
        return PermissionDenied(f"{cache.folder} cannot be written: {reason}", folder=str(cache.folder))
    return DownloadFailed(f"the disk failed in {cache.folder}: {reason}", reason=reason, folder=str(cache.folder))


def _full(needed: int, free: int) -> InsufficientDisk:
    short = needed - free
    return InsufficientDisk(
        f"{_gigabytes(short)} GB more disk are needed: {_gigabytes(needed)} GB for the download, "
        f"{_gigabytes(free)} GB are free",
        needed_bytes=needed, free_bytes=free, missing_bytes=short,
    )  # fmt: skip


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
