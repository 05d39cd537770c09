"""The server: accepts connections, counts them, and ends them in good order."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from mlxd_client.errors import ShuttingDown
from mlxd_client.types import ClientTotals

from .events import EventLog
from .limits import ServerLimits
from .listen import Listener, Peer
from .methods.table import METHODS
from .runtime_api import Configuration, Log, Runtime
from .session import Session

__all__ = ["Server"]

# How long those have to say what they want that are accepted only to be sent elsewhere.
_HEARING_S = 0.05


class Server:
    """Serves a runtime on a listening socket.

    Args:
        runtime: what answers.
        events: the log that the runtime publishes to.
        configuration: the settings, where clients may look at them and change them.
        uid: the only user who is served; by default the one this process runs as.

    Life: start, begin_drain or leave, drained, close. In between, `pause` and `resume` where another daemon may take
    over.

    Attributes:
        paused: what clients send is left unread.
        moved: clients who come later are to connect anew, and find another daemon.
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
        self.draining = self.paused = self.moved = False
        self.configuration = configuration
        self.capabilities = sorted(METHODS)
        self._uid = os.geteuid() if uid is None else uid
        self._sessions: dict[int, Session] = {}
        self._transports: set[Session] = set()  # also those that are closing, and only write out what is left
        self._deserted = asyncio.Event()
        self._deserted.set()
        self._last_client = self._refused = 0
        self.refused_requests: Counter[tuple[str, str]] = Counter()  # by method and kind: as many as the table allows
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._sock: socket.socket | None = None
        self._listener: asyncio.AbstractServer | None = None
        self.on_clients: Callable[[], None] = lambda: None  # one came or went

    @property
    def clients(self) -> int:
        """Connections that are served."""
        return len(self._sessions)

    @property
    def client_totals(self) -> ClientTotals:
        refused = self._refused
        requests: dict[str, dict[str, int]] = {}
        for (method, kind), count in self.refused_requests.items():
            requests.setdefault(method, {})[kind] = count
        return ClientTotals(
            open=self.clients, subscribers=self.subscribers, accepted=self._last_client - refused, refused=refused,
            refused_requests=requests,
        )  # fmt: skip

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
        self._sock = listener.sock
        await self.accept()

    async def move(self, listener: Listener) -> None:
        """Accept connections from a socket that takes the other one's place."""
        self.stop_accepting()
        await self.start(listener)

    async def accept(self) -> None:
        """Accept connections anew after `stop_accepting`; in a pause, `resume` does that."""
        if self.paused:
            return
        assert self._sock is not None
        # The socket outlives this: it may be handed over. And its file is the listener's to remove.
        keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._listener = await asyncio.get_running_loop().create_unix_server(
            self._make_session, sock=self._sock.dup(), backlog=self.limits.backlog, **keep
        )

    async def take(self, sock: socket.socket) -> None:
        """Serve a connection that did not come through the listener."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._make_session, sock)

    def stop_accepting(self) -> None:
        """Leave connections that are not accepted yet to whoever else holds the socket."""
        if self._listener is not None:
            self._listener.close()

    def pause(self) -> None:
        """Accept nobody, and leave unread what clients send. Answers and events go on."""
        self.paused = True
        self.stop_accepting()

    async def resume(self) -> None:
        """Go on as if there had been no pause; nothing where there was none."""
        if not self.paused:
            return
        self.paused = False
        await self.accept()
        self._read_on()

    def _read_on(self) -> None:
        for session in list(self._sessions.values()):
            session.read_on()

    def leave(self) -> None:
        """Take no new work: another daemon does. Each connection closes once all that it asked is answered, and its
        client is told to connect anew. See `refused`."""
        self.draining = self.moved = True
        self.paused = False
        self.stop_accepting()
        self._read_on()
        for session in list(self._sessions.values()):
            session.part()

    async def take_waiting(self) -> None:
        """Tell those that connected and were not accepted the same."""
        assert self._sock is not None
        taken = 0
        while taken <= self.limits.backlog:
            try:
                made, _ = self._sock.accept()
            except OSError:
                break
            await self.take(made)
            taken += 1
        if taken:  # what they have sent by now is read, and so refused by its id
            await asyncio.sleep(_HEARING_S)

    def refused(self) -> ShuttingDown:
        """Why new work is refused. With `reconnect`, nothing was done of it and a new connection finds who does it."""
        if self.moved:
            return ShuttingDown("another daemon takes over; connect anew", reconnect=True)
        return ShuttingDown("the daemon is shutting down and takes no new work")

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
        if self._sock is not None:
            self._sock.close()
        for session in list(self._sessions.values()):
            session.shut(self.refused())
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
        """Whether one more connection would be one too many. Those that are closing hold a descriptor, too."""
        return len(self._transports) >= self.limits.connections

    def session_refused(self) -> None:
        self._refused += 1

    def session_opened(self, session: Session) -> None:
        self._sessions[session.client] = session
        self._transports.add(session)
        self._deserted.clear()
        self.log.debug("client_connected", client=session.client, pid=session.peer and session.peer.pid)
        if self.moved:
            session.part()
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
