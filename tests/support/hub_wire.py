"""What a test and its hub process say to each other: contents of files, faults, records of requests.

A content knows its size and gives its bytes in pieces from any offset, without holding more than a piece. A `Sparse`
one is computed: a file of 60 GB costs neither disk nor memory, on either side.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

PIECE_BYTES = 1 << 20
MARK_BYTES = 8


@lru_cache(maxsize=8)
def _noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PIECE_BYTES)


class Data(msgspec.Struct, tag=True, frozen=True):
    """Bytes as they are."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        view = memoryview(self.data)
        for position in range(start, stop, PIECE_BYTES):
            yield view[position : min(position + PIECE_BYTES, stop)]


class OnDisk(msgspec.Struct, tag=True, frozen=True):
    """A file of the test's, which must stay as it is for as long as the hub serves it."""

    path: str
    size: int

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        buffer = bytearray(min(PIECE_BYTES, max(stop - start, 1)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                count = file.readinto(memoryview(buffer)[: min(len(buffer), stop - start)])
                if not count:
                    raise OSError(f"{self.path} became shorter")
                yield memoryview(buffer)[:count]
                start += count


class Sparse(msgspec.Struct, tag=True, frozen=True):
    """`size` bytes that are computed as they are read: `head`, then seeded noise that repeats each MiB, with the number
    of the MiB written into its first 8 bytes, so that no two pieces are equal.

    Attributes:
        declared_sha256: taken for the content's hash unread. None computes it when the file is committed.
    """

    size: int
    seed: int = 0
    head: bytes = b""
    declared_sha256: str | None = None

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """A view is good until the next one is asked for."""
        buffer = bytearray(_noise(self.seed))
        while start < stop:
            number, inside = divmod(start, PIECE_BYTES)
            until = min(stop, (number + 1) * PIECE_BYTES)
            buffer[:MARK_BYTES] = number.to_bytes(MARK_BYTES, "little")
            if start < len(self.head):
                block = bytearray(buffer)
                overlay = self.head[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
                block[: len(overlay)] = overlay
                yield memoryview(block)[inside : inside + until - start]
            else:
                yield memoryview(buffer)[inside : inside + until - start]
            start = until

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(bytes(piece) for piece in self.pieces(start, self.size if stop is None else stop))


Content = Data | OnDisk | Sparse


def sparse_safetensors(size: int, *, seed: int = 0, name: str = "weight", sha256: str | None = None) -> Sparse:
    """A valid safetensors file of exactly `size` bytes: one tensor of U8, named `name`, of noise."""
    header_bytes = 256
    count = size - 8 - header_bytes
    if count < 1:
        raise ValueError("no room for the header")
    entry = {name: {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}
    header = json.dumps(entry, separators=(",", ":")).encode().ljust(header_bytes)
    if len(header) != header_bytes:
        raise ValueError("the name is too long")
    return Sparse(size, seed, header_bytes.to_bytes(8, "little") + header, sha256)


def git_oid(content: Content) -> str:
    digest = hashlib.sha1(b"blob %d\0" % content.size)
    for piece in content.pieces(0, content.size):
        digest.update(piece)
    return digest.hexdigest()


def sha256(content: Content) -> str:
    if isinstance(content, Sparse) and content.declared_sha256 is not None:
        return content.declared_sha256
    digest = hashlib.sha256()
    for piece in content.pieces(0, content.size):
        digest.update(piece)
    return digest.hexdigest()


class Fault(msgspec.Struct):
    """One kind of misbehaviour, and what it befalls. See `Hub.fault`."""

    kind: str
    repo: str
    file: str | None = None
    where: list[str] = []
    method: str | None = None
    times: int | None = None
    after: int | None = None
    at: int | None = None
    by: int = 1
    bytes_per_s: float = 0.0
    status: int = 0
    retry_after: str | None = None
    code: str | None = None
    value: Any = None
    id: int = 0
    fired: int = 0
    skip: int = 0
    about_siblings: bool = False


class Request(msgspec.Struct):
    """One request that the hub saw. `bytes_sent` are those of the body that the kernel took: the client may have read
    less. `ended` is empty while the answer goes on, then `whole`, `cut` (by a fault) or `client` (it went away)."""

    number: int
    method: str
    host: str
    path: str
    query: str
    range: str | None
    had_authorization: bool
    accept_encoding: str
    user_agent: str
    repo: str | None
    file: str | None
    where: list[str]
    status: int = 0
    bytes_sent: int = 0
    held: bool = False
    ended: str = ""


class Call(msgspec.Struct):
    """From the test to the hub."""

    method: str
    params: dict[str, msgspec.Raw]


class Reply(msgspec.Struct):
    result: Any = None
    error: str | None = None
    timed_out: bool = False
