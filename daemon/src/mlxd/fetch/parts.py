"""A file under way: its part, as large as the file and full of holes, and the map that says which chunks are there.

    <oid>.mlxd-map    magic, size, chunk size, oid; then one byte for each chunk, 1 once the chunk has been written

A chunk is marked after its bytes are written, so a process that dies at any moment leaves a map that claims too little,
never too much. After a power cut it may claim too much: that is what the hash at the end is for.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from mlxd_client.errors import DownloadFailed

from ..stateversion import too_new
from ..store.layout import RepoCache
from .segments import CHUNK_BYTES, chunk_count, held_bytes

_HEADER = struct.Struct(">8sQQ64s")
_MAGIC, _VERSION = b"mlxdmap", 1
_MAX_VECTOR = 512  # pieces in one system call; the system's own limit is 1,024


class Closed(Exception):
    """The part was closed meanwhile; nothing was written."""


def held(cache: RepoCache, oid: str, size: int) -> int:
    """How many bytes of a file the part holds, without a lock: another process may be adding to it."""
    try:
        if cache.part(oid).lstat().st_size != size:
            return 0
    except OSError:
        return 0
    return held_bytes(_read_map(cache.part_map(oid), oid, size) or b"", size)


def allocated(cache: RepoCache, oid: str, size: int) -> int:
    """How much disk the part takes already, in bytes, at most the file's size."""
    try:
        return min(size, cache.part(oid).lstat().st_blocks * 512)
    except OSError:
        return 0


class Part:
    """One locked part. Methods may be called from several threads.

    They raise OSError as the disk does, and Closed after `close`.
    """

    def __init__(self, cache: RepoCache, oid: str, size: int, fd: int) -> None:
        self._cache, self._oid, self.size = cache, oid, size
        self._fd, self._map_fd = fd, -1
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self.chunks = bytearray()

    @classmethod
    def open(cls, cache: RepoCache, oid: str, size: int) -> Part | None:
        """Take up the part, or begin one. None while another process works on it.

        Raises: OSError; UnsafeFolder; DownloadFailed: a newer mlxd began it, and it was left as it is.
        """
        fd = cache.open_part(oid)
        if fd is None:
            return None
        part = cls(cache, oid, size, fd)
        try:
            part._take_up()
        except BaseException:
            part.close()
            raise
        return part

    def _take_up(self) -> None:
        path = self._cache.part_map(self._oid)
        if (version := _map_version(path)) > _VERSION:
            raise DownloadFailed(too_new(path, version, _VERSION), file=str(path))
        chunks = _read_map(path, self._oid, self.size) if os.fstat(self._fd).st_size == self.size else None
        if chunks is None:
            self._begin()
        else:
            self.chunks = chunks
            self._map_fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _begin(self) -> None:
        """The map goes first: no map may speak of bytes that are not there any more."""
        path = self._cache.part_map(self._oid)
        path.unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self.size)
        self.chunks = bytearray(chunk_count(self.size))
        if self._map_fd >= 0:
            os.close(self._map_fd)
            self._map_fd = -1
        self._map_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _write(self._map_fd, [_header(self._oid, self.size) + self.chunks], 0)

    def write(self, pieces: Sequence[bytes], at: int) -> None:
        """Write pieces that follow each other, from byte `at` on."""
        with self._writing:
            self._check()
            stop = at + sum(map(len, pieces))
            # What is marked may have been hashed: it must not change any more.
            if 1 in self.chunks[at // CHUNK_BYTES : chunk_count(stop)]:
                raise RuntimeError("a chunk that is there was to be written again")
            for first in range(0, len(pieces), _MAX_VECTOR):
                batch = pieces[first : first + _MAX_VECTOR]
                _write(self._fd, batch, at)
                at += sum(map(len, batch))

    def mark(self, chunks: range) -> None:
        """These chunks are written."""
        if chunks:
            with self._writing:
                self._check()
                ones = b"\1" * len(chunks)
                _write(self._map_fd, [ones], _HEADER.size + chunks.start)
                self.chunks[chunks.start : chunks.stop] = ones

    def read(self, into: memoryview, at: int) -> int:
        """Read what is there from byte `at` on. Returns how many bytes were read."""
        with self._reading:
            self._check()
            return os.preadv(self._fd, [into], at)

    def reset(self) -> None:
        """Throw away what is there."""
        with self._writing, self._reading:
            self._check()
            self._begin()

    def finish(self) -> None:
        """The file is whole and verified: have it reach the disk, and make it the blob."""
        with self._writing, self._reading:
            self._check()
            os.fsync(self._fd)
            self._cache.complete(self._oid)

    def discard(self) -> None:
        """Nobody needs the part: the file is there already."""
        with self._writing, self._reading:
            self._check()
            self._cache.part_map(self._oid).unlink(missing_ok=True)
            self._cache.part(self._oid).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it; what is there stays."""
        with self._writing, self._reading:
            for fd in (self._map_fd, self._fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._map_fd = -1

    def _check(self) -> None:
        if self._fd < 0:
            raise Closed


def _header(oid: str, size: int) -> bytes:
    return _HEADER.pack(_MAGIC + b"%d" % _VERSION, size, CHUNK_BYTES, oid.encode("ascii"))


def _map_version(path: Path) -> int:
    """The version of a map; 0 where there is none."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            magic, digit = (raw := file.read(8))[:7], raw[7:]
            return int(digit) if magic == _MAGIC and digit.isdigit() else 0
    return 0


def _read_map(path: Path, oid: str, size: int) -> bytearray | None:
    """The chunks that a map says are there; None where there is no map, or one that fits nothing."""
    header, count = _header(oid, size), chunk_count(size)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError), open(fd, "rb") as file:
        raw = file.read(len(header) + count + 1)
        if len(raw) == len(header) + count and raw.startswith(header):
            return bytearray(1 if byte == 1 else 0 for byte in raw[len(header) :])
    return None


def _write(fd: int, pieces: Sequence[bytes | bytearray], at: int) -> None:
    """All of the pieces: a system call may take fewer bytes than it was given."""
    total = sum(map(len, pieces))
    count = os.pwritev(fd, pieces, at)
    if count < total:
        rest = memoryview(b"".join(pieces))[count:]
        while rest:
            count = os.pwrite(fd, rest, at + total - len(rest))
            rest = rest[count:]
