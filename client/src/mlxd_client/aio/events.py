"""`AsyncEventStream`: the daemon's events for who awaits, over lost connections and restarts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .. import types
from ..connect import Backoff, Start
from ..errors import ConnectFailed, ConnectionLost, MlxdError, RequestTimeout, ShuttingDown
from ..rpc import MOST_MOVES, Cursor, Subscription, fresh
from .link import Link

if TYPE_CHECKING:
    from .client import AsyncClient

__all__ = ["AsyncEventStream"]


class AsyncEventStream:
    """The daemon's events, in order, none lost or repeated, over reconnects and restarts.

    After a reconnect it goes on from the last event. Where that is not possible (the daemon restarted, or was away for
    too long) there comes an event named `resync`, made here, whose `snapshot` replaces everything known before; so
    does a `lagged` event of the daemon's. Little is read ahead: a slow consumer is the daemon's to bound.
    """

    def __init__(self, client: AsyncClient, cursor: Cursor) -> None:
        self._client = client
        self._cursor = cursor
        self._made: deque[types.Event] = deque()
        self._backoff = Backoff()
        self._ended = asyncio.Event()
        self._link: Link | None = None
        self._subscription: Subscription | None = None

    @property
    def snapshot(self) -> types.Snapshot | None:
        """The last whole state that came; None before the subscription, and where `since` was given and honoured."""
        return self._cursor.snapshot

    @property
    def epoch(self) -> str:
        """Which run of the daemon `rev` counts in."""
        return self._cursor.epoch

    @property
    def rev(self) -> int:
        """The last event handed out, or where the subscription began: what `since` takes, with `epoch`."""
        return self._cursor.rev

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> types.Event:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def get(self, wait_s: float | None = None) -> types.Event | None:
        """The next event; None once the stream was closed.

        Args:
            wait_s: seconds to wait for it, None without limit. Raises RequestTimeout; the stream stays usable.
        """
        deadline = None if wait_s is None else time.monotonic() + wait_s
        await self._subscribed()
        while not self._ended.is_set():
            if self._made:
                return self._made.popleft()
            link, subscription = self._link, self._subscription
            assert link is not None
            assert subscription is not None
            if subscription.events:
                event = subscription.events.popleft()
                if not subscription.events:
                    link.resume_reading()
                self._cursor.passed(event)
                self._backoff.reset()
                return event
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if subscription.error is not None:
                await self._resume(subscription.error, left_s)
            elif not await link.wait(subscription, left_s, news=True):
                raise RequestTimeout(f"no event within {wait_s:g} s")
        return None

    async def _subscribed(self) -> None:
        """Subscribe, if that is not done. A daemon that goes meanwhile is followed to the one that comes after it."""
        moves = 0
        while self._subscription is None and not self._ended.is_set():
            try:
                await self._subscribe(self._client._start, again=moves > 0)
            except (ConnectionLost, ShuttingDown) as error:
                moves += 1
                if moves == MOST_MOVES or not (self._client._reconnect and self._cursor.again(error)):
                    raise
                await asyncio.sleep(self._backoff.next_s())

    async def _subscribe(self, start: Start, *, again: bool = False) -> None:
        wait_s = self._client._timeout_s
        link = self._link = await self._client._open(wait_s, start, again=again)
        try:
            call = link.begin(lambda to: to.subscribe(self._cursor.params()))
            if call is None:
                raise ConnectionLost("mlxd closed the connection at once")
            if not await link.wait(call, wait_s):
                raise RequestTimeout("no answer to `events.subscribe` in time")
            made = self._cursor.subscribed(call.outcome(), time.time())
        except BaseException:
            link.end()
            raise
        assert isinstance(call, Subscription)
        self._subscription = call
        if made is not None:
            self._made.append(made)
        if self._ended.is_set():  # closed meanwhile by another task
            link.end()

    async def _resume(self, error: MlxdError, left_s: float | None) -> None:
        """One attempt to go on after the connection ended, after a delay that grows with every vain one."""
        if self._ended.is_set():
            return
        if not (isinstance(error, ConnectionLost | ShuttingDown) and self._client._reconnect):
            raise fresh(error)
        delay_s = self._backoff.next_s()
        try:
            await asyncio.wait_for(self._ended.wait(), delay_s if left_s is None else min(left_s, delay_s))
            return
        except TimeoutError:
            pass
        try:
            # A daemon that was stopped on purpose is not started again by those who watch it.
            await self._subscribe(start=False)
        except (ConnectFailed, ConnectionLost, ShuttingDown, RequestTimeout):
            if left_s is not None and left_s <= delay_s:
                raise RequestTimeout("no event in time: mlxd is away") from None

    async def aclose(self) -> None:
        """End the stream; an iteration in another task ends too."""
        self._ended.set()
        if self._link is not None:
            self._link.end()
            await self._link.gone

    async def __aenter__(self) -> Self:
        await self._subscribed()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()
