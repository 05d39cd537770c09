"""KV caches of rows: taken out of a batch, kept for prompts that begin alike, given to another row.

Which sequences are kept is prefix.py's business; here are the arrays. Where a layer's cache is mlx_lm's KVCache, any
stretch of tokens can be cut out of it, and a sequence is put together from stretches. Rotating windows and states that
each token overwrites cannot be cut: of these a whole copy is kept, a mark, taken where a prompt was cut for it and
where a request ended.

Caches grow in place. What is kept is a copy that no cache ever holds: mlx_lm copies it when a row joins a batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ..childwire import PromptCacheStats
from .prefix import Found, PrefixTree

__all__ = ["KvPart", "PromptCache", "RowView", "StateMark", "foreseen_bytes", "leaves", "make_rotating", "take"]

Pair = tuple[mx.array, mx.array]


class KvPart:
    """Keys and values of some tokens, one pair for each layer that can be cut, each [1, heads, tokens, width]."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in pairs)

    def split(self, at: int) -> tuple[KvPart, KvPart]:
        return _copied(self.pairs, 0, at), _copied(self.pairs, at, None)


class StateMark:
    """What the other layers hold after some token, as single-row caches that nothing else holds."""

    def __init__(self, states: list[Any], length: int) -> None:
        self.states = states
        self.length = length
        self.nbytes = sum(state.nbytes for state in states)
        self.cuttable = all(type(state) is RotatingKVCache and state.offset < state.max_size for state in states)


@dataclass(slots=True)
class RowView:
    """One row of a batch as it is at this moment; nothing is copied before `part` or `mark` asks for it."""

    length: int
    pairs: list[Pair]
    states: list[Any]

    @property
    def token_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.pairs) // self.length

    @property
    def mark_bytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def part(self, start: int, end: int) -> KvPart:
        return _copied(self.pairs, start, end)

    def mark(self) -> StateMark:
        for state in self.states:
            if type(state) is RotatingKVCache:
                state.keys, state.values = mx.contiguous(state.keys), mx.contiguous(state.values)
            else:
                state.cache = [None if held is None else mx.contiguous(held) for held in state.cache]
        mx.eval([_arrays(state) for state in self.states])
        return StateMark(self.states, self.length)


def take(caches: Iterable[Any], index: int, length: int) -> RowView | None:
    """Row `index` of a batch's caches; None where they do not hold exactly `length` tokens for it."""
    view = RowView(length, [], [])
    if length == 0:
        return None
    for cache in leaves(caches):
        kind = type(cache)
        if kind is KVCache or kind is BatchKVCache:
            start, end = (0, cache.offset) if kind is KVCache else (cache.left_padding.tolist()[index], cache._idx)
            if cache.keys is None or end - start != length:
                return None
            row = slice(index, index + 1)
            view.pairs.append((cache.keys[row, :, start:end], cache.values[row, :, start:end]))
        elif kind is BatchRotatingKVCache:
            if cache.keys is None:
                return None
            state = cache.extract(index)
            window = min(length, state.max_size)
            if state.offset != length or state.keys.shape[2] < window:
                return None
            view.states.append(
                make_rotating(state.max_size, length, state.keys[:, :, -window:], state.values[:, :, -window:])
            )
        elif kind is ArraysCache:
            state = ArraysCache(len(cache.cache))
            state.cache = [None if held is None else held[index : index + 1] for held in cache.cache]
            view.states.append(state)
        else:
            return None
    return view


def foreseen_bytes(caches: Iterable[Any], rows: int, tokens: int) -> int:
    """What a batch's caches hold, or will hold `tokens` later where they must grow for that."""
    total = 0
    for cache in leaves(caches):
        total += cache.nbytes
        if isinstance(cache, ArraysCache) or cache.keys is None:
            continue
        length = (cache.keys[0] if isinstance(cache.keys, tuple) else cache.keys).shape[2]
        # A row that comes to be alone moves to caches that are full.
        if isinstance(cache, BatchRotatingKVCache | RotatingKVCache):
            grows = length < cache.max_size
        else:
            grows = rows == 1 or length - cache.size() < tokens
        if grows:
            total += cache.nbytes // max(length, 1) * max(tokens, KVCache.step)
    return total


