"""What one answer may go on with, asked before each draw: the rule's matcher for one request, and masks for a batch."""

from __future__ import annotations

import json
import time
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from mlxd_client.errors import InternalError, InvalidParams
from mlxd_client.types import MAX_DEPTH, MAX_INTEGER

from .grammar import Compiled, refusal

# A rule that takes more time than this for each token, over at least this much time, holds up the whole batch.
SLOW_S, SLOW_TOTAL_S = 0.02, 2.0
# A parsed value is carried by a frame, which has levels of its own, and a bound on its values.
MAX_VALUE_DEPTH, MAX_VALUES = MAX_DEPTH - 4, 65_536

# Bytes of a mask become eight summands each: 0 for what is allowed, minus infinity for what is not.
_SUMMANDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
_tables: dict[Any, mx.array] = {}


class Constraint:
    """One request's place in its rule.

    Args:
        compiled: the rule.
        thought: how a thought ends that comes before the answer; None where the answer begins at once. Until it came,
            everything may come but the tokens that end the answer.
        eos: those tokens.

    Attributes:
        finished: the answer is whole, and nothing can follow.
    """

    def __init__(self, compiled: Compiled, *, eos: set[int], thought: str | None = None) -> None:
        self._rule, self._tokenizer = compiled.rule, compiled.tokenizer
        self._matcher = compiled.fresh()
        self._marker = None if thought is None else thought.encode()
        self._tail = b""
        self._begun = False
        self._steps, self._spent_s = 0, 0.0
        self._nothing_but_eos = _bits(self._tokenizer.vocab_size, eos)
        self._anything_but_eos = bytes(~np.frombuffer(self._nothing_but_eos, np.uint8)) if thought else b""
        self.finished = False

    def value(self, text: str) -> Any:
        """What the whole answer `text` says, where the rule is a schema; None where it is none, says null, or says what
        the wire cannot carry."""
        if self._rule.kind != "schema" or not self.finished:
            return None
        try:
            return parse_value(text)
        except ValueError:
            return None

    def follow(self, newest: int) -> bytes:
        """Which tokens may come next, one bit each, after `newest`. The first time, that is the prompt's last token.

        Raises:
            RpcError: the rule turned out too complex to follow, or the answer has left it.
        """
        began = time.perf_counter()
        if not self._begun:
            self._begun = True
        elif self._marker is None:
            self._take([newest])
        else:
            self._think(newest, self._marker)
        if self.finished:
            return self._nothing_but_eos
        if self._marker is not None:
            return self._anything_but_eos
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise refusal(self._rule, self._matcher.get_error())
        self._watch(time.perf_counter() - began)
        return mask

    def _take(self, tokens: list[int]) -> None:
        if self.finished:
            return
        if not self._matcher.consume_tokens(tokens):
            told = self._matcher.get_error()
            raise InternalError(f"a token was drawn that the {self._rule.kind} does not allow: {told}")
        self.finished = self._matcher.is_stopped()

    def _think(self, newest: int, marker: bytes) -> None:
        """The thought ends where its text does, however its tokens spell that; what follows is the answer's."""
        self._tail += self._tokenizer.decode_bytes([newest])
        before, found, after = self._tail.partition(marker)
        if found:
            self._marker = None
            if after.strip():
                self._take(self._tokenizer.tokenize_bytes(after.lstrip()))
        self._tail = before[-len(marker) :]

    def _watch(self, took_s: float) -> None:
        self._steps += 1
        self._spent_s += took_s
        if self._spent_s > SLOW_TOTAL_S and self._spent_s > SLOW_S * self._steps:
            told = f"it is too complex: {self._spent_s / self._steps * 1000:.0f} ms for each token"
            raise InvalidParams(f"{self._rule.kind}: {told}", field=self._rule.kind)


def _bits(size: int, tokens: set[int]) -> bytes:
    bits = np.zeros((size + 31) // 32 * 32, np.uint8)
    bits[sorted(token for token in tokens if token < size)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def apply_masks(logits: mx.array, masks: dict[int, bytes]) -> mx.array:
    """Minus infinity for all that a row's mask does not allow; rows without one stay as they are.

    Args:
        logits: [rows, vocabulary].
        masks: by row, one bit for each token, at least as many as there are.
    """
    rows, width = logits.shape
    packed = np.full((rows, (width + 7) // 8), 0xFF, np.uint8)
    for index, mask in masks.items():
        packed[index] = np.frombuffer(mask, np.uint8, count=packed.shape[1])
    table = _tables.get(logits.dtype)
    if table is None:
        table = _tables[logits.dtype] = mx.array(_SUMMANDS).astype(logits.dtype)
    return logits + table[mx.array(packed)].reshape(rows, -1)[:, :width]


def allows_any(mask: bytes, width: int) -> bool:
    """Whether a mask allows any of the first `width` tokens."""
    whole, rest = divmod(width, 8)
    if mask[:whole].strip(b"\0"):
        return True
    return bool(rest and mask[whole] & ((1 << rest) - 1))


def parse_value(text: str) -> Any:
    """The JSON value that a whole answer spells, as the wire can carry it: integers beyond ±2^53 become floats.

    Raises:
        ValueError: it cannot be carried: no finite number, half a surrogate pair, or too deep or large.
    """
    try:
        value = json.loads(text, parse_int=_number, parse_constant=_number)
        _check_size(value)
        msgspec.msgpack.encode(value)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return value


def _number(text: str) -> int | float:
    value = int(text) if len(text) < 18 else float(text)
    return value if abs(value) <= MAX_INTEGER else float(value)


def values_in(value: Any) -> int:
    """How many values the wire carries for a parsed value; 0 for none."""
    return 0 if value is None else _check_size(value)


def _check_size(value: Any) -> int:
    """How many values there are in all. Raises ValueError where they are too many, too deep, or no finite numbers."""
    level, values = [value], 0
    for _ in range(MAX_VALUE_DEPTH):
        values += len(level)
        if values > MAX_VALUES:
            raise ValueError("too many values")
        if any(isinstance(one, float) and one - one != 0.0 for one in level):
            raise ValueError("no finite number")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        if not inner:
            return values
        level = inner
    raise ValueError("too deep")
