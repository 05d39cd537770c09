"""What rows decode on outside the plain lane, and what a row's caches weigh.

Quantised: mlx_lm quantises the cache of a row that is alone; here the same for batches, with its own padding, so that
the lane decodes together. Rotating: mlx_lm's window keeps the first tokens only where a row is alone, and a window
without them soon makes no sense (Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023); so
these rows are served one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    dynamic_roll,
    make_prompt_cache,
)

from mlxd_client.errors import Unsupported

from .kvcache import leaves
from .places import MOST_PADDING

__all__ = ["PLAIN", "Footprint", "Kinds", "LaneKey"]

# Caches grow by so many tokens at a time.
STEP: int = KVCache.step
# How many of the first tokens a rotating window keeps; mlx_lm's number.
KEPT_TOKENS = 4
# What MLX quantises together; the larger one that fits the heads is taken.
GROUP_SIZES = (64, 32)
# What a model's code raises that was not made for such a cache.
_REFUSALS = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError)
# Modules that look positions up in a table: beyond its end there is nothing.
_TABLES = frozenset({"wpe", "embed_positions", "position_embedding", "position_embeddings"})


@dataclass(frozen=True, slots=True)
class LaneKey:
    """What rows must have in common to decode together.

    Attributes:
        kv_bits: their caches are quantised to so many bits; 0 leaves them as the model makes them.
        rotate: they go on beyond the context.
        deterministic: who else is served makes no difference, not even in the last digit.
    """

    kv_bits: int = 0
    rotate: bool = False
    deterministic: bool = False

    @property
    def alone(self) -> bool:
        """Its rows are served one at a time."""
        return self.rotate or self.deterministic


PLAIN = LaneKey()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the caches of rows hold, in bytes.

    Attributes:
        fixed: of a row, however long.
        per_token: of a token.
        windows: (tokens, bytes per token) of caches that hold so many tokens at most.
    """

    fixed: int
    per_token: int
    windows: tuple[tuple[int, int], ...] = ()

    def bytes(self, rows: int, tokens: int) -> int:
        """Of a batch: all its rows are as long as its longest one, with some positions before they begin, and caches
        grow by a step from anywhere."""
        grown = tokens + MOST_PADDING + STEP
        windows = sum(weight * min(grown, size) for size, weight in self.windows)
        return rows * (self.fixed + self.per_token * grown + windows)

    def most_tokens(self, limit: int) -> int:
        """How long a single row may become for its caches to hold no more than `limit` bytes; 0 if not a token."""
        low, high = 0, 2**40
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(1, middle) <= limit else (low, middle - 1)
        return low


class Kinds:
    """Which lanes a model can have, and what they take. Finding out runs the model on a few tokens, once a kind.

    Args:
        model: as mlx_lm made it.
        window: how many tokens a rotating lane's rows see: the context.
    """

    def __init__(self, model: Any, window: int) -> None:
        self._model = model
        self._window = window
        self._known: dict[tuple[int, bool], Footprint | Unsupported] = {}
        self._widths: set[int] = set()  # of keys and values, once they are known

    def caches(self, key: LaneKey) -> list[Any]:
        """New, empty caches of one row."""
        made: list[Any] = make_prompt_cache(self._model)
        if key.kv_bits:
            return [QuantizedRow(self._group_size(), key.kv_bits) for _ in made]
        if key.rotate:
            return [WindowRow(self._window, KEPT_TOKENS) for _ in made]
        return made

    def footprint(self, key: LaneKey) -> Footprint:
        """Raises Unsupported where the model cannot have such rows; details.option says which option that is."""
        kind = key.kv_bits, key.rotate
        if kind not in self._known:
            try:
                self._known[kind] = self._measure(key)
            except Unsupported as error:
                self._known[kind] = error
        known = self._known[kind]
        if isinstance(known, Unsupported):
            raise Unsupported(known.message, **known.details)
        return known

    def _measure(self, key: LaneKey) -> Footprint:
        plain = key.kv_bits == 0 and not key.rotate
        if not plain:
            self._check(key)
        try:
            with mx.stream(generation_stream):
                return weigh(self._model, self.caches(key))
        except Exception as error:
            if plain or not isinstance(error, _REFUSALS):
                raise  # not the model's code: the device's, or ours
            option = "kv_bits" if key.kv_bits else "context_policy"
            told = f"{option}: this model does not run on such a cache: {type(error).__name__}: {error}"
            raise Unsupported(told, option=option) from None

    def _check(self, key: LaneKey) -> None:
        if key.kv_bits and key.rotate:
            raise Unsupported("a rotating window cannot be quantised", option="kv_bits")
        made = make_prompt_cache(self._model)
        if any(type(cache) is not KVCache for cache in made):
            option = "kv_bits" if key.kv_bits else "context_policy"
            raise Unsupported(f"{option}: this model's caches are of a kind that allows no other", option=option)
        if key.kv_bits and self._group_size() == 0:
            sizes = " or ".join(map(str, sorted(GROUP_SIZES)))
            raise Unsupported(f"kv_bits: this model's heads are not multiples of {sizes} wide", option="kv_bits")
        if key.rotate and any(name.rpartition(".")[2] in _TABLES for name, _ in self._model.named_modules()):
            told = "context_policy rotate: this model knows no positions beyond its context"
            raise Unsupported(told, option="context_policy")

    def _group_size(self) -> int:
        """The largest that divides the width of keys and of values; 0 where none does."""
        if not self._widths:
            caches = make_prompt_cache(self._model)
            with mx.stream(generation_stream):
                mx.eval(self._model(mx.array([[0]]), cache=caches))
            self._widths = {part.shape[-1] for cache in caches for part in (cache.keys, cache.values)}
        return next((size for size in GROUP_SIZES if all(width % size == 0 for width in self._widths)), 0)


