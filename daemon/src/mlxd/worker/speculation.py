"""Guessing ahead: tokens are proposed cheaply, one forward pass of the model checks them all, and those stay that the
model would have chosen itself.

Each position's token is chosen as without guessing: by its own logits, penalties over what precedes it, and its own
draw, which depends on nothing but the request's key and the position. So guesses change when tokens come, never which
ones. Whether to guess, and how far, is decided anew for each pass, from what passes take and how often guesses came
true.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import mlx.core as mx
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlxd_client.errors import Unsupported
from mlxd_client.types import Speculation

from .lookup import MOST, Lookup, Odds
from .pace import Pace

if TYPE_CHECKING:
    from .draft import Draft
    from .sampling import Sampling

__all__ = ["Guess", "Guesses", "can_check", "can_take_back", "prefixes", "take_back"]


class Guesses:
    """Who guesses for one model's requests, and what all of them have shown of it.

    Args:
        model: as mlx_lm made it.

    Attributes:
        usable: what the model computes for a token can be taken back.
        pace: what forward passes take.
        odds: how often lookups come true.
        draft: the draft model; None where there is none.
    """

    def __init__(self, model: Any) -> None:
        self.usable = can_check(model)
        self.pace = Pace()
        self.odds = Odds()
        self.draft: Draft | None = None

    def guess(self, wished: str, *, apart: bool) -> Guess | None:
        """The guesses of a request; None where it goes without.

        Args:
            wished: as on the wire: auto, off, lookup, draft.
            apart: the answer follows a rule, and each token is chosen with that in view, one after the other; or its
                caches or its arithmetic are of a kind of their own.

        Raises:
            Unsupported: a kind was asked for that cannot be.
        """
        if wished in ("lookup", "draft"):
            if not self.usable:
                raise _refused(
                    "what this model computes cannot be taken back token by token, so that nothing is guessed"
                )
            if apart:
                raise _refused(
                    "nothing is guessed with a schema, a grammar, required tools, thinking_budget, kv_bits,"
                    " context_policy rotate or deterministic"
                )
            if wished == "draft" and (self.draft is None or self.draft.closed):
                raise _refused("this model has no draft model; models.load attaches one")
            return Guess(self, drafting=wished == "draft", always=True)
        if wished == "off" or not self.usable or apart:
            return None
        return Guess(self, drafting=self.draft is not None and not self.draft.closed, always=False)

    def forget(self) -> None:
        """The step that was under way is lost, and what it left in the caches cannot be trusted."""
        if self.draft is not None:
            self.draft.forget()


class Guess:
    """One request's guesses.

    Args:
        shared: what is known from others.
        drafting: the draft model guesses; else it is looked up.
        always: guess whenever the request decodes alone, not only where that pays.

    Attributes:
        drafted, accepted: tokens that were guessed, and those of them that came true.
    """

    def __init__(self, shared: Guesses, *, drafting: bool, always: bool) -> None:
        self.drafted = self.accepted = 0
        self._pace = shared.pace
        self._odds = Odds(shared.odds)
        self._lookup = Lookup(self._odds)
        self._draft = shared.draft if drafting else None
        self._always = always
        self._began = 0.0  # when the last step began, or the checking in it
        self._size = 0  # of how many tokens it was; 0 where its time says nothing
        self._plain = False  # it was a plain one
        self._tokens: list[int] | None = None  # of whom the guesses are
        self._first = 0  # how many there were when guessing was first thought of

    @property
    def kind(self) -> Literal["lookup", "draft"]:
        return "lookup" if self._draft is None else "draft"

    def report(self) -> Speculation | None:
        """For the reply; None where nothing was guessed."""
        if not self.drafted:
            return None
        return Speculation(kind=self.kind, drafted_tokens=self.drafted, accepted_tokens=self.accepted)

    # --- time

    def begin(self) -> None:
        """A step begins: so long did the last one take, with all that came after it."""
        now = time.perf_counter()
        if self._size == 1:
            self._pace.saw(1, now - self._began)
        elif self._size > 1:
            pace = self._pace if self._draft is None else self._draft.pace
            pace.saw(self._size, now - self._began)
        self._began = now
        # A plain step is described while the one before computes: after another kind it says nothing.
        self._size, self._plain = int(self._plain), True

    def pause(self) -> None:
        """The next step does not follow the last one."""
        self._size, self._plain = 0, False

    # --- guesses

    def propose(self, batch: Pending, most: int) -> list[int] | mx.array | None:
        """The tokens that a pass should check, the newest first; None for a plain step.

        Args:
            batch: the row.
            most: how many tokens may be guessed.
        """
        if most < 1:
            return None
        if self._draft is None:
            return self._look_up(batch, min(most, MOST))
        return self._have_drafted(self._draft, batch, min(most, MOST))

    def _look_up(self, batch: Pending, most: int) -> list[int] | None:
        tokens = batch.tokens[0]
        if tokens is not self._tokens:  # of several answers to one prompt each has its own
            self._tokens, self._lookup = tokens, Lookup(self._odds)
        lookup = self._lookup
        if not lookup.follow(tokens):
            return None
        # To know the newest token is to wait for it, with nothing described meanwhile: only where it may pay.
        unknown = batch.newest is None and not self._always
        if unknown and not self._pace.choose(lookup.chances(most + 1), sure=1):
            return None
        newest = self._read(batch)
        tokens.append(newest)
        try:
            lookup.follow(tokens)
            count = self._pace.choose(lookup.chances(most), always=self._always)
            return [newest, *lookup.expected(tokens, count)] if count else None
        finally:
            tokens.pop()

    def _have_drafted(self, draft: Draft, batch: Pending, most: int) -> list[int] | mx.array | None:
        tokens = batch.tokens[0]
        if tokens is not self._tokens:
            self._tokens, self._first = tokens, len(tokens)
        count = draft.choose(most, always=self._always)
        try:
            if not count or not draft.ready(tokens, len(tokens) - self._first, always=self._always):
                return None
            newest = self._read(batch)
            return draft.propose(tokens, newest, count, batch.samplers[0], batch.logits_processors[0])
        except Exception:  # nobody asked for its opinion: the answer goes on without it
            draft.closed = True
            return None

    def _read(self, batch: Pending) -> int:
        """The newest token's value. The checking begins with it."""
        newest = batch.newest
        if newest is None:
            newest = int(batch._next_tokens.item())
        self._began = time.perf_counter()
        return newest

    def checked(self, guessed: int, accepted: int) -> None:
        """So many of the guessed tokens came true."""
        self.drafted += guessed
        self.accepted += accepted
        self._size, self._plain = guessed + 1, False
        if self._draft is not None:
            self._draft.checked(guessed, accepted)


