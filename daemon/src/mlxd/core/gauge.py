"""What was measured of memory last, and whether it is good enough to decide on: a load wants a reading that is fresh.

Where nothing was ever measured, or nothing can be, the budget alone decides.
"""

from __future__ import annotations

from . import actions as do
from . import events as ev
from .book import Book
from .pressure import Reading

# Seconds. A reading may be so old for a load that waits in line to be decided on by it.
FRESH_S = 1.0
# So long after a worker's exit a load is not refused for what the system lacks: it may still be giving memory back, of
# a GPU above all. Meanwhile it is measured again so often.
SETTLE_S, AGAIN_S = 2.0, 0.25


class Gauge:
    """The last reading.

    Attributes:
        reading: None where nothing could be read.
        at: when it was begun, on the core's clock; None before the first.
    """

    def __init__(self, book: Book) -> None:
        self._book = book
        self.reading: Reading | None = None
        self.at: float | None = None
        self._exit_at: float | None = None
        self._asked_at: float | None = None
        self._again_at: float | None = None
        self._fresh_until = 0.0

    def note(self, event: ev.Measured, now: float) -> None:
        self.reading, self.at = event.reading, event.began_at
        self._fresh_until = event.began_at + FRESH_S
        if self._asked_at is not None and event.began_at >= self._asked_at:
            self._asked_at = None
            self._fresh_until = now + FRESH_S  # however long it took: a busy machine must not keep loads for ever
        if self._again_at is not None and event.began_at >= self._again_at:
            self._again_at = None

    def exited(self, now: float) -> None:
        """A worker is gone: what was read before counts it still."""
        self._exit_at = now

    def ready(self, now: float, since: float = 0.0) -> bool:
        """Whether a load may be decided on now, by a reading that was begun after `since`, when the last one joined the
        line. Where not, a measurement is under way, or due."""
        if self.at is None:
            return True
        if self._again_at is not None:
            if now >= self._again_at:
                self._ask(now)
            return False
        since = since if self._exit_at is None else max(since, self._exit_at)
        stale = now > self._fresh_until or self.at < since
        if stale:
            self._ask(now)
        return not stale

    def settling(self, now: float) -> bool:
        """Whether memory may still be coming back from a worker that went; then it will be measured again."""
        if self._exit_at is None or now >= self._exit_at + SETTLE_S:
            return False
        self._again_at = now + AGAIN_S
        return True

    def rest(self) -> None:
        """No load waits any more."""
        self._again_at = None

    @property
    def waited_for(self) -> bool:
        return self._asked_at is not None or self._again_at is not None

    def next_deadline(self) -> float | None:
        return self._again_at if self._asked_at is None else None

    @property
    def spare_bytes(self) -> int | None:
        """What the system has for a new load: beyond what is to be left to others, and beyond what was promised to the
        workers that are there and that they have not taken yet. None where that is not known."""
        available = None if self.reading is None else self.reading.available_bytes
        if available is None:
            return None
        promised = sum(max(0, m.reserved_bytes - (m.footprint_bytes or 0)) for m in self._book.by_worker.values())
        return available - self._book.limits.reserve_bytes - promised

    def _ask(self, now: float) -> None:
        if self._asked_at is None:
            self._asked_at = now
            self._book.out.append(do.Measure())