def weigh(model: Any, caches: Iterable[Any]) -> Footprint:
    """Have a model read two tokens and decode one, and see what that takes. Raises what the model raises."""
    batch = [cache.merge([cache]) if hasattr(cache, "merge") else cache for cache in caches]
    logits = [model(mx.array([[0, 0]]), cache=batch), model(mx.array([[0]]), cache=batch)]
    mx.eval(logits, [cache.state for cache in batch])
    fixed = per_token = 0
    windows = []
    for cache in leaves(batch):
        keys = getattr(cache, "keys", None)
        if keys is None:
            fixed += cache.nbytes
            continue
        weight = -(-cache.nbytes // (keys[0] if isinstance(keys, tuple) else keys).shape[2])
        size = getattr(cache, "max_size", None)
        if size is None:
            per_token += weight
        else:
            windows.append((size, weight))
    return Footprint(fixed, per_token, tuple(windows))


class QuantizedRow(QuantizedKVCache):  # type: ignore[misc]
    """A row's own cache before it joins a batch."""

    def merge(self, rows: list[QuantizedRow]) -> QuantizedBatch:
        """Raises ValueError where one of them holds something: nothing is ever kept of such rows."""
        if any(not row.empty() for row in rows):
            raise ValueError("quantised caches that hold something cannot be merged")
        return QuantizedBatch(len(rows), self.group_size, self.bits)


Parts = tuple[mx.array, ...]  # what mx.quantize gives: packed values, scales, biases, each [rows, heads, tokens, …]


class QuantizedBatch(BatchKVCache):  # type: ignore[misc]
    """mlx_lm's BatchKVCache, with keys and values as mx.quantize packs them."""

    keys: Parts | None
    values: Parts | None
    offset: mx.array
    left_padding: mx.array
    _idx: int
    _right_padding: mx.array | None

    def __init__(self, rows: int, group_size: int, bits: int) -> None:
        super().__init__([0] * rows)
        self.group_size = group_size
        self.bits = bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        start, self._idx = self._idx, self._idx + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        self.keys = self._put(self.keys, keys, start)
        self.values = self._put(self.values, values, start)
        return self.keys_and_values()

    def _put(self, held: Parts | None, new: mx.array, start: int) -> Parts:
        parts: Parts = tuple(mx.quantize(new, group_size=self.group_size, bits=self.bits))
        end = start + new.shape[2]
        if held is None or end > held[0].shape[2]:
            room = -(-new.shape[2] // STEP) * STEP
            more = tuple(mx.zeros((*part.shape[:2], room, part.shape[3]), dtype=part.dtype) for part in parts)
            if held is not None:
                more = tuple(mx.concatenate([a[:, :, :start], b], axis=2) for a, b in zip(held, more, strict=True))
            held = more
        for part, value in zip(held, parts, strict=True):
            part[:, :, start:end] = value
        return held

    def keys_and_values(self) -> Any:
        return self._each(lambda part: part[:, :, : self._idx])

    def finalize(self) -> None:
        padding = self._right_padding
        if padding is not None:
            self.keys, self.values = self._each(lambda part: dynamic_roll(part, padding[:, None], axis=2))
            self.offset = self.offset - padding
            self.left_padding += padding
            self._right_padding = None

    def filter(self, batch_indices: Any) -> None:
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        paddings: Any = self.left_padding.tolist()
        spare: int = min(paddings)
        self._idx -= spare
        self.left_padding -= spare
        if self.keys is not None:
            self.keys, self.values = self._each(lambda part: part[batch_indices][:, :, spare:])

    def extend(self, other: QuantizedBatch) -> None:
        end = max(self._idx, other._idx)
        sides = [side for side in (self, other) if side.keys is not None]
        if sides:
            size = max(side.keys[0].shape[2] for side in sides if side.keys is not None)
            grown = [side._aligned(sides[0], end, size) for side in (self, other)]
            self.keys, self.values = tree_map(lambda one, two: mx.concatenate([one, two]), *grown)
        paddings = [side.left_padding + (end - side._idx if sides else 0) for side in (self, other)]
        self.left_padding = mx.concatenate(paddings)
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = end

    def _aligned(self, like: QuantizedBatch, end: int, size: int) -> Any:
        """Keys and values that end at `end` and have room for `size` tokens; of no tokens where there are none."""
        rows, left = self.offset.shape[0], end - self._idx

        def align(part: mx.array) -> mx.array:
            part = part[:, :, : size - left]
            right = size - left - part.shape[2]
            return mx.pad(part, [(0, 0), (0, 0), (left, right), (0, 0)])

        if self.keys is None:
            return like._each(lambda part: align(mx.zeros((rows, part.shape[1], 0, part.shape[3]), dtype=part.dtype)))
        return self._each(align)

    def _each(self, function: Callable[[mx.array], mx.array]) -> Any:
        return tree_map(function, (self.keys, self.values))

    @property
    def nbytes(self) -> int:
        held = () if self.keys is None else (self.keys, self.values)
        return int(tree_reduce(lambda total, part: total + part.nbytes, held, 0))


class WindowRow(RotatingKVCache):  # type: ignore[misc]
    """A rotating window that is also a batch, of one row."""

    def merge(self, rows: list[WindowRow]) -> WindowRow:
        if len(rows) != 1:
            raise ValueError("windows that keep their first tokens are served one at a time")
        return rows[0]

    def filter(self, batch_indices: Any) -> None:
        if list(batch_indices) != [0]:
            raise ValueError("there is one row")
