"""One file of a download: what is known of it while it is fetched. Guarded by the transfer's lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from ..store.verify import Hasher
from .http import Route
from .listing import File
from .pace import Failures
from .parts import Part
from .segments import Segment, cut, front, held_bytes, missing


class State(Enum):
    WAITING = "waiting"  # nobody has looked yet, or another process works on it
    OPENING = "opening"
    OPEN = "open"  # bytes are being fetched
    WHOLE = "whole"  # all bytes are there; what is left is hashing
    DONE = "done"  # verified, and in its place


@dataclass(eq=False, slots=True)
class Target:
    """
    Attributes:
        force: the file is fetched although one of its name and size is there.
        pending, active: segments that nobody, or a connection, works on.
        epoch: rises with each failure that counts, so that connections that fail together count as one failure.
        not_before: monotonic seconds; nothing is tried earlier.
        have: bytes on disk.
        serial: the server knows no ranges; one connection reads the file from its first byte.
        hashed: bytes, from the first; `queued`: a hashing thread has it, or will.
    """

    file: File
    route: Route
    failures: Failures
    force: bool = False
    state: State = State.WAITING
    part: Part | None = None
    pending: deque[Segment] = field(default_factory=deque)
    active: set[Segment] = field(default_factory=set)
    epoch: int = 0
    not_before: float = 0.0
    have: int = 0
    serial: bool = False
    hasher: Hasher | None = None
    hashed: int = 0
    queued: bool = False

    def begin(self, part: Part, connections: int) -> None:
        """The part is ours: plan what is missing; what is there gets hashed first."""
        self.part = part
        self.hasher = Hasher(self.file.oid, self.file.size)
        self.hashed = 0
        self.have = held_bytes(part.chunks, self.file.size)
        self.pending = cut(missing(part.chunks, self.file.size), connections)
        self.state = State.OPEN if self.pending else State.WHOLE

    @property
    def opened(self) -> tuple[Part, Hasher]:
        """Its part and what hashes it, once `begin` has been called."""
        assert self.part is not None
        assert self.hasher is not None
        return self.part, self.hasher

    def next_segment(self) -> Segment | None:
        """The next piece of work, where there is one."""
        if not self.serial:
            return self.pending.popleft() if self.pending else None
        if self.active or not self.pending:
            return None
        self.pending.clear()
        return Segment(0, self.file.size, serial=True)

    def give_back(self, segment: Segment) -> None:
        """A connection gives up on the rest of its segment."""
        self.active.discard(segment)
        if self.serial:
            self.pending.append(segment)  # the next one begins at the first byte, whatever this one was
        elif segment.left > 0:
            self.pending.appendleft(segment)

    @property
    def front(self) -> int:
        """How far the file is there without a gap."""
        return front(self.part.chunks, self.file.size, self.hashed) if self.part is not None else 0
