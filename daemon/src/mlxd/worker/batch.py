"""mlx_lm's continuous batching, with the choice of tokens made for all rows at once.

mlx_lm's GenerationBatch calls one sampler and one list of processors for each row, and hands out each row's whole
vector of log probabilities. Here a row's sampler is a `Sampling`, a Plan samples all of them in one call, and a row's
`logprobs` say only what was asked. A row that decodes alone does so on a plain cache, as mlx_lm's `stream_generate`
does: the batched one costs a mask and per-row offsets in every layer. Joining, leaving, prefill and end-of-text tokens
are mlx_lm's.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch, greedy_sampler
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlxd_client.errors import InternalError

from .adapted import BASE, Mix
from .constraint import allows_any, apply_masks
from .kvcache import PromptCache, RowView, foreseen_bytes, take
from .patience import Patience
from .sampling import PENALTY_WINDOW, Plan, Sampling
from .speculation import Guess, can_take_back, prefixes, take_back
from .waits import Reuse, Waits

# A row that is still to be made: uid, max_tokens, sampling, processors, stops.
Copy = tuple[int, int, Sampling, tuple[Any, ...], Any]
# What a row's `logprobs` are where the model computed no finite numbers for it.
NOT_FINITE = "not finite"
# A row must have been alone for this many steps to get a plain cache: each change copies it.
STEPS_ALONE = 2
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
_NOTHING: deque[Any] = deque(maxlen=0)


class RowFailure:
    """What a row's `logprobs` are where one of its own processors raised: the row must end, the others go on."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RowBatch(GenerationBatch):  # type: ignore[misc]
    """A GenerationBatch whose `samplers` are Sampling objects.

    Responses carry in `logprobs`: None, NOT_FINITE, a RowFailure, or (chosen, ids, values) for a row that asked.

    Attributes:
        may_guess: nobody waits for a place: a row that decodes alone may guess ahead. One pass then brings several
            tokens, and each `next` says one of them; while any are `unsaid`, nothing is computed.
        newest: the token that comes next, where its value is known already.
    """

    # What mlx_lm's class holds, as used here.
    uids: list[int]
    tokens: list[list[int]]
    samplers: list[Sampling]
    logits_processors: list[tuple[Any, ...]]
    _next_tokens: Any
    _next_logprobs: list[Any]
    prompt_cache: list[Any]

    _plan: Plan | None = None
    _next_mass: mx.array | None = None  # [rows, 1], log of the sum of exp(logits): not finite if any logit is not
    _steps_alone = 0
    _plain = False  # one row, on plain caches
    _can_guess = False  # and these can be taken back
    may_guess = False
    newest: int | None = None
    unsaid: deque[tuple[int, Any]] = _NOTHING  # tokens that are in the caches, and what is noted of them

    def _step(self) -> tuple[list[int], list[Any]]:
        if self._can_guess:
            if self.unsaid:
                return self._say()
            guess = self.samplers[0].guess
            if guess is not None:
                guess.begin()
                if self.may_guess and self._check(guess):
                    return self._say()
            self.newest = None
        return self._step_all()

    def _check(self, guess: Guess) -> bool:
        """Have what is guessed to come next checked in one pass, as far as anything is guessed. What would have been
        chosen anyway is to be said then."""
        row, tokens = self.samplers[0], self.tokens[0]
        fed = guess.propose(self, self.max_tokens[0] - self._num_tokens[0] - 1)
        if fed is None:
            return False
        inputs = mx.array(fed, dtype=mx.uint32) if isinstance(fed, list) else fed
        count = inputs.shape[0]
        values = fed if isinstance(fed, list) else [0] * count  # what is not known is not looked at
        plan = Plan([row] * count, prefixes(tokens, values, PENALTY_WINDOW), inputs)
        with plan.mix or BASE:
            logits = self.model(inputs[None], cache=self.prompt_cache)[0]
        for processor in self.logits_processors[0]:
            logits = processor(None, logits)
        logits = plan.penalise(inputs, logits)
        mass = mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = logits - mass
        chosen = plan.sample(logprobs)
        reports = plan.report(logprobs, chosen)
        masses = mass if self._next_mass is None else mx.concatenate([self._next_mass, mass])
        mx.eval(inputs, chosen, masses, *reports.values())
        made, guessed = _ints(chosen), _ints(inputs)
        right = 0
        while right < count - 1 and made[right] == guessed[right + 1]:
            right += 1
        take_back(self.prompt_cache, count - 1 - right)
        guess.checked(count - 1, right)
        finite: list[bool] = mx.isfinite(masses)[-count:, 0].tolist()  # type: ignore[assignment]
        notes = [reports.get(index) if finite[index] else NOT_FINITE for index in range(right + 1)]
        first = self._next_logprobs[0]
        if masses.shape[0] > count and not math.isfinite(masses[0].item()):  # type: ignore[arg-type]
            first = NOT_FINITE
        self.unsaid = deque(zip(guessed[: right + 1], [first, *notes[:right]], strict=True))
        self.newest = made[right]
        self._next_tokens, self._next_logprobs = chosen[right : right + 1], [notes[right]]
        self._next_mass = mx.zeros((1, 1))  # what it was is noted
        self._plan = None
        return True

    def _say(self) -> tuple[list[int], list[Any]]:
        token, note = self.unsaid.popleft()
        self.tokens[0].append(token)
        return [token], [note]

    def _unsay(self) -> None:
        """Take back what was not said yet: the row is to be as if it had decoded token by token."""
        if self.unsaid:
            token, note = self.unsaid[0]
            take_back(self.prompt_cache, len(self.unsaid))
            self._next_tokens, self._next_logprobs = mx.array([token], dtype=mx.uint32), [note]
            self.newest = token
            self.unsaid.clear()

    def _step_all(self) -> tuple[list[int], list[Any]]:
        inputs, mass, notes = self._next_tokens, self._next_mass, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, notes
        if self._plan is None:
            self._plan = Plan(self.samplers, self.tokens, inputs)
        plan = self._plan
        if len(self.uids) == 1 and not self._plain:
            self._steps_alone += 1
            if self._steps_alone >= STEPS_ALONE:
                self._make_plain()

        with plan.mix or BASE:
            logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        self._next_logprobs = [None] * len(self.uids)
        if any(self.logits_processors):
            logits = self._run_processors(inputs, logits)
        logits = free = plan.penalise(inputs, logits)
        if plan.constrained:
            logits = self._constrain(plan, inputs, logits)
        self._next_mass = mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = logits - self._next_mass
        self._next_tokens = plan.sample(logprobs)
        pending: list[Any] = [self._next_tokens, self._next_mass]
        if plan.reporting and logits is not free:  # what the model itself thinks is reported
            logprobs = free - mx.logsumexp(free, axis=-1, keepdims=True)
        for index, report in plan.report(logprobs, self._next_tokens).items():
            if self._next_logprobs[index] is None:
                self._next_logprobs[index] = report
                pending.extend(report)
        mx.async_eval(*pending)  # type: ignore[no-untyped-call]

        # The next step computes while this one's tokens are read.
        if mass is None:
            mx.eval(inputs)
        else:
            mx.eval(inputs, mass)
            masses: Any = mass.tolist()
            for index, (value,) in enumerate(masses):
                if not math.isfinite(value):
                    notes[index] = NOT_FINITE
        chosen: list[int] = inputs.tolist()
        for history, token in zip(self.tokens, chosen, strict=True):
            history.append(token)
        return chosen, notes

    def _run_processors(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """Each row's own processors, as mlx_lm runs them, but a processor that raises costs its own row only."""
        rows = []
        for index, processors in enumerate(self.logits_processors):
            row = logits[index : index + 1]
            if processors:
                context = self._token_context[index].update_and_fetch(inputs[index : index + 1])
                try:
                    for processor in processors:
                        row = processor(context, row)
                except Exception as error:
                    self._next_logprobs[index] = RowFailure(error)
                    row = logits[index : index + 1]
            rows.append(row)
        return mx.concatenate(rows, axis=0)

    def _constrain(self, plan: Plan, inputs: mx.array, logits: mx.array) -> mx.array:
        """Rule out what constrained rows may not go on with. That takes their newest tokens' values; the forward pass
        computes meanwhile. A constraint that raises costs its own row only."""
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        newest: Any = inputs.tolist()
        masks = {}
        for index, constraint in plan.constrained:
            if self._next_logprobs[index] is not None:
                continue
            try:
                mask = constraint.follow(newest[index])
                if mask is None:
                    continue
                masks[index] = mask
                if not allows_any(mask, logits.shape[-1]):
                    raise InternalError("the rule of this answer allows no token that the model has")
            except Exception as error:
                masks.pop(index, None)
                self._next_logprobs[index] = RowFailure(error)
        plan.constrained = [(index, constraint) for index, constraint in plan.constrained if not constraint.over]
        return apply_masks(logits, masks) if masks else logits

    def extend(self, batch: RowBatch) -> None:
        self._unsay()
        self._make_batched()
        batch._make_batched()
        super().extend(batch)
        self._plan = None
        if self._next_mass is None:
            self._next_mass = batch._next_mass
        elif batch._next_mass is not None:
            self._next_mass = mx.concatenate([self._next_mass, batch._next_mass])

    def filter(self, keep: list[int]) -> None:
        if len(keep) == len(self.uids):
            return
        super().filter(keep)  # where the caches are plain there is one row, so that nothing is left of them
        self._plan = None
        self._steps_alone, self._plain, self._can_guess = 0, False, False
        self.unsaid.clear()
        self._next_mass = self._next_mass[keep] if keep and self._next_mass is not None else None

    def extract_cache(self, idx: int) -> RowView | None:
        self._unsay()
        return take(self.prompt_cache, idx, len(self.tokens[idx]))

    def _make_plain(self) -> None:
        """Caches of other types stay as they are: a batch of one."""
        if any(type(cache) is BatchKVCache and cache.keys is None for cache in self.prompt_cache):
            return
        self.prompt_cache = [c.extract(0) if type(c) is BatchKVCache else c for c in self.prompt_cache]
        self._plain = True
        self._can_guess = can_take_back(self.prompt_cache)
        if (guess := self.samplers[0].guess) is not None:
            guess.pause()

    def _make_batched(self) -> None:
        if self._plain:
            self.prompt_cache = [BatchKVCache.merge([c]) if type(c) is KVCache else c for c in self.prompt_cache]
        self._steps_alone, self._plain, self._can_guess = 0, False, False
        self.newest = None


class RowPrompts(PromptProcessingBatch):  # type: ignore[misc]
    """A PromptProcessingBatch that hands over to a RowBatch."""

    def prompt(self, tokens: list[list[int]]) -> None:
        with Mix.of([row.adapter for row in self.samplers]) or BASE:
            super().prompt(tokens)

    def split(self, indices: list[int]) -> RowPrompts:
        if len(indices) < len(self.uids):
            rest: RowPrompts = super().split(indices)
            return rest
        whole = copy(self)  # mlx_lm copies all caches twice
        self.__dict__.update(RowPrompts.empty(self.model, self.fallback_sampler, self.prefill_step_size).__dict__)
        return whole

    def extract_cache(self, idx: int) -> RowView | None:
        return take(self.prompt_cache, idx, len(self.tokens[idx]))

    def generate(self, tokens: list[list[int]]) -> RowBatch:
        if any(len(row) > 1 for row in tokens):
            self.prompt([row[:-1] for row in tokens])
        return RowBatch(
            self.model,
            self.uids,
            mx.array([row[-1] for row in tokens]),
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )


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
    """

    _uid_count: int  # mlx_lm's
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
        self._steps = 0
        self._copies: dict[int, list[Copy]] = {}  # by the uid of the row whose prompt they share, until that is read
        self._copied: set[int] = set()  # uids of copies that wait for their place in the batch

    def pace_like(self, other: RowGenerator) -> None:
        """Begin with what another one learned of how fast the device reads."""
        self._prefill_rate = other._prefill_rate

    def _next(self) -> Any:
        alone = self.active == len(self._generation_batch) and not self.waiting and not self.crowded
        self._generation_batch.may_guess = alone
        held = self._patience.arrange(self) if self.may_read else []
        if self._copies and self.may_read:
            self._copy_read()
        if self._waits:
            self._waits.free(self._unprocessed_sequences)
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
                self._prompt_cache.tree.fit(self.live_bytes())
        return made

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


def _ints(array: mx.array) -> list[int]:
    values: Any = array.tolist()
    return list(values)


def _is_read(segments: list[list[int]]) -> bool:
    """Nothing of a prompt is left to read but its last token."""
    return len(segments) == 1 and len(segments[0]) == 1
