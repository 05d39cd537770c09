"""Prompts of batch requests step aside while prompts of interactive ones are read, also in the middle."""

from __future__ import annotations

from typing import Any

__all__ = ["Patience"]


class Patience:
    """Whose prompts can wait, in one RowGenerator, and what was read of those that do.

    Attributes:
        uids: prompts that are not urgent, until they are read.
        batch: a RowPrompts, of rows that stepped aside; None where there are none.
    """

    def __init__(self) -> None:
        self.uids: set[int] = set()
        self.batch: Any = None
        self._progress: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self.uids)

    def __len__(self) -> int:
        return 0 if self.batch is None else len(self.batch)

    def add(self, uid: int) -> None:
        self.uids.add(uid)

    def read(self, uid: int) -> None:
        """Its prompt is read."""
        self.uids.discard(uid)

    def urgent(self, rows: Any) -> bool:
        """There is a prompt to be read that cannot wait."""
        queue = rows._unprocessed_sequences
        return any(uid not in self.uids for uid in (*rows._prompt_batch.uids, *(row[0] for row in queue)))

    def arrange(self, rows: Any) -> list[Any]:
        """Before a step that reads: put those aside who have to wait, or have them go on.

        Returns:
            What was taken out of the queue for this step.
        """
        if not self.uids:
            return []
        if not self.urgent(rows):
            self._go_on(rows)
            return []
        aside = [index for index, uid in enumerate(rows._prompt_batch.uids) if uid in self.uids]
        if aside:
            progress = rows._currently_processing
            self._progress += [progress[index] for index in aside]
            rows._currently_processing = [one for index, one in enumerate(progress) if index not in set(aside)]
            parted = rows._prompt_batch.split(aside)
            if self.batch is None:
                self.batch = parted
            else:
                self.batch.extend(parted)
        queue = rows._unprocessed_sequences
        held = [row for row in queue if row[0] in self.uids]
        if held:
            kept = [row for row in queue if row[0] not in self.uids]
            queue.clear()
            queue.extend(kept)
        return held

    def _go_on(self, rows: Any) -> None:
        if self.batch is not None:
            rows._prompt_batch.extend(self.batch)
            rows._currently_processing.extend(self._progress)
            self.batch, self._progress = None, []

    def at(self, uid: int) -> int | None:
        """The place of a row that stepped aside, in `batch`."""
        return self.batch.uids.index(uid) if self.batch is not None and uid in self.batch.uids else None

    def left(self, uid: int) -> int | None:
        """How many tokens of its prompt are still to be read."""
        index = self.at(uid)
        if index is None:
            return None
        _, done, total = self._progress[index]
        return int(total - done)

    def remove(self, uid: int) -> None:
        self.uids.discard(uid)
        index = self.at(uid)
        if index is not None:
            del self._progress[index]
            self.batch.filter([other for other in range(len(self.batch)) if other != index])
            if not len(self.batch):
                self.batch = None
