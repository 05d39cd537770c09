"""Whether bytes are those that the hub has: files against their hashes, snapshots against the names of their blobs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mlxd_client.types import BadFile

from . import adapter, hub
from .safetensors import SafetensorsError, check_safetensors

__all__ = ["Hasher", "check_bytes", "oid_kind", "verify_snapshot"]

Kind = Literal["sha256", "git-sha1"]
CHUNK_BYTES = 1024 * 1024
MAX_INDEX_BYTES = 16 * 1024 * 1024
MAX_FILES = 20_000


def oid_kind(oid: str) -> Kind | None:
    """How files are hashed that are named like this, or None where it is no hash.

    LFS files have the SHA-256 of their bytes; all others the SHA-1 that git gives a blob:
    https://git-scm.com/book/en/v2/Git-Internals-Git-Objects#_object_storage
    """
    if not hub.is_oid(oid):
        return None
    return "sha256" if len(oid) == 64 else "git-sha1"


class Hasher:
    """Takes the bytes of one file in order, and tells whether they are the right ones.

    Args:
        oid: what `oid_kind` knows; ValueError otherwise.
        size: how many bytes the file has; git hashes that, too.
    """

    def __init__(self, oid: str, size: int) -> None:
        kind = oid_kind(oid)
        if kind is None:
            raise ValueError("no hash that a blob is named by")
        self.oid = oid
        self.size = size
        self.done = 0
        self._hash = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
        if kind == "git-sha1":
            self._hash.update(b"blob %d\0" % size)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        self.done += len(data)

    def matches(self) -> bool:
        """Whether all bytes have come, and are right."""
        return self.done == self.size and self._hash.hexdigest() == self.oid


def check_bytes(
    path: Path, oid: str, size: int, on_bytes: Callable[[int], None] | None = None
) -> Literal["missing", "size", "hash"] | None:
    """What is wrong with a file that should have this hash and size, as in BadFile; None where nothing is.

    A file that the disk fails to read counts as changed. `on_bytes` is told of each piece that was read, in bytes.

    Raises: OSError: it may not be read.
    """
    hasher = Hasher(oid, size)
    status = _stat_file(path)
    if status is None:
        return "missing"
    if status.st_size != size:
        return "size"
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        try:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                if on_bytes is not None:
                    on_bytes(count)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return "hash"
    return None if hasher.matches() else "hash"


def _stat_file(path: Path) -> os.stat_result | None:
    """Of a regular file, links followed; None where there is none."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


def verify_snapshot(snapshot: Path, on_progress: Callable[[int], None] | None = None) -> list[BadFile]:
    """All that is wrong with the files of a model's folder, sorted by name; nothing is changed.

    1. a link into blobs/ must lead to the bytes that its blob is named by; 2. safetensors files must be sound; 3. what
    a model cannot do without, and what its index names, must be there. Files that are no links, as in a copied cache or
    a folder of one's own, have no hash to be compared with.

    Args:
        on_progress: told how many bytes have been hashed so far.

    Raises: OSError: the folder, or a file in it, may not be read.
    """
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(done)

    bad: dict[str, str] = {}
    names = _files(snapshot)
    for name in names:
        reason = _check_file(snapshot / name, count)
        if reason is not None:
            bad[name] = reason
    for name in _required(snapshot, names):
        if name not in names:
            bad[name] = "missing"
    return [BadFile(file=name, reason=reason) for name, reason in sorted(bad.items())]


def _files(snapshot: Path) -> list[str]:
    """The names of all files and links, folders walked but not through links."""
    found: list[str] = []
    for place, folders, names in os.walk(snapshot, onerror=_raise):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += (os.path.relpath(os.path.join(place, name), snapshot) for name in (*names, *linked))
        if len(found) > MAX_FILES:
            raise OSError(errno.E2BIG, f"it holds more than {MAX_FILES} files")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _check_file(path: Path, count: Callable[[int], None]) -> str | None:
    status = _stat_file(path)
    if status is None:
        return "missing"
    oid = _blob_name(path)
    if oid is not None and (reason := check_bytes(path, oid, status.st_size, count)) is not None:
        return reason
    if path.name.endswith(".safetensors"):
        try:
            check_safetensors(path)
        except SafetensorsError:
            return "safetensors"
    return None


def _blob_name(path: Path) -> str | None:
    """The hash that a link's blob is named by, or None for what is no such link."""
    try:
        folder, name = os.path.split(os.readlink(path))
    except OSError:
        return None
    return name if os.path.basename(folder) == "blobs" and hub.is_oid(name) else None


def _required(snapshot: Path, names: list[str]) -> list[str]:
    """What the folder of a model or an adapter has to hold, as far as its files say."""
    if adapter.is_adapter(names):
        return [adapter.CONFIG, adapter.WEIGHTS[adapter.format_of(names) or "mlx"]]
    required = ["config.json"]
    if "model.safetensors.index.json" not in names:
        weights = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
        return required if weights else [*required, "model.safetensors"]
    try:
        with open(snapshot / "model.safetensors.index.json", "rb") as file:
            index = json.loads(file.read(MAX_INDEX_BYTES))
        weight_map = index["weight_map"].values()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return required  # the file itself was judged by its hash
    return [*required, *sorted({name for name in weight_map if isinstance(name, str) and hub.is_file_name(name)})]
