"""One connection of the blocking shell, and which of the threads that share it reads the socket.

No thread reads in the background: whoever waits for an answer reads the socket for all, and hands that role on when
it has its own (leader and follower). A lone caller thus gets its answer without a switch between threads.
"""

from __future__ import annotations

import select
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import types
from ..errors import ConnectionLost, MlxdError, RequestTimeout
from ..rpc import Call, Session

__all__ = ["CLOSE_S", "Link", "deadline_after", "seconds_left"]

# How long closing a stream waits for the daemon to confirm that it ended.
CLOSE_S = 5.0
# A stream whose consumer is busy is read from time to time, so that the daemon does not take this client for stalled.
_KEEP_S = 0.25


def seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def deadline_after(wait_s: float | None) -> float | None:
    return None if wait_s is None else time.monotonic() + wait_s


class Link:
    """One connection: a socket, its session, and who reads it.

    `_lock` guards the session and the roles, and is never held while waiting for the peer. `_writing` keeps frames
    whole and in the order of their ids. Only the leader (`_led`) polls and receives.
    """

    def __init__(self, sock: sockets.socket, session: Session) -> None:
        self.session = session
        self._sock = sock
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._space = bytearray(65_536)
        self._view = memoryview(self._space)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._led = False
        self._followers: list[tuple[Call[Any], threading.Condition]] = []
        self._streams: set[Call[Any]] = set()
        self.left = False  # its daemon takes no more work; what it has accepted is still answered here
        self._dropped: deque[Call[Any]] = deque()  # streams that nobody holds any more; see Stream.__del__
        self._keeper: threading.Thread | None = None
        self._keeping = threading.Condition(self._lock)

    # --- out ------------------------------------------------------------------------------------------------------

    def begin(self, make: Callable[[Session], tuple[Call[Any], bytes]], deadline: float | None) -> Call[Any] | None:
        """Send a request. None: the connection had ended before any of it was sent, so that another may be used."""
        with self._writing:
            with self._lock:
                if self.session.closed is not None:
                    return None
                call, data = make(self.session)
            return call if self._write(data, deadline) else None

    def greet(self, deadline: float | None) -> Call[types.HelloResult]:
        with self._writing:
            with self._lock:
                data = self.session.greet()
            if data:
                self._write(data, deadline)
        return self.session.greeting

    def _write(self, data: bytes, deadline: float | None) -> bool:
        """Whether any byte was sent. A failure ends the link, and with it every call on it."""
        sent = 0
        try:
            while True:
                try:
                    sent += self._sock.send(data[sent:] if sent else data)
                except BlockingIOError:
                    pass
                if sent == len(data):
                    return True
                poller = select.poll()
                poller.register(self._sock, select.POLLOUT)
                left_s = seconds_left(deadline)
                if not poller.poll(None if left_s is None else left_s * 1000):
                    raise RequestTimeout("mlxd did not take the request in time")
        except OSError as error:
            with self._lock:  # it may have said why before it closed
                if not self._led and self.session.closed is None:
                    self._lead(None, deadline_after(0), False)
            self.end(ConnectionLost(f"mlxd closed the connection: {error.strerror or error}"))
            return sent > 0
        except BaseException as error:  # half a frame may be out: nothing else can follow it
            self.end(error if isinstance(error, MlxdError) else ConnectionLost("a request was interrupted half sent"))
            raise

    def abandon(self, call: Call[Any]) -> None:
        """Nobody waits for this call any more: cancel it on the wire, and drop its answer when it comes."""
        with self._lock:
            data = self.session.cancel(call)
            self.session.forget(call)
            self._streams.discard(call)
        if data:
            with self._writing:
                self._write(data, deadline_after(CLOSE_S))

    def cancel(self, call: Call[Any]) -> None:
        """Cancel on the wire; the answer is still awaited."""
        with self._lock:
            data = self.session.cancel(call)
        if data:
            with self._writing:
                self._write(data, deadline_after(CLOSE_S))

    # --- in -------------------------------------------------------------------------------------------------------

    def wait(self, call: Call[Any], deadline: float | None, *, news: bool = False) -> bool:
        """Wait until the call is done, or with `news` has anything to take. False where the deadline passed first."""
        with self._lock:
            try:
                while not (call.news if news else call.done):
                    if self.session.closed is not None:  # the call was made, or given up, beside its end
                        call.error, call.done = self.session.closed, True
                    elif self._led:
                        if not self._follow(call, deadline):
                            return call.news if news else call.done
                    elif not self._lead(call, deadline, news):
                        return False
            finally:
                if not self._led and self._followers:
                    self._followers[0][1].notify()
        return True

    def _follow(self, call: Call[Any], deadline: float | None) -> bool:
        entry = (call, threading.Condition(self._lock))
        self._followers.append(entry)
        try:
            return entry[1].wait(seconds_left(deadline))
        finally:
            self._followers.remove(entry)

    def _lead(self, call: Call[Any] | None, deadline: float | None, news: bool) -> bool:
        """Read for everybody until the call has what it waits for (None: until nothing is left to read)."""
        self._led = True
        try:
            while call is None or not (call.news if news else call.done):
                self._lock.release()
                try:
                    size = self._receive(deadline)
                finally:
                    self._lock.acquire()
                if size is None:
                    return False
                if size == 0:
                    self._wake(self.session.lost())
                elif size > 0:
                    self._wake(self.session.receive(self._view[:size]))
                if self.session.closed is not None:
                    return True
        finally:
            self._led = False
            if self.session.closed is not None:
                self._sock.close()
        return True

    def _receive(self, deadline: float | None) -> int | None:
        """Bytes that came into `_space`; 0 at the end of the stream, None where the deadline passed, -1 for nothing."""
        left_s = seconds_left(deadline)
        if not self._poller.poll(None if left_s is None else left_s * 1000):
            return None
        try:
            return self._sock.recv_into(self._space)
        except BlockingIOError:
            return -1
        except OSError:
            return 0

    def _wake(self, touched: list[Call[Any]]) -> None:
        for call, condition in self._followers:
            if call in touched:
                condition.notify()

    def stale(self) -> bool:
        """Whether the connection has ended. An idle one is asked, since nobody reads it meanwhile."""
        with self._lock:
            if self.session.closed is None and not self._led and not self.session.busy:
                self._lead(None, 0.0, False)
            return self.session.closed is not None

    def end(self, error: MlxdError | None = None) -> None:
        """Close the connection; everything that is pending ends with `error`."""
        with self._lock:
            self._wake(self.session.lost(error))
            self._keeping.notify()
            if not self._led:
                self._sock.close()
                return
        try:
            self._sock.shutdown(sockets.SHUT_RDWR)  # the leader wakes, and closes it
        except OSError:  # the leader was quicker
            return

    # --- streams that nobody reads at the moment ------------------------------------------------------------------

    def keep(self, call: Call[Any]) -> None:
        """Have the link read now and then while this stream is open, whatever its consumer does."""
        with self._lock:
            self._streams.add(call)
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="mlxd-keeper", daemon=True)
                self._keeper.start()

    def unkeep(self, call: Call[Any]) -> None:
        with self._lock:
            self._streams.discard(call)
            if not self._streams:
                self._keeping.notify()

    def drop(self, call: Call[Any]) -> None:
        """As `abandon`, but from a finaliser, which may run inside any of this link's locks."""
        self._dropped.append(call)

    def _keep(self) -> None:
        while True:
            with self._lock:
                if self._streams and self.session.closed is None:
                    self._keeping.wait(_KEEP_S)
                if not self._streams or self.session.closed is not None:
                    self._keeper = None
                    return
                if not self._led:
                    self._lead(None, 0.0, False)
                    if self._followers:
                        self._followers[0][1].notify()
            while self._dropped:
                self.abandon(self._dropped.popleft())
