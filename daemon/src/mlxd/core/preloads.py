"""Models that are to be loaded although nobody waits for them: at the daemon's start, once they are downloaded, and
again where a worker died.

Such a load waits in the line as any other. It makes nobody go, unless its model is pinned, and where it fails it is not
tried again; a worker that died is another matter, and its breaker says when the next may start.
"""

from __future__ import annotations

from . import events as ev
from .book import Book
from .line import LoadLine
from .records import ModelRecord


class Preloads:
    """Brings the models of the rules into the line of loads."""

    def __init__(self, book: Book, line: LoadLine) -> None:
        self._book = book
        self._line = line

    def preload(self, event: ev.Preload, now: float) -> None:
        record = self._book.models.get(event.model)
        if record is not None and record.preload and record.worker is None:
            record.preload_at = max(now, self._line.breakers.retry_at(record.id) or now)

    def forget(self, record: ModelRecord) -> None:
        """Take the wish back where the rules do not have it any more. A load that began goes on."""
        if not record.preload:
            record.preloading, record.preload_at = record.preloading and record.worker is not None, None

    def next_deadline(self) -> float | None:
        if self._book.draining:
            return None
        times = (self._due(name) for name in self._book.rules.preload)
        return min((t for t in times if t is not None), default=None)

    def _due(self, name: str) -> float | None:
        record = self._book.models.get(name)
        return None if record is None else record.preload_at

    def settle(self, now: float) -> None:
        """Have those begin that are due."""
        if self._book.draining:
            return
        for name in self._book.rules.preload:
            due = self._due(name)
            if due is None or due > now:
                continue
            record = self._book.models[name]
            record.preload_at = None
            if record.worker is None and record.lifecycle.state == "Downloaded" and not record.deleting:
                record.preloading = record.kind == "model"
                record.needed = record.needed or record.preloading
                self._book.touch(record)
