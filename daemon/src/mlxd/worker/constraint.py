"""What one answer may go on with, asked before each draw: the rule's matcher for one request, its thought before that,
and masks for a batch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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


class Thought:
    """The thought that an answer begins with, token by token. It ends where its text says so, however its tokens spell
    that, or by force.

    Args:
        decode: a token's bytes.
        ends: the texts that end it.
        close: the tokens that it is ended with by force.
        budget: how many tokens it may have before that; None for any number.
    """

    def __init__(
        self,
        decode: Callable[[int], bytes],
        ends: Sequence[str],
        *,
        close: Sequence[int] = (),
        budget: int | None = None,
    ) -> None:
        self._decode = decode
        self._ends = [end.encode() for end in ends]
        self._keep = max(len(end) for end in self._ends)
        self._tail = b""
        self._left = budget
        self._close = list(close)

    @property
    def next(self) -> int | None:
        """The token that has to come next; None where the model is free."""
        return self._close[0] if self._left == 0 and self._close else None

    def take(self, newest: int) -> bytes | None:
        """Note the newest token. Returns what came after the end, once it came."""
        closed = False
        if self._left == 0:
            closed = bool(self._close) and self._close.pop(0) == newest and not self._close
        elif self._left is not None:
            self._left -= 1
        text = self._tail + self._decode(newest)
        found = [(at, -len(end), end) for end in self._ends if (at := text.find(end)) >= 0]
        if found:
            at, _, end = min(found)
            return text[at + len(end) :]
        self._tail = text[-self._keep :]
        return b"" if closed else None


class Constraint:
    """One request's place in its rule, and in the thought before.

    Args:
        compiled: the rule; None where only the thought is bounded.
        eos: the tokens that end the answer; where there is a rule, none of them comes in the thought.
        thought: what the answer begins with; None where there is none.
        vocabulary: how many tokens there are; read from the rule's tokenizer where there is a rule.

    Attributes:
        finished: the answer is whole, and nothing can follow.
        over: nothing is ruled out any more, nor will be.
    """

    def __init__(
        self, compiled: Compiled | None, *, eos: set[int], thought: Thought | None = None, vocabulary: int = 0
    ) -> None:
        self._compiled = compiled
        self._size = vocabulary
        if compiled is not None:
            self._rule, self._tokenizer = compiled.rule, compiled.tokenizer
            self._matcher = compiled.fresh()
            self._size = self._tokenizer.vocab_size
        self._thought = thought
        self._begun = False
        self._steps, self._spent_s = 0, 0.0
        self._nothing_but_eos = _bits(self._size, eos)
        self._anything_but_eos = bytes(~np.frombuffer(self._nothing_but_eos, np.uint8)) if thought else b""
        self.finished = self.over = False

    def value(self, text: str) -> Any:
        """What the whole answer `text` says, where the rule is a schema; None where it is none, says null, or says what
        the wire cannot carry."""
        if self._compiled is None or self._rule.kind != "schema" or not self.finished:
            return None
        try:
            return parse_value(text)
        except ValueError:
            return None

    def follow(self, newest: int) -> bytes | None:
        """Which tokens may come next, one bit each, after `newest`; None for all. The first time, that is the prompt's
        last token.

        Raises:
            RpcError: the rule turned out too complex to follow, or the answer has left it.
        """
        began = time.perf_counter()
        if not self._begun:
            self._begun = True
        elif self._thought is None:
            self._take([newest])
        else:
            self._think(newest, self._thought)
        if self.finished:
            return self._nothing_but_eos
        if self._thought is not None:
            forced = self._thought.next
            if forced is not None:
                return _bits(self._size, {forced})
            return None if self._compiled is None else self._anything_but_eos
        if self._compiled is None:
            self.over = True
            return None
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise refusal(self._rule, self._matcher.get_error())
        self._watch(time.perf_counter() - began)
        return mask

    def _take(self, tokens: list[int]) -> None:
        if self.finished or self._compiled is None:
            return
        if not self._matcher.consume_tokens(tokens):
            told = self._matcher.get_error()
            raise InternalError(f"a token was drawn that the {self._rule.kind} does not allow: {told}")
        self.finished = self._matcher.is_stopped()

    def _think(self, newest: int, thought: Thought) -> None:
        after = thought.take(newest)
        if after is None:
            return
        self._thought = None
        if after.strip() and self._compiled is not None:
            self._take(self._tokenizer.tokenize_bytes(after.lstrip()))

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


def parse_value(text: str, depth: int = MAX_VALUE_DEPTH) -> Any:
    """The JSON value that a whole answer spells, as the wire can carry it: integers beyond ±2^53 become floats.

    Raises:
        ValueError: it cannot be carried: no finite number, half a surrogate pair, or too deep or large.
    """
    try:
        value = json.loads(text, parse_int=_number, parse_constant=_number)
        _check_size(value, depth)
        msgspec.msgpack.encode(value)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return value


def _number(text: str) -> int | float:
    value = int(text) if len(text) < 18 else float(text)
    return value if abs(value) <= MAX_INTEGER else float(value)


def values_in(value: Any) -> int:
    """How many values the wire carries for a parsed value; 0 for none."""
    return 0 if value is None else _check_size(value, MAX_VALUE_DEPTH)


def _check_size(value: Any, depth: int) -> int:
    """How many values there are in all. Raises ValueError where they are too many, too deep, or no finite numbers."""
    level, values = [value], 0
    for _ in range(depth):
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
