"""The server: accepts connections, counts them, and ends them in good order."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from mlxd_client.errors import ShuttingDown
from mlxd_client.types import ClientTotals

from .events import EventLog
from .limits import ServerLimits
from .listen import Listener, Peer
from .methods.table import METHODS
from .runtime_api import Configuration, Log, Runtime
from .session import Session

__all__ = ["Server"]


class Server:
    """Serves a runtime on a listening socket.

    Args:
        runtime: what answers.
        events: the log that the runtime publishes to.
        configuration: the settings, where clients may look at them and change them.
        uid: the only user who is served; by default the one this process runs as.

    Life: start, begin_drain, drained, close.
    """

    def __init__(
        self,
        runtime: Runtime,
        events: EventLog,
        *,
        log: Log,
        limits: ServerLimits | None = None,
        configuration: Configuration | None = None,
        uid: int | None = None,
    ) -> None:
        self.runtime = runtime
        self.events = events
        self.log = log
        self.limits = limits or ServerLimits()
        self.configuration = configuration
        self.draining = False
        self.capabilities = sorted(METHODS)
        self._uid = os.geteuid() if uid is None else uid
        self._sessions: dict[int, Session] = {}
        self._transports: set[Session] = set()  # also those that are closing, and only write out what is left
        self._deserted = asyncio.Event()
        self._deserted.set()
        self._last_client = self._refused = 0
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._listener: asyncio.AbstractServer | None = None
        self.on_clients: Callable[[], None] = lambda: None  # one came or went

    @property
    def clients(self) -> int:
        """Connections that are served."""
        return len(self._sessions)

    @property
    def client_totals(self) -> ClientTotals:
        refused = self._refused
        return ClientTotals(
            open=self.clients, subscribers=self.subscribers, accepted=self._last_client - refused, refused=refused
        )

    @property
    def deserted(self) -> bool:
        """No connection is open, nor being closed."""
        return not self._transports

    @property
    def subscribers(self) -> int:
        return self.events.subscribers

    @property
    def working(self) -> int:
        """Requests under way that draining waits for."""
        return self._working

    async def start(self, listener: Listener) -> None:
        """Accept connections from now on. The listener stays the caller's to close, after `close`."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(
            self._make_session, sock=listener.sock, backlog=self.limits.backlog
        )

    async def take(self, sock: socket.socket) -> None:
        """Serve a connection that did not come through the listener."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._make_session, sock)

    def stop_accepting(self) -> None:
        """Leave connections that are not accepted yet to whoever else holds the socket."""
        if self._listener is not None:
            self._listener.close()

    def begin_drain(self) -> None:
        """Refuse new work with ShuttingDown. Connections are still accepted, so that clients learn why."""
        self.draining = True

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no work is under way. Returns False where that took longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop accepting, answer what is still under way with ShuttingDown, write everything out, close.

        Takes at most `limits.close_flush_s` for clients that do not read.
        """
        self.draining = True
        self.stop_accepting()
        for session in list(self._sessions.values()):
            session.shut(ShuttingDown("the daemon is shutting down"))
        try:
            async with asyncio.timeout(self.limits.close_flush_s):
                await self._deserted.wait()
        except TimeoutError:
            for session in list(self._transports):
                session.abort()
            await self._deserted.wait()

    # --- for sessions ---------------------------------------------------------------------------------------------

    def refusal(self, peer: Peer | None) -> str | None:
        """Why a peer is not served, before a byte of it is read; None where it is."""
        if peer is None or peer.uid != self._uid:
            return "another user"
        return None

    @property
    def full(self) -> bool:
        """Whether one more connection would be one too many."""
        return len(self._sessions) >= self.limits.connections

    def session_refused(self) -> None:
        self._refused += 1

    def session_opened(self, session: Session) -> None:
        self._sessions[session.client] = session
        self._transports.add(session)
        self._deserted.clear()
        self.log.debug("client_connected", client=session.client, pid=session.peer and session.peer.pid)
        self.on_clients()

    def session_closed(self, session: Session) -> None:
        if self._sessions.pop(session.client, None) is None:
            return
        self.log.debug("client_gone", client=session.client)
        try:
            self.runtime.client_gone(session.client)
        except Exception as error:  # raising into the transport would only lose it
            self.log.error("client_gone_failed", client=session.client, exc_info=error)

    def session_ended(self, session: Session) -> None:
        """Its last byte is written, or given up."""
        self._transports.discard(session)
        if not self._transports:
            self._deserted.set()
            self.on_clients()

    def work_begins(self) -> None:
        self._working += 1
        self._idle.clear()

    def work_ends(self) -> None:
        self._working -= 1
        if self._working == 0:
            self._idle.set()

    def _make_session(self) -> Session:
        self._last_client += 1
        return Session(self, self._last_client)
