"""The rows that decode together, with the choice of tokens made for all of them at once.

mlx_lm's GenerationBatch calls one sampler and one list of processors for each row, and hands out each row's whole
vector of log probabilities. Here a row's sampler is a `Sampling`, a Plan samples all of them in one call, and a row's
`logprobs` say only what was asked. A row that decodes alone does so on a plain cache, as mlx_lm's `stream_generate`
does: the batched one costs a mask and per-row offsets in every layer. Prefill and end-of-text tokens are mlx_lm's.
"""

from __future__ import annotations

import math
from collections import deque
from copy import copy
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlxd_client.errors import InternalError

from .adapted import BASE, Mix
from .constraint import allows_any, apply_masks
from .kvcache import RowView, take
from .places import MOST_PADDING, Places, can_stay_open, close_up, is_full, leave_open, padding, put
from .sampling import PENALTY_WINDOW, Plan, Sampling
from .speculation import Guess, can_take_back, prefixes, take_back

# What a row's `logprobs` are where the model computed no finite numbers for it.
NOT_FINITE = "not finite"
# A row must have been alone for this many steps to get a plain cache: each change copies it.
STEPS_ALONE = 2
# For how many steps a place stays open for a row that joins, and after how many it is looked whether there are
# positions that no row has any more. Closing and giving up copy all rows' caches.
STEPS_OPEN = 8
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
        may_leave_open: there is memory for places that no row has for a while; see Places.
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
    may_leave_open = True
    newest: int | None = None
    unsaid: deque[tuple[int, Any]] = _NOTHING  # tokens that are in the caches, and what is noted of them
    _places: Places | None = None  # where the rows lie in the caches; None where they lie in their own order
    _mix: Mix | None = None  # the adapter of each place
    _steps_open = 0
    _made = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._made = True
        self._next_logprobs = [None] * len(self.uids)
        self._num_tokens = [-1] * len(self.uids)  # the last token of their prompts is to go in first

    def next(self) -> list[Any]:
        """One step: a Response for each row but those that only begin with it."""
        if not self.uids:
            return []
        keep, responses = [], []
        for row, (token, note) in enumerate(zip(*self._step(), strict=True)):
            self._num_tokens[row] += 1
            if self._num_tokens[row] == 0:
                keep.append(row)
                continue
            reason = "length" if self._num_tokens[row] >= self.max_tokens[row] else None
            if self._matchers[row].advance(token):
                reason = "stop"
            if reason is None:
                keep.append(row)
                responses.append(self.Response(self.uids[row], token, note, None, None, None))
            else:
                kept = self.extract_cache(row), self.tokens[row]
                responses.append(self.Response(self.uids[row], token, note, reason, *kept))
        self.filter(keep)
        return responses

    def _step(self) -> tuple[list[int], list[Any]]:
        if not self._made:  # mlx_lm has a batch begin as it is made: one more pass, where it could join one
            return [], []
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
        if self._places is not None:
            self._tidy(self._places)

        logits = self._compute(inputs, plan)
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

    def _compute(self, inputs: mx.array, plan: Plan) -> mx.array:
        """What the model makes of the next token of each row: logits, [rows, vocabulary]."""
        places = self._places
        fed = inputs if places is None else places.spread(inputs)
        with (plan.mix if places is None else self._mix) or BASE:
            logits: mx.array = self.model(fed[:, None], cache=self.prompt_cache)[:, -1, :]
        return logits if places is None else places.gather(logits)

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
        """Have the rows of another batch join, which have not begun yet. Where nobody decodes they begin at once; else
        with the next step of all."""
        self._unsay()
        self._make_batched()
        if not self.uids:
            batch._step_all()
            batch._num_tokens = [0] * len(batch.uids)
        mass, rows = self._next_mass, len(self.uids)
        caches, self.prompt_cache = self.prompt_cache, []
        super().extend(batch)
        self.prompt_cache = self._join(caches, rows, batch.prompt_cache, len(batch.uids))
        self._plan = None
        joining = batch._next_mass if batch._next_mass is not None else mx.zeros((len(batch.uids), 1))
        self._next_mass = joining if mass is None else mx.concatenate([mass, joining])

    def _join(self, caches: list[Any], rows: int, others: list[Any], joining: int) -> list[Any]:
        """The caches of both. Rows that join take open places as far as there are enough of them."""
        if not caches:
            return others
        places = self._places or Places(rows)
        taken = places.open[:joining]
        if taken and len(taken) == joining and can_stay_open(caches) and can_stay_open(others):
            put(caches, others, taken)
            places.join(taken)
        else:
            for cache, other in zip(caches, others, strict=True):
                cache.extend(other)
            places.join([], joining)
        self._lie(places)
        return caches

    def _lie(self, places: Places) -> None:
        """From now on the rows have these places."""
        self._places = None if places.straight else places
        self._steps_open = 0
        self._mix = None
        if self._places is not None and any(row.adapter is not None for row in self.samplers):
            adapters: list[Any] = [None] * places.count
            for row, place in zip(self.samplers, places.of, strict=True):
                adapters[place] = row.adapter
            self._mix = Mix.of(adapters)

    def _tidy(self, places: Places) -> None:
        """Close places that stayed open for long, and give up positions that no row has any more."""
        self._steps_open += 1
        if len(places.of) < places.count and self._steps_open > STEPS_OPEN:
            self.close_places()
            return
        full = is_full(self.prompt_cache)
        due = 1 if full else MOST_PADDING
        if (full or self._steps_open % STEPS_OPEN == 0) and padding(self.prompt_cache, self.tokens) >= due:
            close_up(self.prompt_cache)

    def close_places(self) -> None:
        """Have the caches hold nothing but the rows, in their order."""
        if self._places is not None:
            for cache in self.prompt_cache:
                cache.filter(self._places.of)
            self._lie(Places(len(self.uids)))

    @property
    def open_places(self) -> int:
        return 0 if self._places is None else self._places.count - len(self._places.of)

    def filter(self, keep: list[int]) -> None:
        if len(keep) == len(self.uids):
            return
        places = self._places or Places(len(self.uids))
        caches, self.prompt_cache = self.prompt_cache, []
        super().filter(keep)
        places.leave(keep)
        # An open place costs its share of each step, and closing it a copy of what the rows hold.
        stays = self.may_leave_open and 2 * len(keep) >= places.count and can_stay_open(caches)
        if keep and stays and padding(caches, self.tokens) < MOST_PADDING:
            leave_open(caches, places.open)
            self._lie(places)
        else:
            if keep:  # where the caches are plain there is one row, so that nothing is left of them
                for cache in caches:
                    cache.filter(places.of)
            self._lie(Places(len(keep)))
        self.prompt_cache = caches if keep else []
        self._plan = None
        self._steps_alone, self._plain, self._can_guess = 0, False, False
        self.unsaid.clear()
        self._next_mass = self._next_mass[keep] if keep and self._next_mass is not None else None

    def extract_cache(self, idx: int) -> RowView | None:
        self._unsay()
        place = idx if self._places is None else self._places.of[idx]
        return take(self.prompt_cache, place, len(self.tokens[idx]))

    def _make_plain(self) -> None:
        """Caches of other types stay as they are: a batch of one."""
        self.close_places()
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


def _ints(array: mx.array) -> list[int]:
    values: Any = array.tolist()
    return list(values)
