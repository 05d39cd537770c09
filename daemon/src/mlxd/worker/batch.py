"""mlx_lm's continuous batching: which prompts are read when, from where on, and which rows decode; see rows.py for how.

Joining, leaving and prefill are mlx_lm's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch, greedy_sampler

from .kvcache import PromptCache, RowView, foreseen_bytes
from .patience import Patience
from .rows import RowBatch, RowPrompts
from .sampling import Sampling
from .waits import Reuse, Waits

# A row that is still to be made: uid, max_tokens, sampling, processors, stops.
Copy = tuple[int, int, Sampling, tuple[Any, ...], Any]
# How long reading prompts may take between two decode steps, in seconds, as far as the last step tells: meanwhile no
# stream goes on, nothing is cancelled, and no sign of life is given.
PREFILL_S = 0.5
# Fewer tokens of a prompt than this are not read at a time, however slow the device is.
LEAST_PREFILL = 4
# How many prompts are read together.
MOST_PREFILLS = 8
# Prompts of which no more than this is to be read, all of them together, begin together wherever none is being read; so
# do more, as far as they take no longer than so many seconds. Product for product and step for step, rows that go
# together cost a CPU hardly more than one that goes alone.
SHORT_PREFILLS, SHORT_S = 128, 0.25
# How many tokens are read the first time, of all prompts together, while nobody knows yet how long that takes.
FIRST_PREFILL = 64
# How many steps the batch may grow before it is looked at again how much it holds.
LOOK_STEPS = 16


class RowGenerator(BatchGenerator):  # type: ignore[misc]
    """A BatchGenerator over RowBatch.

    Args:
        model: the loaded model, called as model(tokens, cache=...).
        max_batch: how many rows decode together; further ones wait.
        prefill_step: how many tokens of each prompt are read between two decode steps at most; see PREFILL_S.
        prefill_joins: how many prompts begin to be read in one step at most. One that takes several steps is read
            together with those that begin after it.
        most_prefills: how many prompts are read together at most.
        prompt_cache: where prompts find what was computed before; None computes everything.
        beside: what caches hold that are none of these rows', as far as the prompt cache has to mind them.
        fixed_prefill: this many tokens of a prompt are read at a time, however long it takes; 0 leaves it to PREFILL_S.

    Attributes:
        may_read: whether the next step goes on reading prompts; else it decodes only.
        crowded: there are rows elsewhere that take turns with these.
        tight: more rows wait than there are places, and memory is counted: none of a row that left stays open.
    """

    # What mlx_lm's class holds, as used here.
    _uid_count: int
    _currently_processing: list[Any]
    completion_batch_size: int

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int,
        prefill_step: int,
        prefill_joins: int = MOST_PREFILLS,
        most_prefills: int = MOST_PREFILLS,
        prompt_cache: PromptCache | None = None,
        beside: Callable[[], int] = lambda: 0,
        fixed_prefill: int = 0,
    ) -> None:
        prefill_step = fixed_prefill or prefill_step
        super().__init__(
            model,
            completion_batch_size=max_batch,
            prefill_batch_size=min(most_prefills, max_batch),
            prefill_step_size=prefill_step,
        )
        self._most_prefills = min(most_prefills, max_batch)
        self._prefill_joins = prefill_joins
        self._prompt_batch = RowPrompts.empty(model, greedy_sampler, prefill_step_size=prefill_step)
        self._generation_batch = RowBatch.empty(model, greedy_sampler)
        self._most_prefill = prefill_step
        self._prefill_rate = FIRST_PREFILL / PREFILL_S  # tokens per second, of all prompts together
        self._prompt_cache = prompt_cache
        self._reuses: dict[int, Reuse] = {}  # by uid, of prompts whose reading has not begun
        self._waits = Waits(prompt_cache.tree) if prompt_cache is not None else None
        self._beside = beside
        self._fixed_prefill = fixed_prefill
        self._patience = Patience()
        self.may_read = True
        self.crowded = False
        self.tight = False
        self._roomy = True  # the rows leave the prompt cache half of what they may have together
        self._steps = 0
        self._copies: dict[int, list[Copy]] = {}  # by the uid of the row whose prompt they share, until that is read
        self._copied: set[int] = set()  # uids of copies that wait for their place in the batch

    def pace_like(self, other: RowGenerator) -> None:
        """Begin with what another one learned of how fast the device reads."""
        self._prefill_rate = other._prefill_rate

    def _next(self) -> Any:
        alone = self.active == len(self._generation_batch) and not self.waiting and not self.crowded
        self._generation_batch.may_guess = alone
        self._generation_batch.may_leave_open = self._roomy and not self.tight
        if self._waits:
            self._waits.free(self._unprocessed_sequences)
        held = self._patience.arrange(self) if self.may_read else []
        if self._copies and self.may_read:
            self._copy_read()
        joined = self._join_read()
        reading, copied = len(self._prompt_batch), len(self._copied)
        joins = max(self._prefill_joins, self._short_prompts())
        self.prefill_batch_size = min(reading + joins, self._most_prefills) + copied
        rows = min(self.prefill_batch_size, reading + len(self._unprocessed_sequences)) - self._read_prompts() - copied
        fitting = self._prefill_rate * PREFILL_S / max(rows, 1)
        self.prefill_step_size = int(max(min(fitting, self._most_prefill), min(LEAST_PREFILL, self._most_prefill)))
        self.prefill_step_size = self._fixed_prefill or self.prefill_step_size
        if self._waits is not None and self._unprocessed_sequences:
            joins = self.prefill_batch_size - reading
            self._waits.sort(self._unprocessed_sequences, joins, self._reuses, self._left_to_read)
        counters = self._counters
        tokens, seconds = counters.prompt_tokens, counters.prompt_time
        made = super()._next() if self.may_read else self._decode()
        made[0].extend(joined)
        if self._patience:
            self._unprocessed_sequences.extend(held)
            for progress in made[0]:
                if progress.end_of_prompt:
                    self._patience.read(progress.uid)
        if counters.prompt_tokens > tokens:
            self._prefill_rate = (counters.prompt_tokens - tokens) / (counters.prompt_time - seconds)
        if self._prompt_cache is not None and self._waits is not None:
            if self._waits.reading:
                for response in made[1]:
                    self._waits.begun(response.uid)
            self._steps += 1
            if made[0] or self._steps % LOOK_STEPS == 0:
                self._fit(self._prompt_cache)
        return made

    def _fit(self, prompt_cache: PromptCache) -> None:
        """What is kept has what the rows leave. Where they take more than half, no place of theirs stays open."""
        live = self.live_bytes()
        self._roomy = 2 * live <= prompt_cache.tree.budget_bytes
        if self.open_places and not self._roomy:
            self._generation_batch.close_places()
            live = self.live_bytes()
        prompt_cache.tree.fit(live)

    def _short_prompts(self) -> int:
        """How many of those that wait are short enough to begin together; see SHORT_PREFILLS."""
        count = longest = 0
        most = max(SHORT_PREFILLS, self._prefill_rate * SHORT_S)
        if self._fixed_prefill or not self.may_read:
            return 0
        if len(self._unprocessed_sequences) > 1 and len(self._prompt_batch) == self._read_prompts():
            for uid, segments, *_ in itertools.islice(self._unprocessed_sequences, self._most_prefills):
                if uid in self._copied:
                    continue
                left = sum(len(segment) for segment in segments)
                reuse = self._reuses.get(uid)
                if reuse is not None and self._prompt_cache is not None and left > LEAST_PREFILL:
                    tokens = [token for segment in segments for token in segment]
                    left -= self._prompt_cache.tree.peek(reuse.namespace, tokens, left - 1)
                longest = max(longest, left)
                if longest * (count + 1) > most:
                    break
                count += 1
        return count

    def _join_read(self) -> list[Any]:
        """Prompts that are read but for their last token: that goes into the next step of all. mlx_lm would take one of
        its own for it. Returns what to say of them."""
        if not self.may_read or len(self._generation_batch) >= self.completion_batch_size:
            return []
        processing = self._currently_processing
        joining = [index for index, (segments, *_) in enumerate(processing) if _is_read(segments)]
        if not joining:
            return []
        last, totals = zip(*((processing[index][0][0], processing[index][2]) for index in joining), strict=True)
        self._currently_processing = [one for index, one in enumerate(processing) if index not in set(joining)]
        batch = self._prompt_batch.split(joining).generate(list(last))
        told = [
            PromptProcessingBatch.Response(uid, (total, total), True, True)
            for uid, total in zip(batch.uids, totals, strict=True)
        ]
        self._generation_batch.extend(batch)
        return told

    def rest(self) -> list[Any]:
        """A further token that the last step brought, in a list; empty where that was all."""
        if not self._generation_batch.unsaid:
            return []
        with mx.stream(self.stream):
            responses: list[Any] = self._generation_batch.next()
            return responses

    def _decode(self) -> Any:
        """A step as if there were no place for another row."""
        places, self.completion_batch_size = self.completion_batch_size, 0
        try:
            return super()._next()
        finally:
            self.completion_batch_size = places

    def settle(self) -> None:
        """Have the prompt cache copy what it is to keep, beside what the rows hold now."""
        if self._prompt_cache is not None and self._prompt_cache.pending:
            with mx.stream(self.stream):
                self._prompt_cache.settle(self.live_bytes())

    def _left_to_read(self, uid: int) -> int | None:
        if uid in self._prompt_batch.uids:
            _, done, total = self._currently_processing[self._prompt_batch.uids.index(uid)]
            return int(total - done)
        return 0 if uid in self._generation_batch.uids else self._patience.left(uid)

    def _make_batch(self, n: int) -> Any:
        # mlx_lm counts those that decode; those that are read go on to decode, and hold caches already.
        n = min(n, self.completion_batch_size - len(self._generation_batch) - len(self._prompt_batch))
        if n <= 0:
            return RowPrompts.empty(self.model, greedy_sampler, prefill_step_size=self.prefill_step_size)
        if self._reuses and self._prompt_cache is not None:
            for index in range(n):
                reuse = self._reuses.pop(self._unprocessed_sequences[index][0], None)
                if reuse is not None:
                    self._take_up(index, reuse, self._prompt_cache)
        if not self._copies and not self._copied:
            return super()._make_batch(n)
        joining = list(itertools.islice(self._unprocessed_sequences, n))
        made = super()._make_batch(n)
        for uid, segments, _, caches, tokens, *_ in joining:
            self._copied.discard(uid)
            if uid in self._copies and _is_read(segments):
                self._queue_copies(uid, segments[0][0], caches, tokens)
        return made

    # --- several answers to one prompt

    def copy(
        self, uid: int, samplings: Sequence[Sampling], max_tokens: int, processors: list[Any], stops: Any
    ) -> list[int]:
        """Have a prompt that was just added answered once more for each Sampling, from what is computed for it once.

        Returns: their uids.
        """
        first = self._uid_count
        self._uid_count = first + len(samplings)
        uids = list(range(first, self._uid_count))
        self._copies[uid] = [
            (uid, max_tokens, sampling, tuple(processors), stops) for uid, sampling in zip(uids, samplings, strict=True)
        ]
        return uids

    def _copy_read(self) -> None:
        """Prompts that are read but for their last token, and are to be answered several times, are copied now."""
        for index, (segments, *_) in enumerate(self._currently_processing):
            uid = self._prompt_batch.uids[index]
            if uid in self._copies and _is_read(segments):
                caches = PromptProcessingBatch.extract_cache(self._prompt_batch, index)
                self._queue_copies(uid, segments[0][0], caches, self._prompt_batch.tokens[index])

    def _queue_copies(self, uid: int, last: int, caches: list[Any], tokens: list[int]) -> None:
        """They are next in line, all with the same caches: those are copied when rows join a batch."""
        for number, most, sampling, processors, stops in reversed(self._copies.pop(uid)):
            row = (number, [[last]], most, caches, list(tokens), sampling, processors, stops)
            self._unprocessed_sequences.appendleft(row)
            self._copied.add(number)

    def _take_up(self, index: int, reuse: Reuse, prompt_cache: PromptCache) -> None:
        """Have the prompt of a waiting row begin where what is kept of it ends."""
        uid, segments, most, caches, _, *rest = self._unprocessed_sequences[index]
        tokens = [token for segment in segments for token in segment]
        found = prompt_cache.find(reuse.namespace, tokens)
        if found is not None:
            caches, reuse.cached = found
            prompt_cache.tree.fit(self.live_bytes() + sum(cache.nbytes for cache in caches))
        edges = sorted({reuse.cached, *(cut for cut in reuse.cuts if cut > reuse.cached), len(tokens) - 1, len(tokens)})
        segments = [tokens[start:end] for start, end in itertools.pairwise(edges)]
        self._unprocessed_sequences[index] = (uid, segments, most, caches, tokens[: reuse.cached], *rest)

    def live_bytes(self) -> int:
        """What the caches of all rows hold, those beside these included, and will hold before the next look at it."""
        return self.own_bytes() + self._beside()

    def own_bytes(self) -> int:
        ahead = {self._prompt_batch: self._most_prefill, self._generation_batch: LOOK_STEPS}
        if self._patience.batch is not None:
            ahead[self._patience.batch] = 0
        total = sum(foreseen_bytes(batch.prompt_cache, len(batch), tokens) for batch, tokens in ahead.items())
        if self._copied:  # copies of one prompt share their caches until they join
            waiting = {id(row[3]): row[3] for row in self._unprocessed_sequences if row[0] in self._copied}
            total += sum(cache.nbytes for caches in waiting.values() for cache in caches)
        return total

    @property
    def open_places(self) -> int:
        """How many places of the rows' caches have no row; see Places."""
        count: int = self._generation_batch.open_places
        return count

    @property
    def most_aside(self) -> int:
        """How many prompts may come to hold caches beyond the places there are, since they step aside; see Patience."""
        return min(len(self._patience.uids), self._most_prefills)

    def close_places(self) -> None:
        if self.open_places:
            with mx.stream(self.stream):
                self._generation_batch.close_places()

    def _read_prompts(self) -> int:
        """How many prompts are read but for their last token, with which their first decode step begins."""
        return sum(_is_read(segments) for segments, *_ in self._currently_processing)

    def add(
        self,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling,
        processors: list[Any],
        stops: Any,
        reuse: Reuse | None = None,
        *,
        uid: int | None = None,
        caches: list[Any] | None = None,
        urgent: bool = True,
    ) -> int:
        """Queue one prompt. Returns the number that its responses carry as `uid`.

        Args:
            uid: that number, where it is not to be the next one.
            caches: what the row decodes on, empty; None has the model make them. See also `Reuse.begun`.
            urgent: its prompt is read before those that are not.
        """
        if uid is not None:
            self._uid_count = uid
        read = 0
        if reuse is not None and reuse.begun is not None:
            caches, read = reuse.begun
        uids: list[int] = self.insert(
            [tokens[read:]],
            max_tokens=[max_tokens],
            caches=None if caches is None else [caches],
            all_tokens=[tokens[:read]],
            samplers=[sampling],
            logits_processors=[processors],
            stop_sequences=[stops],
        )
        if reuse is not None and read == 0:
            self._reuses[uids[0]] = reuse
        if not urgent:
            self._patience.add(uids[0])
        return uids[0]

    def view(self, uid: int) -> tuple[RowView | None, list[int]]:
        """What the caches hold for a row now, and the tokens that this is of."""
        with mx.stream(self.stream):
            aside = self._patience.at(uid)
            if aside is not None:
                batch = self._patience.batch
                return batch.extract_cache(aside), batch.tokens[aside]
            view, tokens = self.extract_cache([uid]).get(uid) or (None, [])
        return (view, tokens) if isinstance(view, RowView) else (None, [])

    def drop(self, uid: int) -> tuple[RowView | None, list[int]]:
        """Take a row out, whatever it is at. Returns its `view`."""
        view = self.view(uid)
        self.remove([uid])
        self._patience.remove(uid)
        self._reuses.pop(uid, None)
        self._copies.pop(uid, None)
        self._copied.discard(uid)
        if self._waits is not None:
            self._waits.remove(uid)
        return view

    @property
    def active(self) -> int:
        return len(self._generation_batch) + len(self._prompt_batch) + len(self._patience)

    @property
    def decoding(self) -> bool:
        return len(self._generation_batch) > 0

    @property
    def can_read(self) -> bool:
        """There are prompts to be read, and places for them."""
        unread = len(self._prompt_batch) or self._unprocessed_sequences or self._waits or len(self._patience)
        return bool(unread) and len(self._generation_batch) < self.completion_batch_size

    @property
    def urgent(self) -> bool:
        """There are prompts to be read that cannot wait."""
        return self._patience.urgent(self)

    @property
    def waiting(self) -> int:
        unmade = sum(map(len, self._copies.values())) if self._copies else 0
        return len(self._unprocessed_sequences) + len(self._waits or ()) + unmade


def _is_read(segments: list[list[int]]) -> bool:
    """Nothing of a prompt is left to read but its last token."""
    return len(segments) == 1 and len(segments[0]) == 1
