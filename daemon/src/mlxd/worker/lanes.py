"""Several batches side by side: rows whose caches or shapes differ cannot decode in one. Each kind has a lane.

Lanes take turns, a step each. Prompts are read in one lane at a time, and between two such readings each lane that
decodes has had its step: however many lanes there are, a stream waits for the reading of one. Where all rows are of
the plain kind there is one lane, and nothing of this is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from mlxd_client.errors import RpcError

from .admission import Admission, Waiting, refusal
from .batch import RowGenerator
from .kvcache import PromptCache, RowView
from .lanecaches import PLAIN, Footprint, Kinds, LaneKey
from .sampling import Sampling
from .waits import Reuse

__all__ = ["PLAIN", "LaneKey", "Lanes"]

# How many tokens of a prompt are read at a time where the answer must not depend on how fast that went.
FIXED_PREFILL = 64


class Lane:
    """One batch.

    Attributes:
        width: how many of its rows hold caches at a time.
        read_at: when it last read prompts, in turns.
        lengths: how many tokens each row may come to, by uid.
    """

    __slots__ = ("footprint", "key", "lengths", "read_at", "rows", "width")

    def __init__(self, key: LaneKey, rows: RowGenerator, width: int) -> None:
        self.key = key
        self.rows = rows
        self.width = width
        self.read_at = 0
        self.lengths: dict[int, int] = {}
        self.footprint: Footprint | None = None

    @property
    def busy(self) -> bool:
        return bool(self.lengths)

    def foreseen(self, more: int = 0, count: int = 1) -> int:
        """See admission.Foreseen."""
        rows = min(len(self.lengths) + (count if more > 0 else 0), self.width + self.rows.most_aside)
        rows += self.rows.open_places
        if self.footprint is None or rows == 0:
            return 0
        return self.footprint.bytes(rows, max([more, *self.lengths.values()]))


class Lanes:
    """All rows of one model, with the face of a single RowGenerator; `uid`s are unique over all lanes.

    Args:
        model: the loaded model.
        window: how many tokens rows see that go on beyond the context.
        max_batch, prefill_step, prefill_joins: as RowGenerator has them, for each lane.
        prompt_cache: serves the plain lane; in the others the same tokens come to other numbers.
        kv_bytes: what the caches of all rows may hold together; 0 is no limit.
    """

    def __init__(
        self, model: Any, *, window: int, prompt_cache: PromptCache | None = None, kv_bytes: int = 0, **limits: int
    ) -> None:
        self._model = model
        self._limits = limits
        self._prompt_cache = prompt_cache
        self._kinds = Kinds(model, window)
        self._admission = Admission(kv_bytes)
        self._lanes: deque[Lane] = deque()  # whose turn is next comes first
        self._plain = self._open(PLAIN)
        self._homes: dict[int, Lane] = {}  # by uid
        self._uids = 0
        self._turns = 0
        self._owed: set[Lane] = set()  # they decode, and have not since prompts were last read
        self._stepping = self._plain

    def _make(self, key: LaneKey) -> RowGenerator:
        limits = dict(self._limits)
        if key.alone:
            limits |= {"max_batch": 1}
        if key.deterministic:
            limits |= {"fixed_prefill": FIXED_PREFILL}
        cache = self._prompt_cache if key == PLAIN else None
        return RowGenerator(self._model, **limits, prompt_cache=cache, beside=self._beside_plain)

    def check(self, key: LaneKey) -> None:
        """Raises Unsupported where this model cannot have such rows."""
        if key != PLAIN:
            self._kinds.footprint(key)

    # --- rows

    def fit(self, key: LaneKey, prompt: int, wished: int, *, asked: bool, rows: int = 1) -> int:
        """See Admission."""
        if not self._admission.limit_bytes:
            return wished
        rows = min(rows, self._limits["max_batch"])
        return self._admission.fit(self._kinds.footprint(key), prompt, wished, asked=asked, rows=rows)

    def add_all(
        self,
        tokens: list[int],
        max_tokens: int,
        samplings: list[Sampling],
        processors: list[Any],
        stops: Any,
        reuse: Reuse | None = None,
        *,
        key: LaneKey = PLAIN,
        urgent: bool = True,
    ) -> list[int]:
        """Queue one prompt for as many answers as there are samplings; see `add`. In the plain lane it is read once;
        in the others each answer reads it by itself, as what they promise wants it.

        Returns: the numbers of their rows.
        """
        options: dict[str, Any] = {"key": key, "urgent": urgent}
        if key == PLAIN:
            first = self.add(
                tokens, max_tokens, samplings[0], processors, stops, reuse, copies=samplings[1:], **options
            )
            return list(range(first, first + len(samplings)))
        return [self.add(tokens, max_tokens, each, processors, stops, reuse, **options) for each in samplings]

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
        urgent: bool = True,
        copies: Sequence[Sampling] = (),
    ) -> int:
        """Queue one prompt, behind those that wait for memory. Returns the number that its responses carry as `uid`.

        Args:
            urgent: it goes before those that are not.
            copies: further rows that share its prefill; their numbers follow on its own.
        """
        uid, length = self._uids + 1, len(tokens) + max_tokens
        self._uids += 1 + len(copies)

        def enter() -> None:
            lane = self._lane(key)
            caches = None if key.kv_bits == 0 and not key.rotate else self._kinds.caches(key)
            lane.rows.add(tokens, max_tokens, sampling, processors, stops, reuse, uid=uid, caches=caches, urgent=urgent)
            if copies:
                lane.rows.copy(uid, copies, max_tokens, processors, stops)
            for each in range(uid, uid + 1 + len(copies)):
                lane.lengths[each] = length
                self._homes[each] = lane

        if not self._admission.limit_bytes:
            enter()
            return uid
        rows = min(1 + len(copies), self._limits["max_batch"])
        row = Waiting(uid, key, self._kinds.footprint(key), length, len(tokens), urgent, enter, rows=rows)
        self._admission.add(row)
        self._admission.admit(self._foreseen)
        return uid

    def holds_back(self, uid: int) -> bool:
        """A row still waits for memory."""
        return any(row.uid == uid for row in self._admission.line)

    def view(self, uid: int) -> tuple[RowView | None, list[int]]:
        """See RowGenerator."""
        return self._homes[uid].rows.view(uid) if uid in self._homes else (None, [])

    def drop(self, uid: int) -> tuple[RowView | None, list[int]]:
        """See RowGenerator."""
        lane = self._homes.get(uid)
        if lane is None:
            self._admission.remove(uid)
            return None, []
        self._stepping = lane
        view = lane.rows.drop(uid)
        del self._homes[uid], lane.lengths[uid]
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
        return sum(lane.rows.waiting for lane in self._lanes) + len(self._admission.line)

    def live_bytes(self) -> int:
        """See RowGenerator; of all lanes."""
        return self._plain.rows.live_bytes()

    # --- memory

    def allow(self, kv_bytes: int) -> None:
        """From now on rows begin only where the caches of all stay within so many bytes; 0 is no limit."""
        self._admission.limit_bytes = kv_bytes

    def refuse(self) -> list[tuple[int, RpcError]]:
        """Rows that wait and can never begin, since less is allowed than when they came. They are gone."""
        refused: list[tuple[int, RpcError]] = []
        while (row := self._admission.hopeless(self._foreseen)) is not None:
            answer = row.length - row.prompt
            left = refusal(row.footprint, row.prompt, answer, self._admission.limit_bytes, rows=row.rows)
            refused.append((row.uid, left))
        return refused

    def _foreseen(self, key: LaneKey | None = None, more: int = 0, rows: int = 1) -> int:
        """See admission.Foreseen."""
        total = 0
        for lane in self._lanes:
            if lane.footprint is None and lane.lengths:
                lane.footprint = self._kinds.footprint(lane.key)
            mine = lane.key == key
            total += lane.foreseen(more if mine else 0, rows)
            key = None if mine else key
        return total if key is None else total + self._kinds.footprint(key).bytes(rows, more)

    def _beside_plain(self) -> int:
        return sum(lane.rows.own_bytes() for lane in self._lanes if lane is not self._plain)

    # --- lanes

    def _lane(self, key: LaneKey) -> Lane:
        """The lane of that kind, opened where there is none."""
        for lane in self._lanes:
            if lane.key == key:
                return lane
        lane = self._open(key)
        lane.rows.pace_like(self._plain.rows)
        return lane

    def _open(self, key: LaneKey) -> Lane:
        lane = Lane(key, self._make(key), 1 if key.alone else self._limits["max_batch"])
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
        if len(self._lanes) == 1:  # it takes no turns any more
            self._plain.rows.may_read = True
            self._owed.clear()

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
        if self._admission.line:
            for lane in self._lanes:
                lane.rows.close_places()
            self._admission.admit(self._foreseen)
        lane = self._plain if len(self._lanes) == 1 else self._turn()
        self._stepping = lane
        lane.rows.crowded = len(self._lanes) > 1
        lane.rows.tight = self._admission.limit_bytes > 0 and len(lane.lengths) > lane.width
        made: tuple[list[Any], list[Any]] = lane.rows.next()
        self._note_ends(lane, made[1])
        if len(self._lanes) > 1:
            self._stepped(lane, bool(made[0]))
        return made

    def rest(self) -> list[Any]:
        """See RowGenerator; of the lane that took the last step."""
        responses = self._stepping.rows.rest()
        self._note_ends(self._stepping, responses)
        return responses

    def _note_ends(self, lane: Lane, responses: list[Any]) -> None:
        for response in responses:
            if response.finish_reason is not None:
                self._homes.pop(response.uid, None)
                lane.lengths.pop(response.uid, None)

    def _turn(self) -> Lane:
        """The next lane that has something to do.

        1. The lanes go round.
        2. One of them may read prompts: of those that have any, urgent ones first, the one that has not read for
           longest; and not before all others that decode have had a step since prompts were last read.
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
        if not lane.rows.can_read:
            return False
        rank = not lane.rows.urgent, lane.read_at
        if any((not other.rows.urgent, other.read_at) < rank for other in self._lanes if other.rows.can_read):
            return False
        return not any(other is not lane and other.rows.decoding for other in self._owed)

    def _stepped(self, lane: Lane, read: bool) -> None:
        self._owed.discard(lane)
        if read:
            self._turns += 1
            lane.read_at = self._turns
            self._owed = {other for other in self._lanes if other.rows.decoding}
        self._leave(lane)

    def fail(self) -> list[int]:
        """The last step or `drop` raised: put a clean batch in the place of the lane that it was of.

        Returns:
            The rows that were lost with it.
        """
        lane = self._stepping
        lost = [uid for uid, home in self._homes.items() if home is lane]
        for uid in lost:
            del self._homes[uid]
        lane.lengths.clear()
        self._owed.discard(lane)
        if lane is self._plain:
            lane.rows.close()
            lane.rows = self._make(PLAIN)
        elif lane in self._lanes:
            self._close(lane)
        self._stepping = self._plain  # what it held goes
        return lost
