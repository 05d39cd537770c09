"""Guessing the next tokens by looking up what was said before: bookkeeping in plain Python, no MLX here.

An edit, a clean-up, a summary repeats its source. So there is a place in the tokens so far that the answer follows, and
what comes after that place is the guess. Where the answer departs from it, a token was put in, left out or replaced,
and it is picked up again close by; else where the latest three or two tokens occurred before. How often guesses come
true is counted for each kind of them on every token, guessed aloud or not, so that nothing has to be tried to find out.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST", "Lookup", "Odds"]

# How many tokens are guessed at most.
MOST = 24
# How far ahead in the source the answer may go on after it left tokens out.
NEAR = 16
# After so many tokens that are nowhere in the source the place in it is given up.
LOST = 6
# How many earlier occurrences of the same tokens are looked at.
CHAIN = 8
# How many tokens are indexed at a time: nobody waits long for it.
BITE = 8192
# Kinds of guesses: the answer put something in; it replaced something; a token that occurred anywhere before; and then
# by how many tokens in a row were as in the source.
_PUT_IN, _REPLACED, _FAR, _FIRST = 0, 1, 2, 3
_AGREED = (0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6)
_START = (0.2, 0.3, 0.1, 0.4, 0.5, 0.6, 0.75, 0.85, 0.92)
# What is known from elsewhere counts like so many observations; an old observation like so many newer ones at most.
_PRIOR, _MEMORY = 8, 64


class Odds:
    """How often each kind of guess comes true.

    Args:
        wider: what all requests together have shown; a new one begins with that.
    """

    def __init__(self, wider: Odds | None = None, start: Sequence[float] = _START) -> None:
        self.chances: list[float] = list(wider.chances if wider is not None else start)
        self._counts = [_PRIOR] * len(self.chances)
        self._wider = wider

    def saw(self, kind: int, true: bool) -> None:
        count = self._counts[kind] = min(self._counts[kind] + 1, _MEMORY)
        self.chances[kind] += (true - self.chances[kind]) / count
        if self._wider is not None:
            self._wider.saw(kind, true)


class Lookup:
    """One request's place in what was said before it and by it.

    Positions are those of the tokens so far, prompt and answer; they are not kept here, but given with each call.
    """

    def __init__(self, odds: Odds) -> None:
        self.odds = odds
        self._known = 0  # tokens that are indexed
        self._answer = 0  # from where on tokens are followed; before, only indexed
        self._at = -1  # where the next token is expected; -1 is nowhere
        self._agreed = 0  # how many tokens in a row came as expected
        self._lost = 0  # how many did not
        self._far = False
        self._ones: dict[int, int] = {}  # token → the position after it
        self._twos: dict[tuple[int, int], int] = {}  # the latest two → the position after them
        self._threes: dict[tuple[int, int, int], int] = {}
        self._earlier: list[int] = []  # by position: where the same two tokens occurred before, 0 is nowhere

    def follow(self, tokens: Sequence[int]) -> bool:
        """Take in the tokens that are new. Returns whether these were all: a long prompt takes several calls."""
        if self._known == 0:
            self._answer = len(tokens)
        end = min(len(tokens), self._known + BITE)
        for position in range(self._known, end):
            if position >= self._answer:
                self._step(tokens, position)
            elif position == self._answer - 1:
                self._find(tokens, position)
            self._index(tokens, position)
        self._known = end
        return end == len(tokens)

    def _index(self, tokens: Sequence[int], position: int) -> None:
        token = tokens[position]
        self._ones[token] = position + 1
        earlier = 0
        if position:
            two = (tokens[position - 1], token)
            earlier = self._twos.get(two, 0)
            self._twos[two] = position + 1
            if position > 1:
                self._threes[(tokens[position - 2], *two)] = position + 1
        self._earlier.append(earlier)

    def _step(self, tokens: Sequence[int], position: int) -> None:
        """One more token of the answer: was it what was expected, and what is expected now?"""
        token, at = tokens[position], self._at
        if at >= 0:
            if self._lost:
                other = at + self._lost
                replaced = other < position and tokens[other] == token
                self.odds.saw(_REPLACED, replaced)
                put_in = tokens[at] == token
                self.odds.saw(_PUT_IN, put_in)
                if put_in or replaced:
                    self._at, self._agreed, self._lost = (at if put_in else other) + 1, 1, 0
                    return
            else:
                true = tokens[at] == token
                self.odds.saw(self._kind(self._agreed), true)
                if true:
                    self._at += 1
                    self._agreed += 1
                    self._far = self._far and self._agreed < 3
                    if self._agreed < 3:
                        self._find(tokens, position, self._agreed)
                    return
        self._find(tokens, position)

    def _find(self, tokens: Sequence[int], position: int, agreed: int = 0) -> None:
        """Where the answer goes on, now that it departed from where it was, or has agreed with it for no longer than
        `agreed` tokens."""
        token, at = tokens[position], self._at
        if agreed < 3 and position > 1:
            found = self._threes.get((tokens[position - 2], tokens[position - 1], token), 0)
            if found:
                self._go(self._nearest(tokens, found, 3), 3)
                return
        if agreed < 2 and position:
            found = self._twos.get((tokens[position - 1], token), 0)
            if found:
                self._go(self._nearest(tokens, found, 2), 2)
                return
        if agreed:
            return
        if at >= 0:
            for near in range(at + 1, min(at + 1 + NEAR, position)):
                if tokens[near] == token:
                    self._go(near + 1, 1)
                    return
            self._lost += 1
            self._agreed = 0
            if self._lost <= LOST:
                return
        self._at, self._lost, self._agreed = -1, 0, 0
        if token in self._ones:
            self._go(self._ones[token], 1)
            self._far = True

    def _nearest(self, tokens: Sequence[int], found: int, length: int) -> int:
        """Of the places where the latest tokens occurred, the first one after where the answer was; else the latest."""
        at, best = self._at, found
        if at < 0:
            return found
        for _ in range(CHAIN):
            found = self._earlier[found - 1]
            if found < at:
                break
            if length == 2 or (found > 2 and tokens[found - 3] == tokens[best - 3]):
                best = found
        return best

    def _go(self, at: int, agreed: int) -> None:
        self._at, self._agreed, self._lost, self._far = at, agreed, 0, False

    def _kind(self, agreed: int) -> int:
        if self._far and agreed < 3:
            return _FAR
        return _FIRST - 1 + _AGREED[min(agreed, len(_AGREED) - 1)] if agreed else _PUT_IN

    def chances(self, most: int) -> list[float]:
        """How likely each of the next `most` tokens is to come as expected, given that those before it did. Empty
        where nothing is expected."""
        if self._at < 0:
            return []
        known = self.odds.chances
        if self._lost:
            made = [max(known[_PUT_IN], known[_REPLACED])]
            return made + [known[self._kind(agreed)] for agreed in range(1, most)]
        return [known[self._kind(self._agreed + number)] for number in range(most)]

    def expected(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens as they are expected. What the source lacks goes on as the guess itself does."""
        at = self._at
        if self._lost and self.odds.chances[_REPLACED] > self.odds.chances[_PUT_IN]:
            at = min(at + self._lost, len(tokens) - 1)
        made = list(tokens[at : at + count])
        period = len(tokens) - at
        while len(made) < count:
            made.append(made[len(made) - period])
        return made