class PromptCache:
    """The prefixes that are kept of one model's prompts and answers, within a budget.

    Args:
        model: as mlx_lm made it.
        budget_bytes: bounds what is kept and what running batches hold together.

    Attributes:
        usable: the model's caches are of kinds that can be kept.
        marked: sequences can be taken up at marks only, so that prompts should be cut where that is of use.
        hits, misses: requests that found a prefix, and that found none.
        saved_tokens: how many tokens were not computed.
    """

    def __init__(self, model: Any, budget_bytes: int) -> None:
        kinds = {type(cache) for cache in leaves(make_prompt_cache(model))}
        self._model = model
        self.usable = kinds <= {KVCache, RotatingKVCache, ArraysCache} and bool(kinds)
        self.marked = kinds != {KVCache}
        self.tree = PrefixTree(budget_bytes, marked=self.marked)
        self.hits = self.misses = self.saved_tokens = 0
        self._pending: list[tuple[bytes, array[int], RowView]] = []

    @property
    def nbytes(self) -> int:
        return self.tree.nbytes

    def stats(self) -> PromptCacheStats:
        return PromptCacheStats(self.hits, self.misses, self.saved_tokens, self.tree.nbytes)

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def find(self, namespace: bytes, tokens: Sequence[int]) -> tuple[list[Any], int] | None:
        """Caches that hold as much as possible of the beginning of a prompt, all but its last token at most, and how
        many tokens that is."""
        found = self.tree.find(namespace, tokens, len(tokens) - 1)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self.saved_tokens += found.length
        caches = make_prompt_cache(self._model)
        _fill(caches, found)
        return caches, found.length

    def keep(self, namespace: bytes, tokens: Sequence[int], row: RowView | None) -> None:
        """Have a row's KV kept by the next `settle`. `tokens` are those that are in it."""
        if row is not None and self.usable:
            self._pending.append((namespace, array("I", tokens), row))

    def settle(self, live_bytes: int) -> None:
        """Copy what is to be kept, as far as there is room beside `live_bytes`. Raises what the device raises."""
        pending, self._pending = self._pending, []
        self.tree.fit(live_bytes)
        for namespace, tokens, row in pending:
            self.tree.add(namespace, tokens, row)

    def clear(self) -> None:
        self._pending.clear()
        self.tree.clear()

    def forget_pending(self) -> None:
        """The batch they come from failed."""
        self._pending.clear()


# --- arrays ---------------------------------------------------------------------------------------------------------


def _copied(pairs: list[Pair], start: int, end: int | None) -> KvPart:
    made = [(mx.contiguous(keys[:, :, start:end]), mx.contiguous(values[:, :, start:end])) for keys, values in pairs]
    mx.eval(made)
    return KvPart(made)


def _fill(caches: list[Any], found: Found) -> None:
    """Make new, empty caches hold what was found."""
    parts: list[Any] = [(part.pairs, count) for part, count in found.parts]  # type: ignore[attr-defined]
    mark: Any = found.mark
    pairs = states = 0
    for cache in leaves(caches):
        if type(cache) is KVCache:
            keys = [layers[pairs][0][:, :, :count] for layers, count in parts]
            values = [layers[pairs][1][:, :, :count] for layers, count in parts]
            cache.keys = mx.concatenate(keys, axis=2) if len(keys) > 1 else keys[0]
            cache.values = mx.concatenate(values, axis=2) if len(values) > 1 else values[0]
            cache.offset = found.length
            pairs += 1
        else:
            state = mark.states[states]
            if type(cache) is RotatingKVCache:
                held = min(found.length, state.max_size)
                cache.keys, cache.values = state.keys[:, :, :held], state.values[:, :, :held]
                cache.offset, cache._idx = found.length, held
            else:
                cache.cache = list(state.cache)
            states += 1


def make_rotating(max_size: int, offset: int, keys: mx.array, values: mx.array) -> RotatingKVCache:
    state = RotatingKVCache(max_size)
    state.keys, state.values = keys, values
    state.offset, state._idx = offset, keys.shape[2]
    return state


def _arrays(state: Any) -> list[mx.array]:
    if type(state) is RotatingKVCache:
        return [state.keys, state.values]
    return [held for held in state.cache if held is not None]


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """Each layer's cache; what a layer has several of, one by one."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache
