"""Where rows lie in the caches of their batch: one that leaves leaves its place open, and one that joins takes it.

mlx_lm copies the caches of all rows whenever one leaves, and again whenever one joins. Where requests come and go that
costs more than decoding does. An open place is computed along: as a row that has just begun, which nobody looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache

from .kvcache import leaves

__all__ = ["MOST_PADDING", "Places", "can_stay_open", "close_up", "is_full", "leave_open", "padding", "put"]

# So many positions before all rows begin are worth a copy of all that the rows hold.
MOST_PADDING = 64


class Places:
    """Which place each row has.

    Attributes:
        of: the place of each row, in the rows' order.
        count: how many places the caches have.
    """

    def __init__(self, rows: int) -> None:
        self.of = list(range(rows))
        self.count = rows
        self._rows: mx.array | None = None  # for each place the row that it has, or one beyond the last
        self._places: mx.array | None = None

    @property
    def straight(self) -> bool:
        """Rows and places are the same."""
        return self.of == list(range(self.count))

    @property
    def open(self) -> list[int]:
        return sorted(set(range(self.count)).difference(self.of))

    def leave(self, keep: Sequence[int]) -> None:
        """Only the rows of these indices stay."""
        self.of = [self.of[index] for index in keep]
        self._rows = self._places = None

    def join(self, taken: Sequence[int], more: int = 0) -> None:
        """Rows come in at the places `taken`, and behind all others at as many new ones as `more` says."""
        self.of += [*taken, *range(self.count, self.count + more)]
        self.count += more
        self._rows = self._places = None

    def spread(self, inputs: mx.array) -> mx.array:
        """What goes into a step for each row, [rows], put in the places' order, [places]; a zero where one is open."""
        if self._rows is None:
            rows = [len(self.of)] * self.count
            for row, place in enumerate(self.of):
                rows[place] = row
            self._rows = mx.array(rows)
        return mx.concatenate([inputs, mx.zeros((1,), dtype=inputs.dtype)])[self._rows]

    def gather(self, outputs: mx.array) -> mx.array:
        """What came out for each place, [places, ...], for each row, [rows, ...]."""
        if self._places is None:
            self._places = mx.array(self.of)
        return outputs[self._places]


def can_stay_open(caches: Iterable[Any]) -> bool:
    """The caches are of the kind whose places need not be closed, and all of them stand at one position."""
    positions = set()
    for cache in leaves(caches):
        if type(cache) is not BatchKVCache or cache.keys is None or cache._right_padding is not None:
            return False
        positions.add(cache._idx)
    return len(positions) == 1


def leave_open(caches: Iterable[Any], places: Sequence[int]) -> None:
    """These places have no row any more: each is as if one began there now."""
    for cache in leaves(caches):
        count = cache.left_padding.shape[0]
        gone = mx.array([place in places for place in range(count)])
        cache.left_padding = mx.where(gone, cache._idx, cache.left_padding)
        cache.offset = mx.where(gone, 0, cache.offset)


def put(caches: Iterable[Any], others: Iterable[Any], places: Sequence[int]) -> None:
    """Put the rows of other caches into open places of these, without copying what the other places hold, but where one
    that joins is longer than all that are there."""
    for cache, other in zip(leaves(caches), leaves(others), strict=True):
        if other._idx > cache._idx:
            _shift(cache, other._idx - cache._idx)
        start, end = cache._idx - other._idx, cache._idx
        taken = mx.array(list(places))
        # What was there before goes: one value that is no finite number would reach the row through the mask.
        before = [(0, 0), (0, 0), (start, 0), (0, 0)]
        for row, place in enumerate(places):
            cache.keys[place : place + 1, :, :end] = mx.pad(other.keys[row : row + 1, :, : other._idx], before)
            cache.values[place : place + 1, :, :end] = mx.pad(other.values[row : row + 1, :, : other._idx], before)
        cache.left_padding = mx.put_along_axis(cache.left_padding, taken, other.left_padding + start, axis=0)
        cache.offset = mx.put_along_axis(cache.offset, taken, other.offset, axis=0)


def padding(caches: Iterable[Any], tokens: Iterable[Sequence[int]]) -> int:
    """How many positions the caches have before all rows begin, as far as they hold these rows' tokens."""
    return int(next(leaves(caches))._idx) - max(map(len, tokens))


def is_full(caches: Iterable[Any]) -> bool:
    """The next token makes the caches grow."""
    cache = next(leaves(caches))
    return bool(cache._idx >= cache.keys.shape[2])


def close_up(caches: Iterable[Any]) -> None:
    """Give up the positions before all rows begin."""
    before = None
    for cache in leaves(caches):
        if before is None:
            lefts: Any = cache.left_padding.tolist()
            before = min(lefts)
        if before > 0:
            cache.keys, cache.values = cache.keys[..., before:, :], cache.values[..., before:, :]
            cache.left_padding = cache.left_padding - before
            cache._idx -= before


def _shift(cache: BatchKVCache, by: int) -> None:
    """Make room for so many positions before all others. Positions that are not used yet go for it."""
    unused = min(cache.keys.shape[2] - cache._idx, by)
    length = cache.keys.shape[2] - unused
    padding = [(0, 0), (0, 0), (by, 0), (0, 0)]
    cache.keys = mx.pad(cache.keys[..., :length, :], padding)
    cache.values = mx.pad(cache.values[..., :length, :], padding)
    cache.left_padding = cache.left_padding + by
    cache._idx += by