def _refused(why: str) -> Unsupported:
    return Unsupported(why, option="speculation")


class Pending(Protocol):
    """What a Guess looks at of a RowBatch of one row: among that, the token that comes next, where it is known."""

    tokens: list[list[int]]
    samplers: list[Sampling]
    logits_processors: list[tuple[Any, ...]]
    newest: int | None
    _next_tokens: Any


class _Prefix(Sequence[int]):
    """So many tokens, of which only the last ones are at hand."""

    def __init__(self, tail: list[int], length: int) -> None:
        self._tail = tail
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tail[index]


def prefixes(tokens: list[int], fed: list[int], window: int) -> list[_Prefix]:
    """What precedes each of `fed`, which follow `tokens`, as a Plan wants it: the last `window` tokens are at hand."""
    tail, length = tokens[-window:], len(tokens)
    line = tail + fed
    return [_Prefix(line[max(0, end - window) : end], length + end - len(tail)) for end in range(len(tail), len(line))]


# --- caches ---------------------------------------------------------------------------------------------------------


def can_check(model: Any) -> bool:
    """Whether tokens can be taken back out of the caches that rows of this model decode on."""
    return {type(cache) for cache in make_prompt_cache(model)} <= {KVCache, RotatingKVCache}


def can_take_back(caches: Iterable[Any]) -> bool:
    return all(type(cache) in (KVCache, BatchRotatingKVCache) for cache in caches)


def take_back(caches: Iterable[Any], count: int) -> None:
    """Take the last `count` tokens out of the caches of a batch of one. They came in one pass of several tokens."""
    if not count:
        return
    for cache in caches:
        if type(cache) is KVCache:
            cache.trim(count)
        else:
            # A pass of several tokens puts a window in order and keeps what each of them may look back on: what is left
            # without the last ones is a whole window still.
            cache._idx -= count
            cache._offset -= count
            cache.offset = cache.offset - count
            cache.keys, cache.values = cache.keys[..., : cache._idx, :], cache.values[..., : cache._idx, :]
