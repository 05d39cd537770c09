"""How the next tokens of a whole batch are chosen: penalties, filters and draws, each one call for all rows.

The filters are mlx_lm's; the order is its too: logit bias, repetition, presence, frequency penalty, then log
probabilities, top_p, min_p, xtc, top_k, temperature, draw. What differs from its samplers is where randomness comes
from: each request has a key of its own and each position of it a key of its own, so that who else is in the batch
changes nothing. A draw is Gumbel-max, argmax(logprobs / temperature + Gumbel noise), which is how
`mx.random.categorical` draws.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from .adapted import Mix, Slot
from .constraint import Constraint
from .speculation import Guess

# How many of the latest tokens the penalties look at; mlx_lm's default.
PENALTY_WINDOW = 20
# top_p, min_p, top_k, and the tokens that xtc spares where it is on.
Filters = tuple[float, float, int, tuple[int, ...] | None]
_COUNT = mx.array([0, 1], dtype=mx.uint32)
# What a request draws besides its tokens comes from its key with this laid over it.
_XTC_KEYS = mx.array([0x9E3779B9, 0], dtype=mx.uint32)


@dataclass(frozen=True, slots=True)
class Sampling:
    """One request's way to choose tokens.

    Attributes:
        temperature: 0 takes the most likely token and never draws.
        xtc_probability, xtc_threshold: how often all but the last of the tokens above the threshold are left out.
        spared: tokens that this never leaves out.
        repetition, presence, frequency: penalties over the last PENALTY_WINDOW tokens; 1, 0 and 0 do nothing.
        logprobs: how many alternatives to report for each token; -1 reports nothing.
        key: two 32-bit words; equal keys draw equal noise.
        constraint: what the answer has to follow; see RowBatch.
        adapter: what the model is changed by for this row.
        guess: guesses the answer's next tokens, where that is wished; see RowBatch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    spared: tuple[int, ...] = ()
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logprobs: int = -1
    key: tuple[int, int] = (0, 0)
    constraint: Constraint | None = None
    adapter: Slot | None = None
    guess: Guess | None = None

    @property
    def penalised(self) -> bool:
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    @property
    def filters(self) -> Filters | None:
        """What rows must share to be drawn together; None for greedy ones."""
        xtc = self.spared if self.xtc_probability > 0 else None
        return (self.top_p, self.min_p, self.top_k, xtc) if self.temperature > 0 else None


