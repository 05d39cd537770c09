"""Several batches side by side: rows whose caches or shapes differ cannot decode in one. Each kind has a lane.

Lanes take turns, a step each. Prompts are read in one lane at a time, and between two such readings each lane that
decodes has had its step: however many lanes there are, a stream waits for the reading of one. Where all rows are of
the plain kind there is one lane, and nothing of this is done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from .batch import RowGenerator
from .kvcache import PromptCache, RowView
from .sampling import Sampling
from .waits import Reuse

__all__ = ["PLAIN", "LaneKey", "Lanes"]


@dataclass(frozen=True, slots=True)
class LaneKey:
    """What rows must have in common to decode together."""


PLAIN = LaneKey()


class Lane:
    """One batch, and when it last read prompts, in turns."""

    __slots__ = ("key", "read_at", "rows")

    def __init__(self, key: LaneKey, rows: RowGenerator) -> None:
        self.key = key
        self.rows = rows
        self.read_at = 0

    @property
    def busy(self) -> bool:
        return bool(self.rows.active or self.rows.waiting)


class Lanes:
    """All rows of one model, with the face of a single RowGenerator; `uid`s are unique over all lanes.

    Args:
        model: the loaded model.
        max_batch, prefill_step, prefill_joins: as RowGenerator has them, for each lane.
        prompt_cache: serves the plain lane; in the others the same tokens come to other numbers.
    """

    def __init__(self, model: Any, *, prompt_cache: PromptCache | None = None, **limits: int) -> None:
        self._model = model
        self._limits = limits
        self._prompt_cache = prompt_cache
        self._plain = Lane(PLAIN, self._make(PLAIN))
        self._lanes = deque([self._plain])  # whose turn is next comes first
        self._homes: dict[int, Lane] = {}  # by uid
        self._uids = 0
        self._turns = 0
        self._owed: set[Lane] = set()  # they decode, and have not since prompts were last read
        self._stepping = self._plain

    def _make(self, key: LaneKey) -> RowGenerator:
        cache = self._prompt_cache if key == PLAIN else None
        return RowGenerator(self._model, **self._limits, prompt_cache=cache, beside=self._beside_plain)

    # --- rows

    def add(
        self,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling,
        processors: list[Any],
        stops: Any,
        reuse: Reuse | None = None,
        *,
        key: LaneKey = PLAIN,
    ) -> int:
        """Queue one prompt. Returns the number that its responses carry as `uid`."""
        self._uids += 1
        lane = self._lane(key)
        uid = lane.rows.add(tokens, max_tokens, sampling, processors, stops, reuse, uid=self._uids)
        self._homes[uid] = lane
        return uid

    def view(self, uid: int) -> tuple[RowView | None, list[int]]:
        """See RowGenerator."""
        return self._homes[uid].rows.view(uid) if uid in self._homes else (None, [])

    def drop(self, uid: int) -> tuple[RowView | None, list[int]]:
        """See RowGenerator."""
        lane = self._homes.pop(uid, None)
        if lane is None:
            return None, []
        view = lane.rows.drop(uid)
        self._leave(lane)
        return view

    @property
    def plain(self) -> RowGenerator:
        return self._plain.rows

    @property
    def active(self) -> int:
        return sum(lane.rows.active for lane in self._lanes)

    @property
    def waiting(self) -> int:
        return sum(lane.rows.waiting for lane in self._lanes)

    def live_bytes(self) -> int:
        """See RowGenerator; of all lanes."""
        return self._plain.rows.live_bytes()

    def _beside_plain(self) -> int:
        return sum(lane.rows.own_bytes() for lane in self._lanes if lane is not self._plain)

    # --- lanes

    def _lane(self, key: LaneKey) -> Lane:
        """The lane of that kind, opened where there is none."""
        for lane in self._lanes:
            if lane.key == key:
                return lane
        lane = Lane(key, self._make(key))
        lane.rows.pace_like(self._plain.rows)
        self._lanes.append(lane)
        return lane

    def _leave(self, lane: Lane) -> None:
        """A lane that is empty is closed, but for the plain one."""
        if lane is not self._plain and not lane.busy:
            self._close(lane)

    def _close(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        self._owed.discard(lane)
        lane.rows.close()

    def close(self) -> None:
        for lane in self._lanes:
            lane.rows.close()

    # --- steps

    def settle(self) -> None:
        """See RowGenerator."""
        self._stepping = self._plain
        self._plain.rows.settle()

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of the lane whose turn it is: what became of prompts, and the rows' new tokens."""
        lane = self._plain if len(self._lanes) == 1 else self._turn()
        self._stepping = lane
        made: tuple[list[Any], list[Any]] = lane.rows.next()
        for response in made[1]:
            if response.finish_reason is not None:
                self._homes.pop(response.uid, None)
        if len(self._lanes) > 1:
            self._stepped(lane, bool(made[0]))
        return made

    def _turn(self) -> Lane:
        """The next lane that has something to do.

        1. The lanes go round.
        2. One of them may read prompts: of those that have any, the one that has not read for longest; and not before
           all others that decode have had a step since prompts were last read.
        3. A lane that neither decodes nor may read is passed over.
        """
        lane = self._plain
        for _ in range(len(self._lanes)):
            self._lanes.rotate(-1)
            lane = self._lanes[-1]
            lane.rows.may_read = self._may_read(lane)
            if lane.rows.decoding or lane.rows.may_read:
                return lane
        return lane

    def _may_read(self, lane: Lane) -> bool:
        readers = [other for other in self._lanes if other.rows.can_read]
        if not readers or lane is not min(readers, key=lambda other: other.read_at):
            return False
        return not any(other is not lane and other.rows.decoding for other in self._owed)

    def _stepped(self, lane: Lane, read: bool) -> None:
        self._owed.discard(lane)
        if read:
            self._turns += 1
            lane.read_at = self._turns
            self._owed = {other for other in self._lanes if other.rows.decoding}
        self._leave(lane)
        if len(self._lanes) == 1:
            self._plain.rows.may_read = True
            self._owed.clear()

    def fail(self) -> list[int]:
        """The last step raised: put a clean batch in the place of the lane that took it.

        Returns:
            The rows that were lost with it.
        """
        lane = self._stepping
        lost = [uid for uid, home in self._homes.items() if home is lane]
        for uid in lost:
            del self._homes[uid]
        self._owed.discard(lane)
        if lane is self._plain:
            lane.rows.close()
            lane.rows = self._make(PLAIN)
        elif lane in self._lanes:
            self._close(lane)
        if len(self._lanes) == 1:
            self._plain.rows.may_read = True
            self._owed.clear()
        return lost
