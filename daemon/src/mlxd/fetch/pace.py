"""How fast bytes come, how fast they may, and when to try again. No clock of its own: `now` is in monotonic seconds."""

from __future__ import annotations

import random
import threading
from collections import deque

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 60.0
_SAMPLES = 12


class Flow:
    """Bytes over the last `window_s` seconds, more or less: bytes are counted in slices of a twelfth of it."""

    def __init__(self, window_s: float, now: float) -> None:
        self.window_s = window_s
        self._began = now
        self._slices: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, count: int) -> None:
        self._sum += count
        if self._slices and now - self._slices[-1][0] < self.window_s / _SAMPLES:
            began, before = self._slices[-1]
            self._slices[-1] = (began, before + count)
        else:
            self._slices.append((now, count))
        self._forget(now)

    def pause(self, seconds: float) -> None:
        """This much time does not count: we did not want any bytes then."""
        self._began += seconds
        self._slices = deque((began + seconds, count) for began, count in self._slices)

    def rate(self, now: float) -> float:
        """Bytes per second over the window, or since the beginning where that is shorter."""
        self._forget(now)
        return self._sum / max(0.25, min(self.window_s, now - self._began))

    def full(self, now: float) -> bool:
        """Whether a whole window has passed, so that the rate can be judged."""
        return now - self._began >= self.window_s

    def _forget(self, now: float) -> None:
        while self._slices and self._slices[0][0] < now - self.window_s:
            self._sum -= self._slices.popleft()[1]


class Limiter:
    """Lets at most `rate` bytes a second pass, over all threads that ask; 0 lets everything pass."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, count: int, now: float) -> float:
        """Seconds to wait after having read `count` bytes, before reading more."""
        if not self._rate:
            return 0.0
        with self._lock:
            self._free_at = max(self._free_at, now) + count / self._rate
            return self._free_at - now


def delay_s(failures: int, retry_after_s: float | None = None) -> float:
    """How long to wait after so many failures in a row: twice as long each time, half of it by chance, so that many who
    failed at once do not return at once. What the server asked for is honoured, up to a minute."""
    backoff = min(FIRST_DELAY_S * 2.0 ** max(0, failures - 1), MAX_DELAY_S)
    backoff *= 0.75 + random.random() / 2
    return min(MAX_DELAY_S, max(backoff, retry_after_s or 0.0))


class Failures:
    """How often one file was tried in vain, and whether that is enough.

    Errors of the network are forgiven once an attempt has brought something; wrong bytes never are.
    """

    FORGIVEN_AFTER_BYTES = 8 * 1024 * 1024

    def __init__(self, attempts: int) -> None:
        self._allowed = attempts
        self._network = 0
        self._hash = 0
        self._brought = 0

    @property
    def count(self) -> int:
        return self._network + self._hash

    @property
    def exhausted(self) -> bool:
        return self.count >= self._allowed

    def brought(self, count: int) -> None:
        self._brought += count

    def network(self) -> None:
        if self._brought >= self.FORGIVEN_AFTER_BYTES:
            self._network = 0
        self._network += 1
        self._brought = 0

    def hash(self) -> None:
        self._hash += 1
        self._brought = 0