def make_key(seed: int | None) -> tuple[int, int]:
    """The key of a request: from its seed, or from the system's randomness where it has none."""
    raw = os.urandom(8) if seed is None else hashlib.blake2b(seed.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(raw[:4], "big"), int.from_bytes(raw[4:], "big")


def other_key(key: tuple[int, int], index: int) -> tuple[int, int]:
    """The key of a request's answer `index`, from that of its first, which is number 0."""
    if index == 0:
        return key
    raw = b"".join(number.to_bytes(4, "big") for number in (*key, index))
    made = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(made[:4], "big"), int.from_bytes(made[4:], "big")


def apply_xtc(
    logprobs: mx.array, draws: mx.array, probability: mx.array, threshold: mx.array, spared: tuple[int, ...]
) -> mx.array:
    """mlx_lm's function of that name, for rows of their own probabilities and thresholds, and with given draws.

    Args:
        logprobs: [rows, vocabulary].
        draws, probability, threshold: [rows, 1]; draws are uniform in [0, 1).
    """
    probs = mx.softmax(logprobs, -1)
    above = probs > mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    if spared:
        above[..., list(spared)] = False
    return mx.where((draws <= probability) & above, -mx.inf, logprobs)


def compile_draws(row: Sampling, vocabulary: int) -> None:
    """Compile what rows like this one that are sampled together would otherwise wait for, and the first guesses that
    are checked: on a CPU that runs a compiler, twice, and a busy machine takes its time for it."""
    inputs = mx.array([0, 0])
    plan = Plan([row, row], [[0], [0]], inputs)
    mx.eval(plan.sample(plan.penalise(inputs, mx.zeros((2, vocabulary)))))


class Plan:
    """Everything about a batch's rows that stays the same from step to step, as arrays, plus what advances by one.

    Built anew whenever rows join or leave; all its state can be told from the rows' tokens, so that nothing is lost.

    Args:
        rows: each row's Sampling.
        tokens: each row's tokens before the step's input, prompt included.
        inputs: the step's input tokens, [rows], not necessarily evaluated.
    """

    def __init__(self, rows: list[Sampling], tokens: Sequence[Sequence[int]], inputs: mx.array) -> None:
        self._window: mx.array | None = None
        if any(row.penalised for row in rows):
            self._build_penalties(rows, tokens, inputs)
        groups: dict[Filters | None, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.filters, []).append(index)
        self._groups = [_Group(rows, tokens, indices, len(groups) == 1) for indices in groups.values()]
        self._order = None
        if len(groups) > 1:
            placed = [index for group in self._groups for index in group.indices]
            self._order = mx.array(sorted(range(len(placed)), key=placed.__getitem__))
        self.reporting = [index for index, row in enumerate(rows) if row.logprobs >= 0]
        constraints = [(index, row.constraint) for index, row in enumerate(rows)]
        self.constrained = [(index, one) for index, one in constraints if one is not None and not one.over]
        self.mix = Mix.of([row.adapter for row in rows])
        self._alternatives = max((rows[index].logprobs for index in self.reporting), default=0)

    # --- penalties

    def _build_penalties(self, rows: list[Sampling], tokens: Sequence[Sequence[int]], inputs: mx.array) -> None:
        tails = [list(history[-PENALTY_WINDOW:]) for history in tokens]
        missing = [PENALTY_WINDOW - len(tail) for tail in tails]
        window = mx.array([[0] * gap + tail for gap, tail in zip(missing, tails, strict=True)], dtype=mx.int32)
        weights = mx.array([[0.0] * gap + [1.0] * (PENALTY_WINDOW - gap) for gap in missing])
        # A short history is filled up with a token that is in the window anyway, so that it counts for no other.
        self._window = mx.where(weights > 0, window, inputs[:, None].astype(mx.int32))
        self._weights = weights
        self._seen = mx.ones((len(rows), 1))
        self._repetition = mx.array([[row.repetition] for row in rows])
        self._presence = mx.array([[row.presence] for row in rows])
        self._frequency = mx.array([[row.frequency] for row in rows])
        self._has_repetition = any(row.repetition != 1.0 for row in rows)
        self._has_presence = any(row.presence != 0.0 for row in rows)
        self._has_frequency = any(row.frequency != 0.0 for row in rows)

    def penalise(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """Apply the penalties. `inputs` is [rows], the newest token of each; `logits` is [rows, vocabulary]."""
        if self._window is None:
            return logits
        newest = inputs[:, None].astype(mx.int32)
        window = self._window = mx.concatenate([self._window[:, 1:], newest], axis=1)
        picked = mx.take_along_axis(logits, window, axis=1)
        if self._has_repetition:
            picked = mx.where(picked < 0, picked * self._repetition, picked / self._repetition)
        if self._has_presence:
            picked = picked - self._presence
        if self._has_frequency:
            weights = self._weights = mx.concatenate([self._weights[:, 1:], self._seen], axis=1)
            counts = ((window[:, :, None] == window[:, None, :]) * weights[:, None, :]).sum(axis=-1)
            picked = picked - self._frequency * counts
        return mx.put_along_axis(logits, window, picked.astype(logits.dtype), axis=1)

    # --- draws

    def sample(self, logprobs: mx.array) -> mx.array:
        """The next token of each row, [rows] of uint32, from log probabilities [rows, vocabulary]."""
        if self._order is None:
            return self._groups[0].sample(logprobs)
        parts = [group.sample(logprobs[group.index_array]) for group in self._groups]
        return mx.concatenate(parts)[self._order]

    def report(self, logprobs: mx.array, sampled: mx.array) -> dict[int, tuple[mx.array, mx.array, mx.array]]:
        """For each row that asked: the chosen token's log probability, and the best alternatives (ids, values)."""
        reports = {}
        for index in self.reporting:
            row = logprobs[index].astype(mx.float32)
            count = min(self._alternatives, row.shape[-1])
            if count:
                best = mx.argpartition(-row, kth=count - 1)[:count]
                best = best[mx.argsort(-row[best])]
            else:
                best = mx.array([], dtype=mx.uint32)
            reports[index] = (row[sampled[index]], best, row[best])
        return reports


class _Group:
    """Rows of a batch that share their filters, and are sampled together."""

    def __init__(self, rows: list[Sampling], tokens: Sequence[Sequence[int]], indices: list[int], alone: bool) -> None:
        self.indices = indices
        self.index_array = None if alone else mx.array(indices)
        first = rows[indices[0]]
        self.greedy = first.temperature <= 0
        if self.greedy:
            return
        self._top_p, self._min_p, self._top_k = first.top_p, first.min_p, first.top_k
        # An array, not a number: mlx compiles these filters once for each number it meets.
        self._top_p_array = mx.array(first.top_p)
        self._xtc = first.xtc_probability > 0
        if self._xtc:
            self._spared = first.spared
            self._xtc_probability = mx.array([[rows[index].xtc_probability] for index in indices])
            self._xtc_threshold = mx.array([[rows[index].xtc_threshold] for index in indices])
        self._heat = mx.array([[1.0 / rows[index].temperature] for index in indices])
        # A position's key is the request's key plus the position.
        keys = [(rows[i].key[0], (rows[i].key[1] + len(tokens[i])) & 0xFFFFFFFF) for i in indices]
        self._keys = mx.array(keys, dtype=mx.uint32)

    def sample(self, logprobs: mx.array) -> mx.array:
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        size = logprobs.shape[-1]
        if self._top_p < 1.0:
            logprobs = apply_top_p(logprobs, self._top_p_array)
        if self._min_p > 0.0:
            logprobs = apply_min_p(logprobs, self._min_p)
        if self._xtc:
            draws = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(self._keys ^ _XTC_KEYS)
            logprobs = apply_xtc(logprobs, draws, self._xtc_probability, self._xtc_threshold, self._spared)
        if 0 < self._top_k < size:
            logprobs = apply_top_k(logprobs, self._top_k)
        if len(self.indices) == 1:  # the same noise, without the cost of vmap
            noise = mx.random.gumbel((1, size), key=self._keys[0])
        else:
            noise = mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(self._keys)
        self._keys = self._keys + _COUNT
        return mx.argmax(logprobs.astype(mx.float32) * self._heat + noise, axis=-1)
