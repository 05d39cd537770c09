"""Percentiles of values that come one at a time and are not kept: counts in buckets that grow with the value."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

__all__ = ["RELATIVE_ERROR", "Histogram"]

# Buckets to each power of two, as in an HDR histogram (G. Tene, hdrhistogram.org).
_PARTS = 16
_LEAST, _MOST = -16, 20  # powers of two: 15 µs to 12 days, or as many tokens a second
_LARGEST = 2.0**_MOST
# A bucket is 1/16 of its lower bound wide at most, and its middle stands for all values in it.
RELATIVE_ERROR = 1 / (2 * _PARTS)


class Histogram:
    """Of values from 2^-16 to 2^20; what lies beyond counts as that. Takes about 5 KiB, however many values there are.

    A bucket holds the values above its lower bound and up to its upper one, that included, as Prometheus counts.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * ((_MOST - _LEAST) * _PARTS + 1)))

    def add(self, value: float) -> None:
        self._counts[_place(value)] += 1

    def quantile(self, q: float) -> float:
        """The value that a share `q` of all values does not exceed, at most RELATIVE_ERROR off; 0 of no values."""
        counts = self._counts
        rank = max(1, math.ceil(q * sum(counts)))
        seen = 0
        for place, count in enumerate(counts):
            seen += count
            if seen >= rank:
                return (_upper(place - 1) + _upper(place)) / 2 if place else _upper(0)
        return 0.0

    def up_to(self, powers: Sequence[int]) -> list[int]:
        """How many values are no larger than each of these powers of two, which are given in rising order. Exact."""
        told, seen, begin = [], 0, 0
        for power in powers:
            end = (power - _LEAST) * _PARTS + 1
            seen += sum(self._counts[begin:end])
            told.append(seen)
            begin = end
        return told


def _place(value: float) -> int:
    """The bucket of a value. The first holds all up to 2^_LEAST; then come _PARTS to each power of two."""
    if not value > 0:
        return 0
    fraction, power = math.frexp(min(value, _LARGEST))  # value = fraction × 2^power, and fraction is in [0.5, 1)
    return max(0, (power - 1 - _LEAST) * _PARTS + math.ceil(fraction * 2 * _PARTS) - _PARTS)


def _upper(place: int) -> float:
    octave, part = divmod(place, _PARTS)
    return math.ldexp(1 + part / _PARTS, octave + _LEAST)
