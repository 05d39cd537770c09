"""The store that huggingface_hub shares between repositories: when one of its files is no longer linked, it goes.

    <cache>/blobs/.huggingface-shared-blobs      "1"
                  <two digits>/<hash>            the bytes, hash as Xet has it
                               <hash>.refs       the blobs that link here, one path below the cache per line
                               <hash>.lock       flocked while any of this changes
Its rules: a list that is missing or cannot be read is no reason to delete; each line is checked against the disk.
Source: huggingface_hub/utils/_shared_blobs.py, layout version 1.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from .files import lstat, readlink, try_lock

__all__ = ["sweep", "target"]

_HASH = re.compile(r"[0-9a-f]{64}\Z")
_BLOB = re.compile(r"(?:models|datasets|spaces|kernels)--[^/\n\r]+/blobs/[^/\n\r]+\Z")
MAX_LIST_BYTES = 16 * 1024 * 1024


def target(cache: Path, blob: Path) -> Path | None:
    """The file of the shared store that a repository's blob is a link to, or None."""
    link = readlink(blob)
    if link is None:
        return None
    path = os.path.normpath(os.path.join(blob.parent, link))
    name = os.path.basename(path)
    stored = _place(cache, name) if _HASH.match(name) else None
    return stored if stored is not None and str(stored) == path else None


def sweep(cache: Path, name: str) -> int:
    """Remove a file of the shared store that no blob links any more. Returns the bytes that this freed.

    Raises: OSError: it may not be removed.
    """
    if not _HASH.match(name) or not _is_store(cache):
        return 0
    stored = _place(cache, name)
    try:
        lock = os.open(f"{stored}.lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return 0
    try:
        if not try_lock(lock) or _is_linked(cache, stored):
            return 0  # whoever holds the lock is about to link it
        status = lstat(stored)
        if status is not None and not stat.S_ISREG(status.st_mode):
            return 0
        stored.unlink(missing_ok=True)
        Path(f"{stored}.refs").unlink(missing_ok=True)
        return 0 if status is None else status.st_size
    finally:
        os.close(lock)


def _place(cache: Path, name: str) -> Path:
    return Path(os.path.normpath(cache)) / "blobs" / name[:2] / name


def _is_store(cache: Path) -> bool:
    store, mark = lstat(cache / "blobs"), cache / "blobs" / ".huggingface-shared-blobs"
    status = lstat(mark)
    if store is None or status is None or not stat.S_ISDIR(store.st_mode) or not stat.S_ISREG(status.st_mode):
        return False
    return status.st_size < 100 and mark.read_bytes() == b"1\n"


def _is_linked(cache: Path, stored: Path) -> bool:
    """Whether any blob in the list of this file still links it, or that cannot be known."""
    path = Path(f"{stored}.refs")
    status = lstat(path)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_size > MAX_LIST_BYTES:
        return True
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    return any(_BLOB.match(line) and target(cache, cache / line) == stored for line in lines)
