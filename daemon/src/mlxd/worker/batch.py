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
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch, greedy_sampler
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlxd_client.errors import InternalError

from .constraint import allows_any, apply_masks
from .kvcache import PromptCache, RowView, foreseen_bytes, take
from .sampling import Plan, Sampling
from .waits import Reuse, Waits

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
# How many tokens are read the first time, of all prompts together, while nobody knows yet how long that takes.
FIRST_PREFILL = 64
# How many steps the batch may grow before it is looked at again how much it holds.
LOOK_STEPS = 16


class RowFailure:
    """What a row's `logprobs` are where one of its own processors raised: the row must end, the others go on."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RowBatch(GenerationBatch):  # type: ignore[misc]
    """A GenerationBatch whose `samplers` are Sampling objects.

    Responses carry in `logprobs`: None, NOT_FINITE, a RowFailure, or (chosen, ids, values) for a row that asked.
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

    def _step(self) -> tuple[list[int], list[Any]]:
        inputs, mass, notes = self._next_tokens, self._next_mass, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, notes
        if self._plan is None:
            self._plan = Plan(self.samplers, self.tokens, inputs)
        plan = self._plan
        if len(self.uids) == 1 and not self._plain:
            self._steps_alone += 1
            if self._steps_alone >= STEPS_ALONE:
                self._make_plain()

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
        self._steps_alone, self._plain = 0, False
        self._next_mass = self._next_mass[keep] if keep and self._next_mass is not None else None

    def extract_cache(self, idx: int) -> RowView | None:
        return take(self.prompt_cache, idx, len(self.tokens[idx]))

    def _make_plain(self) -> None:
        """Caches of other types stay as they are: a batch of one."""
        if any(type(cache) is BatchKVCache and cache.keys is None for cache in self.prompt_cache):
            return
        self.prompt_cache = [c.extract(0) if type(c) is BatchKVCache else c for c in self.prompt_cache]
        self._plain = True

    def _make_batched(self) -> None:
        if self._plain:
            self.prompt_cache = [BatchKVCache.merge([c]) if type(c) is KVCache else c for c in self.prompt_cache]
        self._steps_alone, self._plain = 0, False


class RowPrompts(PromptProcessingBatch):  # type: ignore[misc]
    """A PromptProcessingBatch that hands over to a RowBatch."""

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
        prompt_cache: where prompts find what was computed before; None computes everything.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int,
        prefill_step: int,
        prefill_joins: int = MOST_PREFILLS,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        super().__init__(
            model,
            completion_batch_size=max_batch,
            prefill_batch_size=min(MOST_PREFILLS, max_batch),
            prefill_step_size=prefill_step,
        )
        self._most_prefills = min(MOST_PREFILLS, max_batch)
        self._prefill_joins = prefill_joins
        self._prompt_batch = RowPrompts.empty(model, greedy_sampler, prefill_step_size=prefill_step)
        self._generation_batch = RowBatch.empty(model, greedy_sampler)
        self._most_prefill = prefill_step
        self._prefill_rate = FIRST_PREFILL / PREFILL_S  # tokens per second, of all prompts together
        self._prompt_cache = prompt_cache
        self._reuses: dict[int, Reuse] = {}  # by uid, of prompts whose reading has not begun
        self._waits = Waits(prompt_cache.tree) if prompt_cache is not None else None
        self._steps = 0

    def _next(self) -> Any:
        reading = len(self._prompt_batch)
        self.prefill_batch_size = min(reading + self._prefill_joins, self._most_prefills)
        rows = min(self.prefill_batch_size, reading + len(self._unprocessed_sequences)) - self._read_prompts()
        fitting = self._prefill_rate * PREFILL_S / max(rows, 1)
        self.prefill_step_size = int(max(min(fitting, self._most_prefill), min(LEAST_PREFILL, self._most_prefill)))
        if self._waits is not None and (self._unprocessed_sequences or self._waits):
            joins = self.prefill_batch_size - reading
            self._waits.sort(self._unprocessed_sequences, joins, self._reuses, self._left_to_read)
        counters = self._counters
        tokens, seconds = counters.prompt_tokens, counters.prompt_time
        made = super()._next()
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

    def settle(self) -> None:
        """Have the prompt cache copy what it is to keep, beside what the rows hold now."""
        if self._prompt_cache is not None and self._prompt_cache.pending:
            with mx.stream(self.stream):
                self._prompt_cache.settle(self.live_bytes())

    def _left_to_read(self, uid: int) -> int | None:
        if uid in self._prompt_batch.uids:
            _, done, total = self._currently_processing[self._prompt_batch.uids.index(uid)]
            return int(total - done)
        return 0 if uid in self._generation_batch.uids else None

    def _make_batch(self, n: int) -> Any:
        if self._reuses and self._prompt_cache is not None:
            for index in range(n):
                reuse = self._reuses.pop(self._unprocessed_sequences[index][0], None)
                if reuse is not None:
                    self._take_up(index, reuse, self._prompt_cache)
        return super()._make_batch(n)

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
        """What the caches of all rows hold, and will hold before the next look at it."""
        ahead = {self._prompt_batch: self._most_prefill, self._generation_batch: LOOK_STEPS}
        return sum(foreseen_bytes(batch.prompt_cache, len(batch), tokens) for batch, tokens in ahead.items())

    def _read_prompts(self) -> int:
        """How many prompts are read but for their last token, with which their first decode step begins."""
        return sum(len(segments) == 1 and len(segments[0]) == 1 for segments, *_ in self._currently_processing)

    def add(
        self,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling,
        processors: list[Any],
        stops: Any,
        reuse: Reuse | None = None,
    ) -> int:
        """Queue one prompt. Returns the number that its responses carry as `uid`."""
        uids: list[int] = self.insert(
            [tokens],
            max_tokens=[max_tokens],
            samplers=[sampling],
            logits_processors=[processors],
            stop_sequences=[stops],
        )
        if reuse is not None:
            self._reuses[uids[0]] = reuse
        return uids[0]

    def view(self, uid: int) -> tuple[RowView | None, list[int]]:
        """What the caches hold for a row now, and the tokens that this is of."""
        with mx.stream(self.stream):
            view, tokens = self.extract_cache([uid]).get(uid) or (None, [])
        return (view, tokens) if isinstance(view, RowView) else (None, [])

    def drop(self, uid: int) -> tuple[RowView | None, list[int]]:
        """Take a row out, whatever it is at. Returns its `view`."""
        view = self.view(uid)
        self.remove([uid])
        self._reuses.pop(uid, None)
        if self._waits is not None:
            self._waits.remove(uid)
        return view

    @property
    def active(self) -> int:
        return len(self._generation_batch) + len(self._prompt_batch)

    @property
    def waiting(self) -> int:
        return len(self._unprocessed_sequences) + len(self._waits or ())
