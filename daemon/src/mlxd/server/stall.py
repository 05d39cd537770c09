"""Notices a peer that takes no bytes any more, although there are some for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["StallWatch"]

_LOOKS = 4  # per limit: so much later than the limit it is noticed, at most a quarter


class StallWatch:
    """Watches a transport's write buffer while that is not empty.

    Args:
        limit_s: how long the buffer may go without shrinking, in seconds.
        stalled: called once with the bytes that are left, when that is over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float, stalled: Callable[[int], None]) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._stalled = stalled
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self, transport: Any) -> None:
        """Begin, with what is in the buffer now."""
        self.stop()
        self._look(transport, transport.get_write_buffer_size(), self._loop.time())

    def stop(self) -> None:
        """The buffer is empty, or the connection gone. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, transport: Any, size: int, since: float) -> None:
        """`size` is what was left when the peer last took something, at `since`."""
        now, left = self._loop.time(), transport.get_write_buffer_size()
        if left < size:
            since = now
        if now - since >= self._limit_s:
            self._timer = None
            self._stalled(left)
            return
        self._timer = self._loop.call_later(self._limit_s / _LOOKS, self._look, transport, left, since)
