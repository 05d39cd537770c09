"""What a forward pass takes by how many tokens it is of, as measured on the way; and how many guesses are worth one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Pace"]

# How many tokens may be guessed at a time: each number is measured by itself.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
# Nothing is guessed for less gain than this.
MARGIN = 1.08
# What a further token of a pass is believed to cost, as a share of the first, until it was measured.
OPTIMISM = 0.05
# So many times guessing is passed over as not worth it before it is measured anew; doubled each time.
FEWEST_PASSED, MOST_PASSED = 32, 2048


class Pace:
    """Seconds by tokens in a pass, smoothed so that what came from elsewhere, which only ever slows, counts little.

    Args:
        plain: where passes of one token are measured; None is here.
    """

    def __init__(self, plain: Pace | None = None) -> None:
        self._plain = plain if plain is not None else self
        self._seconds: dict[int, float] = {}
        self._met: set[int] = set()
        self._passed = 0
        self._patience = FEWEST_PASSED

    def saw(self, tokens: int, seconds: float) -> None:
        """A pass took so long. The first of a size does not count: kernels may have been compiled for it."""
        if tokens not in self._met:
            self._met.add(tokens)
            return
        known = self._seconds.get(tokens)
        if known is None:
            self._seconds[tokens] = seconds
        else:
            share = 0.4 if seconds < known else 0.1
            self._seconds[tokens] = known + share * (min(seconds, 4 * known) - known)

    @property
    def one(self) -> float | None:
        """Seconds for one token without guessing; None until it is known."""
        return self._plain._seconds.get(1)

    def of(self, tokens: int) -> float:
        """What a pass of so many tokens takes, as far as one can tell from others. Needs `one`."""
        known = self._seconds.get(tokens)
        if known is not None:
            return known
        one = self.one
        assert one is not None
        points = sorted({**self._seconds, 1: one}.items())
        before = [point for point in points if point[0] < tokens]
        after = [point for point in points if point[0] > tokens]
        (size, seconds) = before[-1]
        if after:
            slope = (after[0][1] - seconds) / (after[0][0] - size)
        elif len(before) > 1:
            slope = max((seconds - before[-2][1]) / (size - before[-2][0]), 0.0)
        else:
            slope = OPTIMISM * one
        return seconds + slope * (tokens - size)

    def choose(self, chances: Sequence[float], *, sure: int = 0, always: bool = False) -> int:
        """How many tokens to guess; 0 for none.

        Args:
            chances: for each token, that it comes as guessed, given that those before it did.
            sure: so many of them are no guesses for this pass, but must come true all the same.
            always: guess in any case.
        """
        one = self.one
        if one is None:
            return _fitting(4, len(chances)) if always else 0
        likely, tokens = 1.0, 1.0
        for chance in chances[:sure]:
            likely *= chance
        best, most, worth, position = 0, 0.0, 0.0, sure
        for size in SIZES:
            if sure + size > len(chances):
                break
            while position < sure + size:
                likely *= chances[position]
                tokens += likely
                position += 1
            gain = tokens * one / self.of(size + 1)
            if gain > most:
                best, most, worth = size, gain, tokens
        if always or most > MARGIN:
            if most > MARGIN:
                self._patience = FEWEST_PASSED
            return best
        if worth >= 1.5:  # it would, were it cheaper: look now and then whether it is by now
            self._passed += 1
            if self._passed >= self._patience:
                self._passed, self._patience = 0, min(2 * self._patience, MOST_PASSED)
                return best
        return 0


def _fitting(wished: int, most: int) -> int:
    return max((size for size in SIZES if size <= min(wished, most)), default=0)
