"""Count, mean and variance of values that come one at a time and are not kept."""

from __future__ import annotations

import math

__all__ = ["Moments"]


class Moments:
    """Welford's recurrence, which never subtracts large sums from each other: B. P. Welford, "Note on a Method for
    Calculating Corrected Sums of Squares and Products", Technometrics 4 (1962); Knuth, TAOCP vol. 2, section 4.2.2.

    Attributes:
        total: the plain sum, which never falls where no value is negative.
    """

    __slots__ = ("_squares", "count", "highest", "lowest", "mean", "total")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.total = 0.0
        self.lowest = math.inf
        self.highest = -math.inf
        self._squares = 0.0  # of the differences from the mean

    def add(self, value: float) -> None:
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self._squares += before * (value - self.mean)
        self.total += value
        if value < self.lowest:
            self.lowest = value
        if value > self.highest:
            self.highest = value

    @property
    def stddev(self) -> float:
        """The sample's; 0 of fewer than two values."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
