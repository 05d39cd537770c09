"""Which bytes of a file are there, which are missing, and who fetches which of them. Pure: no files, no network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# What a kill can lose of each connection's work: a chunk counts once all of it has been written.
CHUNK_BYTES = 512 * 1024
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 4 * 1024 * 1024, 32 * 1024 * 1024
# Less than this is not worth another connection's start.
MIN_SPLIT_BYTES = 16 * 1024 * 1024


def chunk_count(size: int) -> int:
    return -(-size // CHUNK_BYTES)


@dataclass(slots=True, eq=False)
class Segment:
    """Bytes `at` to `stop` of a file, to be fetched in one go. It began at a chunk's first byte; `at` moves on as bytes
    are written, and `stop` may move back where another connection takes the rest."""

    at: int
    stop: int
    serial: bool = False  # the whole file, asked for without a range; what is there of it is skipped
    marked: int = -1  # the first chunk that is not complete yet; set from `at`

    def __post_init__(self) -> None:
        if self.marked < 0:
            self.marked = self.at // CHUNK_BYTES

    @property
    def left(self) -> int:
        return self.stop - self.at

    def advance(self, count: int, size: int) -> range:
        """`count` more bytes have been written, of a file of `size`. Returns the chunks that this completed."""
        self.at += count
        first = self.marked
        self.marked = chunk_count(size) if self.at >= size else self.at // CHUNK_BYTES
        return range(first, self.marked)

    def split(self) -> Segment | None:
        """Give away the second half, if it is worth it."""
        if self.left < MIN_SPLIT_BYTES:
            return None
        middle = -(-(self.at + self.left // 2) // CHUNK_BYTES) * CHUNK_BYTES
        given = Segment(middle, self.stop)
        self.stop = middle
        return given


def held_bytes(chunks: bytes | bytearray, size: int) -> int:
    """How many bytes the complete chunks are; the last one of a file may be short."""
    if not chunks:
        return 0
    full = chunks.count(1)
    return full * CHUNK_BYTES - (len(chunks) * CHUNK_BYTES - size if chunks[-1] == 1 else 0)


def front(chunks: bytes | bytearray, size: int, start: int = 0) -> int:
    """How far the file is there without a gap, in bytes; it is known to be up to byte `start`."""
    first_missing = chunks.find(0, start // CHUNK_BYTES)
    return size if first_missing < 0 else min(size, first_missing * CHUNK_BYTES)


def missing(chunks: bytes | bytearray, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each gap, in order."""
    at = 0
    while (first := chunks.find(0, at)) >= 0:
        at = chunks.find(1, first)
        at = len(chunks) if at < 0 else at
        yield first * CHUNK_BYTES, min(size, at * CHUNK_BYTES)


def cut(gaps: Iterable[tuple[int, int]], connections: int) -> deque[Segment]:
    """The gaps in pieces, in order: large enough to be worth a request, small enough for all connections to help."""
    gaps = list(gaps)
    share = sum(stop - start for start, stop in gaps) // (2 * connections)
    length = min(max(share, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES) // CHUNK_BYTES * CHUNK_BYTES
    return deque(
        Segment(start, min(start + length, stop)) for first, stop in gaps for start in range(first, stop, length)
    )
