"""One connection of the asyncio shell: its transport, and who is woken by what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from .. import types
from ..errors import ConnectionLost, MlxdError, RequestTimeout
from ..rpc import Call, Session, Subscription

__all__ = ["Link"]

# Events not taken yet, beyond which the socket is left unread: the daemon then bounds what is kept, and says so.
_MOST_EVENTS = 256


class Link(asyncio.Protocol):
    """One connection: a transport and its session. A call's waiter is the list of futures to wake at its news."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._writable: asyncio.Future[None] | None = None
        self._reading = True
        self.left = False  # its daemon takes no more work; what it has accepted is still answered here
        self.gone: asyncio.Future[None] = self._loop.create_future()

    # --- called by the transport ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        session = self.session
        for call in session.receive(data):
            _wake(call)
            if isinstance(call, Subscription) and len(call.events) > _MOST_EVENTS and self._reading:
                self._reading = False
                cast(asyncio.Transport, self._transport).pause_reading()
        if session.closed is not None:
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        self.end(ConnectionLost(f"mlxd closed the connection: {error}") if error else None)
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # --- called by the client -------------------------------------------------------------------------------------

    def begin(self, make: Callable[[Session], tuple[Call[Any], bytes]]) -> Call[Any] | None:
        """Send a request. None: the connection had ended before, so that another may be used."""
        transport = self._transport
        if self.session.closed is not None or transport is None or transport.is_closing():
            return None
        call, data = make(self.session)
        transport.write(data)
        return call

    def greet(self) -> Call[types.HelloResult]:
        if self._transport is not None and (data := self.session.greet()):
            self._transport.write(data)
        return self.session.greeting

    async def wait(self, call: Call[Any], wait_s: float | None, *, news: bool = False) -> bool:
        """Wait until the call is done, or with `news` has anything to take. False where `wait_s` passed first."""
        if call.news if news else call.done:
            return True
        handle = None
        expired: list[bool] = []
        if wait_s is not None:
            handle = self._loop.call_later(wait_s, self._expire, call, expired)
        try:
            while not (call.news if news else call.done):
                if expired:
                    return False
                if self.session.closed is not None:
                    call.error, call.done = self.session.closed, True
                    break
                waiter = self._loop.create_future()
                if call.waiter is None:
                    call.waiter = [waiter]
                else:
                    call.waiter.append(waiter)
                await waiter
        finally:
            if handle is not None:
                handle.cancel()
        return True

    @staticmethod
    def _expire(call: Call[Any], expired: list[bool]) -> None:
        expired.append(True)
        _wake(call)

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return self.session.closed is None and not self.left

    @property
    def congested(self) -> bool:
        """Whether more is waiting to be sent than should be added to."""
        return self._writable is not None

    async def drained(self, wait_s: float | None) -> None:
        """Wait while the daemon reads slower than this client writes."""
        if self._writable is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._writable), wait_s)
            except TimeoutError:
                raise RequestTimeout("mlxd did not take the request in time") from None

    def cancel(self, call: Call[Any]) -> None:
        """Cancel on the wire; the answer is still awaited."""
        data = self.session.cancel(call)
        if data and self._transport is not None:
            self._transport.write(data)

    def abandon(self, call: Call[Any]) -> None:
        """Nobody waits for this call any more: cancel it on the wire, and drop its answer when it comes."""
        self.cancel(call)
        self.session.forget(call)

    def resume_reading(self) -> None:
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    def end(self, error: MlxdError | None = None) -> None:
        """Close the connection; everything that is pending ends with `error`."""
        for call in self.session.lost(error):
            _wake(call)
        self.resume_writing()
        if self._transport is not None:
            self._transport.abort()


def _wake(call: Call[Any]) -> None:
    waiters, call.waiter = call.waiter, None
    for waiter in waiters or ():
        if not waiter.done():
            waiter.set_result(None)
