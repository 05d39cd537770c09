"""The crash-loop breaker: when to stop trying again. PURE: no clock, no I/O; the time comes with each call.

    closed ──`deaths` within `window_s`──→ open ──cool-down over──→ half_open ──success──→ closed
                                             ↑                          │
                                             └── death, doubled cool-down

Half-open admits one try. A try that neither succeeds nor dies is forgotten after another cool-down, so that a try
which was cancelled cannot keep the breaker shut for ever.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator

import msgspec

__all__ = ["Breaker", "BreakerSettings", "BreakerState", "Breakers"]


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`deaths` within `window_s` seconds open it; it stays open for `cooldown_s`, doubled with each failed try up to
    `max_cooldown_s`. A child that lived `alive_s` counts as a success, should nothing have been asked of it."""

    deaths: int = 3
    window_s: float = 60.0
    cooldown_s: float = 5.0
    max_cooldown_s: float = 300.0
    alive_s: float = 30.0


class Breaker:
    """The breaker of one key, such as a model. `now` is in seconds and must not go back."""

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self.settings = settings or BreakerSettings()
        self._deaths: deque[float] = deque(maxlen=self.settings.deaths)
        self._cooldown_s = 0.0  # 0 while closed
        self._retry_at = 0.0
        self._try_at: float | None = None  # when the half-open try was admitted

    def state(self, now: float) -> BreakerState:
        if not self._cooldown_s:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._retry_at else BreakerState.HALF_OPEN

    @property
    def retry_at(self) -> float | None:
        """When the next try is admitted, while open, or was, while half-open; None while closed."""
        return self._retry_at if self._cooldown_s else None

    def deaths(self, now: float) -> int:
        """How many deaths count at present."""
        return sum(1 for at in self._deaths if at > now - self.settings.window_s)

    def admit(self, now: float) -> bool:
        """Whether to start a child now. While half-open, a True is the one try."""
        state = self.state(now)
        if state is not BreakerState.HALF_OPEN:
            return state is BreakerState.CLOSED
        if self._try_at is not None and now < self._try_at + self._cooldown_s:
            return False
        self._try_at = now
        return True

    def died(self, now: float) -> None:
        """A child died unexpectedly. While open this changes nothing: whatever died was started before."""
        self._deaths.append(now)
        state = self.state(now)
        if state is BreakerState.HALF_OPEN:
            self._open(now, min(2 * self._cooldown_s, self.settings.max_cooldown_s))
        elif state is BreakerState.CLOSED and self.deaths(now) >= self.settings.deaths:
            self._open(now, self.settings.cooldown_s)

    def succeeded(self, now: float) -> None:
        """A child did what it is for. Closes a half-open breaker.

        A closed one keeps counting its deaths: a child that dies after each success is in a crash loop all the same.
        """
        if self.state(now) is BreakerState.HALF_OPEN:
            self.reset()

    def reset(self) -> None:
        """Close it and forget, by command."""
        self._deaths.clear()
        self._cooldown_s = self._retry_at = 0.0
        self._try_at = None

    def idle(self, now: float) -> bool:
        """Whether it remembers nothing that counts."""
        return not self._cooldown_s and not self.deaths(now)

    def _open(self, now: float, cooldown_s: float) -> None:
        self._cooldown_s = cooldown_s
        self._retry_at = now + cooldown_s
        self._try_at = None


class Breakers:
    """A breaker per key. Those that remember nothing are dropped, so that the number of keys stays bounded by the
    number of recent deaths."""

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self.settings = settings or BreakerSettings()
        self._breakers: dict[str, Breaker] = {}

    def state(self, key: str, now: float) -> BreakerState:
        breaker = self._breakers.get(key)
        return breaker.state(now) if breaker else BreakerState.CLOSED

    def retry_at(self, key: str) -> float | None:
        breaker = self._breakers.get(key)
        return breaker.retry_at if breaker else None

    def admit(self, key: str, now: float) -> bool:
        breaker = self._breakers.get(key)
        return breaker.admit(now) if breaker else True

    def died(self, key: str, now: float) -> BreakerState:
        """Returns: the state afterwards."""
        self._prune(now)
        breaker = self._breakers.setdefault(key, Breaker(self.settings))
        breaker.died(now)
        return breaker.state(now)

    def succeeded(self, key: str, now: float) -> None:
        breaker = self._breakers.get(key)
        if breaker:
            breaker.succeeded(now)
            self._prune(now)

    def reset(self, key: str | None = None) -> None:
        """Close one, or all."""
        if key is None:
            self._breakers.clear()
        else:
            self._breakers.pop(key, None)

    def tripped(self, now: float) -> Iterator[tuple[str, Breaker]]:
        """Those that are open or half-open, for `status`."""
        return ((key, one) for key, one in self._breakers.items() if one.state(now) is not BreakerState.CLOSED)

    def _prune(self, now: float) -> None:
        self._breakers = {key: one for key, one in self._breakers.items() if not one.idle(now)}
