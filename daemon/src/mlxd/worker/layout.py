"""What the caches of one model's rows are made of, and how that is bytes: shapes are known here, never read from files.

Rows of a batch are single here: arrays have no leading axis for them while they are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from .kvcache import RowView, StateMark, make_rotating

__all__ = ["Layout", "Raw", "State", "Tensor", "Window", "layout_of"]

# An array as integers of its elements' size: not every type of element is known to numpy.
Raw = np.ndarray[Any, Any]

_UINTS: dict[int, tuple[Any, Any]] = {
    1: (mx.uint8, np.uint8), 2: (mx.uint16, np.uint16), 4: (mx.uint32, np.uint32), 8: (mx.uint64, np.uint64),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array's shape, without the axis for tokens where there is one, and the type of its elements."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return int(getattr(mx, self.dtype).size)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    def with_tokens(self, count: int) -> Tensor:
        """[heads, width] as [heads, tokens, width]."""
        return Tensor((self.shape[0], count, *self.shape[1:]), self.dtype)

    def as_bytes(self, held: mx.array) -> memoryview:
        return np.array(held.view(_UINTS[self.itemsize][0])).data.cast("B")

    def take(self, data: memoryview) -> tuple[Raw, memoryview]:
        """An array of just this shape from the beginning of `data`, and the rest."""
        raw = np.frombuffer(data[: self.nbytes], _UINTS[self.itemsize][1]).reshape(self.shape)
        return raw, data[self.nbytes :]

    def as_array(self, raw: Raw) -> mx.array:
        """With the axis for rows."""
        return mx.array(raw)[None].view(getattr(mx, self.dtype))


@dataclass(frozen=True, slots=True)
class Window:
    """A layer that holds the last `size` tokens."""

    size: int
    keys: Tensor
    values: Tensor

    def tensors(self, length: int) -> list[Tensor]:
        """What it holds after `length` tokens."""
        held = min(self.size, length)
        return [self.keys.with_tokens(held), self.values.with_tokens(held)]

    def arrays(self, cache: Any, length: int) -> list[mx.array]:
        """The same of a cache that holds as many, or more and has lost none yet."""
        held = min(self.size, length)
        return [cache.keys[:, :, :held], cache.values[:, :, :held]]

    def make(self, arrays: list[mx.array], length: int) -> Any:
        return make_rotating(self.size, length, arrays[0], arrays[1])


@dataclass(frozen=True, slots=True)
class State:
    """A layer that each token overwrites."""

    held: tuple[Tensor, ...]

    def tensors(self, _length: int) -> list[Tensor]:
        return list(self.held)

    def arrays(self, cache: Any, _length: int) -> list[mx.array]:
        return list(cache.cache)

    def make(self, arrays: list[mx.array], _length: int) -> Any:
        cache = ArraysCache(len(arrays))
        cache.cache = arrays
        return cache


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys and values, by token, of each layer that can be cut; and the other layers, see kvcache.py."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    states: tuple[Window | State, ...]

    @property
    def token_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def state_bytes(self, length: int) -> int:
        return sum(tensor.nbytes for state in self.states for tensor in state.tensors(length))

    def tensors(self) -> Iterator[Tensor]:
        """Keys and values of one layer after the other."""
        for keys, values in self.pairs:
            yield keys
            yield values

    def cut_pairs(self, data: memoryview, tokens: int) -> tuple[list[Raw], memoryview]:
        """Keys and values of so many tokens from the beginning of `data`, and the rest."""
        found = []
        for tensor in self.tensors():
            raw, data = tensor.with_tokens(tokens).take(data)
            found.append(raw)
        return found, data

    def cut_states(self, data: memoryview, length: int) -> list[Raw]:
        found = []
        for state in self.states:
            for tensor in state.tensors(length):
                raw, data = tensor.take(data)
                found.append(raw)
        return found

    def make_mark(self, raw: list[Raw], length: int) -> StateMark:
        rest = iter(raw)
        states = []
        for state in self.states:
            arrays = [tensor.as_array(next(rest)) for tensor in state.tensors(length)]
            mx.eval(arrays)
            states.append(state.make(arrays, length))
        return StateMark(states, length)


def layout_of(row: RowView) -> Layout | None:
    """None where a layer holds nothing, so that what it may hold cannot be told."""
    states: list[Window | State] = []
    for state in row.states:
        if type(state) is RotatingKVCache:
            states.append(Window(state.max_size, _by_token(state.keys), _by_token(state.values)))
        elif not state.cache or any(held is None for held in state.cache):
            return None
        else:
            states.append(State(tuple(Tensor(tuple(held.shape[1:]), _dtype(held)) for held in state.cache)))
    pairs = tuple((_by_token(keys), _by_token(values)) for keys, values in row.pairs)
    return Layout(pairs, tuple(states)) if pairs or states else None


def _by_token(held: mx.array) -> Tensor:
    _, heads, _, width = held.shape
    return Tensor((heads, width), _dtype(held))


def _dtype(held: mx.array) -> str:
    return str(held.dtype).rpartition(".")[2]
