"""`EventStream`: the daemon's events for who blocks, over lost connections and restarts."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .. import types
from ..connect import Backoff, Start
from ..errors import ConnectFailed, ConnectionLost, MlxdError, RequestTimeout, ShuttingDown
from ..rpc import MOST_MOVES, Cursor, Subscription, fresh
from .link import Link, deadline_after, seconds_left

if TYPE_CHECKING:
    from .client import Client

__all__ = ["EventStream"]


class EventStream:
    """The daemon's events, in order, none lost or repeated, over reconnects and restarts.

    After a reconnect it goes on from the last event. Where that is not possible (the daemon restarted, or was away for
    too long) there comes an event named `resync`, made here, whose `snapshot` replaces everything known before; so
    does a `lagged` event of the daemon's. Nothing is read ahead: a slow consumer is the daemon's to bound.
    """

    def __init__(self, client: Client, cursor: Cursor) -> None:
        self._client = client
        self._cursor = cursor
        self._made: deque[types.Event] = deque()
        self._backoff = Backoff()
        self._ended = threading.Event()
        self._link: Link | None = None
        self._begin(deadline_after(client._timeout_s))

    @property
    def snapshot(self) -> types.Snapshot | None:
        """The last whole state that came; None where `since` was given and honoured."""
        return self._cursor.snapshot

    @property
    def epoch(self) -> str:
        """Which run of the daemon `rev` counts in."""
        return self._cursor.epoch

    @property
    def rev(self) -> int:
        """The last event handed out, or where the subscription began: what `since` takes, with `epoch`."""
        return self._cursor.rev

    def __iter__(self) -> Iterator[types.Event]:
        return self

    def __next__(self) -> types.Event:
        event = self.get()
        if event is None:
            raise StopIteration
        return event

    def get(self, wait_s: float | None = None) -> types.Event | None:
        """The next event; None once the stream was closed.

        Args:
            wait_s: seconds to wait for it, None without limit. Raises RequestTimeout; the stream stays usable.
        """
        deadline = deadline_after(wait_s)
        while not self._ended.is_set():
            if self._made:
                return self._made.popleft()
            subscription = self._subscription
            if subscription.events:
                event = subscription.events.popleft()
                self._cursor.passed(event)
                self._backoff.reset()
                return event
            if subscription.error is None:
                if self._link is not None and not self._link.wait(subscription, deadline, news=True):
                    raise RequestTimeout(f"no event within {wait_s:g} s")
            else:
                self._resume(subscription.error, deadline)
        if self._link is not None:  # made while another thread closed the stream
            self._link.end()
        return None

    def _begin(self, deadline: float | None) -> None:
        """Subscribe. A daemon that goes meanwhile is followed to the one that comes after it."""
        moves = 0
        while True:
            try:
                self._subscribe(deadline, self._client._start, again=moves > 0)
                return
            except (ConnectionLost, ShuttingDown) as error:
                moves += 1
                if moves == MOST_MOVES or not (self._client._reconnect and self._cursor.again(error)):
                    raise
            time.sleep(self._backoff.next_s())

    def _subscribe(self, deadline: float | None, start: Start, *, again: bool = False) -> None:
        link = self._link = self._client._open(deadline, start, again=again)
        try:
            call = link.begin(lambda to: to.subscribe(self._cursor.params()), deadline)
            if call is None:
                raise ConnectionLost("mlxd closed the connection at once")
            if not link.wait(call, deadline):
                raise RequestTimeout("no answer to `events.subscribe` in time")
            made = self._cursor.subscribed(call.outcome(), time.time())
        except BaseException:
            link.end()
            raise
        assert isinstance(call, Subscription)
        self._subscription = call
        if made is not None:
            self._made.append(made)

    def _resume(self, error: MlxdError, deadline: float | None) -> None:
        """One attempt to go on after the connection ended, after a delay that grows with every vain one."""
        if self._ended.is_set():
            return
        if not (isinstance(error, ConnectionLost | ShuttingDown) and self._client._reconnect):
            raise fresh(error)
        left_s = seconds_left(deadline)
        delay_s = self._backoff.next_s()
        if self._ended.wait(delay_s if left_s is None else min(left_s, delay_s)):
            return
        try:
            # A daemon that was stopped on purpose is not started again by those who watch it.
            self._subscribe(deadline_after(self._client._timeout_s), start=False)
        except (ConnectFailed, ConnectionLost, ShuttingDown, RequestTimeout):
            if deadline is not None and time.monotonic() >= deadline:
                raise RequestTimeout("no event in time: mlxd is away") from None

    def close(self) -> None:
        """End the stream, from any thread; an iteration elsewhere ends too."""
        self._ended.set()
        if self._link is not None:
            self._link.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
