"""The blocking shell around rpc.py: `Client`, its streams, leases and events. Threads may share a client.

No thread reads in the background: whoever waits for an answer reads the socket for all, and hands that role on when
it has its own (leader and follower). A lone caller thus gets its answer without a switch between threads.
"""

from __future__ import annotations

import os
import select
import socket as sockets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from . import types
from .batching import REFUSED, AnyItem, frames
from .connect import Backoff, Start, dial, resolve
from .errors import ClientError, ConnectFailed, ConnectionLost, MlxdError, RequestTimeout, ShuttingDown
from .methods import Blocking, Methods, Request, Wait
from .rpc import MOST_MOVES, Call, Cursor, Session, Subscription, fresh
from .types import UNSET, BatchResult, Job

__all__ = ["Client", "EventStream", "ModelLease", "Stream"]

# How long closing a stream waits for the daemon to confirm that it ended.
_CLOSE_S = 5.0
# A stream whose consumer is busy is read from time to time, so that the daemon does not take this client for stalled.
_KEEP_S = 0.25


def _left_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _deadline(wait_s: float | None) -> float | None:
    return None if wait_s is None else time.monotonic() + wait_s


class _Link:
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
                left_s = _left_s(deadline)
                if not poller.poll(None if left_s is None else left_s * 1000):
                    raise RequestTimeout("mlxd did not take the request in time")
        except OSError as error:
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
                self._write(data, _deadline(_CLOSE_S))

    def cancel(self, call: Call[Any]) -> None:
        """Cancel on the wire; the answer is still awaited."""
        with self._lock:
            data = self.session.cancel(call)
        if data:
            with self._writing:
                self._write(data, _deadline(_CLOSE_S))

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
            return entry[1].wait(_left_s(deadline))
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
        left_s = _left_s(deadline)
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


class Client(Methods, Blocking):
    """A connection to mlxd whose methods block. Opened on first use, and again after the daemon restarted.

    A request that was in flight when the connection ended raises ConnectionLost and is never sent again by itself,
    since it may have run; the next call connects anew. Where another daemon takes over, what the old one had accepted
    is answered by that, and what it says it has not done goes to the new one.

    Args:
        socket: the socket's path; None for the one that the environment names (see paths.py).
        name, version: how this app appears in the daemon's logs.
        timeout_s: patience of short calls in seconds, None for no limit; `wait_s` of each call overrides it.
        start: what to do where no daemon listens: False raises ConnectFailed, True starts `mlxd serve` detached, a
            list is the command line to start instead, a function is called to do it.
        reconnect: False raises ConnectionLost for every call after the first connection ended.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        name: str = "",
        version: str = "",
        timeout_s: float | None = 30.0,
        start: Start = False,
        reconnect: bool = True,
    ) -> None:
        self.path = resolve(socket)
        self._name = (name or os.path.basename(sys.argv[0] if sys.argv else "") or "python")[:256]
        self._version = version
        self._timeout_s = timeout_s
        self._start = start
        self._reconnect = reconnect
        self._opening = threading.Lock()
        self._link: _Link | None = None
        self._left: list[_Link] = []  # links to daemons that others took over from
        self._closed = False

    def __enter__(self) -> Self:
        self._live(_deadline(self._timeout_s))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, *, wait_s: Wait = UNSET) -> types.HelloResult:
        """Connect now, and return what the daemon says of itself. Raises ConnectFailed, Unsupported."""
        patience_s = self._timeout_s if wait_s is UNSET else wait_s
        deadline = _deadline(patience_s)
        link = self._live(deadline)
        if link.stale():
            link = self._live(deadline)
        greeting = link.greet(deadline)
        if not link.wait(greeting, deadline):
            raise RequestTimeout(f"mlxd did not introduce itself within {patience_s:g} s")
        return greeting.outcome()

    def close(self) -> None:
        """End the connection. The daemon cancels what still runs on it and releases its leases."""
        self._closed = True
        for link in (*self._left, self._link):
            if link is not None:
                link.end(ConnectionLost("the client was closed"))

    @property
    def hello(self) -> types.HelloResult | None:
        """What the daemon said of itself; None before its first answer."""
        return self._link.session.hello if self._link is not None else None

    def submit_items(
        self,
        items: Iterable[AnyItem],
        *,
        model: str | None = None,
        key: str | None = None,
        name: str | None = None,
    ) -> Job:
        """Put in a batch job of any size, frame by frame, and return it once all of it is on disk and runs.

        Args:
            items: as for `submit_batch`, read as they are sent; they may be generated.
            key: makes it safe to ask again after any failure, with the same items: what is there is not added twice.

        Raises what `submit_batch` does for the first item that cannot be; the job, of which nothing has run, is
        deleted then.
        """
        rest = frames(items)
        first = next(rest, [])
        job = self.submit_batch(first, model=model, key=key, name=name, open=True)
        try:
            at = len(first)
            for frame in rest:
                self.append_batch(job.job, frame, at=at)
                at += len(frame)
        except REFUSED:
            if job.phase == "open":
                self.delete_batch(job.job, cancel=True)
            raise
        return self.start_batch(job.job)

    def results(self, job: str, *, after: int | None = None) -> Iterator[BatchResult]:
        """All results of a batch job that there are in the order of its items, page by page; see `batch_results`."""
        while True:
            page = self.batch_results(job, after=after)
            yield from page.results
            if not page.more:
                return
            after = page.results[-1].index

    def events(
        self,
        topics: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        since: tuple[str, int] | None = None,
    ) -> EventStream:
        """Subscribe. The stream has its own connection, so that a slow reader delays nothing else.

        Args:
            topics: topics or event names (see EVENT_TOPICS); None for all.
            models: ids; None for all.
            since: (epoch, rev) of the last event that was seen, to go on from there.
        """
        cursor = Cursor(
            list(topics) if topics is not None else None, list(models) if models is not None else None, since
        )
        return EventStream(self, cursor)

    # --- what Methods and the streams stand on --------------------------------------------------------------------

    def _live(self, deadline: float | None) -> _Link:
        link = self._link
        if link is not None and link.session.closed is None and not link.left:
            return link
        with self._opening:
            link = self._link
            if link is None or link.session.closed is not None or link.left:
                used = link is not None and link.session.hello is not None  # an unused one may be closed as idle
                if used and not self._reconnect:
                    raise ConnectionLost("the connection ended, and this client does not reconnect")
                link = self._link = self._open(deadline, self._start, again=used)
        return link

    def _open(self, deadline: float | None, start: Start, *, again: bool) -> _Link:
        if self._closed:
            raise ClientError("the client is closed")
        dialling = dial(self.path, start, again=again, until=deadline)
        while True:
            try:
                step = next(dialling)
            except StopIteration as end:
                return _Link(end.value, Session(self._name, self._version))
            if not isinstance(step, float):
                raise TypeError("`start` returned an awaitable; only AsyncClient can wait for it")
            time.sleep(step)

    def _begin(self, request: Request[Any], deadline: float | None) -> tuple[_Link, Call[Any]]:
        """Send a request. One that meets a connection which had ended goes to a new one, as none of it was sent:
        the first write to a Unix socket whose peer has closed it fails at once (EPIPE)."""
        for _ in range(2):
            link = self._live(deadline)
            call = link.begin(lambda to: to.start(request.method, request.params, request.result_type), deadline)
            if call is not None:
                return link, call
        raise ConnectionLost("mlxd closes every connection at once")

    def _moved(self, link: _Link, call: Call[Any]) -> bool:
        """Whether the request is to be sent again, since another daemon takes over and nothing was done of it."""
        if not (call.moved and self._reconnect):
            return False
        with self._opening:
            if not link.left:
                link.left = True
                self._left = [old for old in self._left if old.session.busy] + [link]
        return True

    def _run(self, request: Request[Any]) -> Any:
        return self._answer(request)[1]

    def _answer(self, request: Request[Any]) -> tuple[_Link, Any]:
        wait_s = request.patience_s(self._timeout_s)
        deadline = _deadline(wait_s)
        for _ in range(MOST_MOVES):
            link, call = self._begin(request, deadline)
            try:
                answered = link.wait(call, deadline)
            except BaseException:
                link.abandon(call)
                raise
            if not answered:
                link.abandon(call)
                raise RequestTimeout(f"no answer to `{request.method}` within {wait_s:g} s")
            if not self._moved(link, call):
                break
        return link, request.finish(call.outcome())

    def _stream(self, request: Request[types.Completion]) -> Stream:
        wait_s = request.patience_s(self._timeout_s)
        link, call = self._begin(request, _deadline(wait_s))
        return Stream(self, request, link, call, wait_s)

    def _lease(self, request: Request[types.Lease]) -> ModelLease:
        link, lease = self._answer(request)
        return ModelLease(self, link, lease)


class Stream:
    """An answer as it is made: an iterator of its text, piece by piece; where `n` were asked, of the first one's, and
    `pieces` has all.

    Leaving its `with` block, or `close`, cancels what is not finished. Iterating raises what went wrong.

    Attributes:
        request_id: of this request on its connection, for `Client.cancel`.
    """

    def __init__(
        self,
        client: Client,
        request: Request[types.Completion],
        link: _Link,
        call: Call[types.Completion],
        wait_s: float | None,
    ) -> None:
        self.request_id = call.id
        self._client = client
        self._request = request
        self._moves = 0
        self._link = link
        self._call = call
        self._wait_s = wait_s
        self._closed = False
        link.keep(call)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces():
            if piece.text and not piece.index:
                yield piece.text

    def pieces(self) -> Iterator[types.Stream]:
        """Everything the daemon says on the way: text, reasoning, tool calls, and phases before the first token."""
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> types.Stream | None:
        while not self._closed:
            call = self._call
            if call.pieces:
                return call.pieces.popleft()
            if call.done:
                self._link.unkeep(call)
                if self._moves < MOST_MOVES and self._client._moved(self._link, call):
                    self._again()
                    continue
                call.outcome()
                return None
            if not self._link.wait(call, _deadline(self._wait_s), news=True):
                self._link.abandon(call)
                call.error, call.done = RequestTimeout(f"nothing of the answer within {self._wait_s:g} s"), True
        return None

    def _again(self) -> None:
        """Ask the daemon that has taken over."""
        self._moves += 1
        self._link, self._call = self._client._begin(self._request, _deadline(self._wait_s))
        self.request_id = self._call.id
        self._link.keep(self._call)

    @property
    def result(self) -> types.Completion:
        """The whole answer, once the stream has ended. Raises how it failed (Cancelled, where it was closed early)."""
        if not self._call.done:
            raise RuntimeError("the stream has not ended; iterate it, or call wait()")
        return self._call.outcome()

    def wait(self) -> types.Completion:
        """Read the rest and return the whole answer."""
        for _ in self.pieces():
            pass
        return self.result

    def close(self) -> None:
        """End the stream: cancel it if it still runs, and wait a few seconds for the daemon to confirm."""
        if self._closed:
            return
        self._closed = True
        call = self._call
        if not call.done:
            self._link.cancel(call)
            if not self._link.wait(call, _deadline(_CLOSE_S)):
                self._link.abandon(call)
                call.error, call.done = RequestTimeout(f"no end of the stream within {_CLOSE_S:g} s"), True
        self._link.unkeep(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._call.done:
            self._link.drop(self._call)


class ModelLease:
    """A model kept loaded. Ends with its `with` block, `release`, or the connection that holds it.

    Attributes:
        lease: its id.
        model: the model as it was when the lease was given.
    """

    def __init__(self, client: Client, link: _Link, lease: types.Lease) -> None:
        self.lease = lease.lease
        self.model = lease.model
        self._client = client
        self._link = link
        self._released = False

    @property
    def held(self) -> bool:
        """Whether the model is still kept: not released, and the connection alive as far as is known."""
        return not self._released and self._link.session.closed is None

    def release(self) -> None:
        """Give the model free. A connection that ended has done so already."""
        if not self.held:
            return
        self._released = True
        deadline = _deadline(self._client._timeout_s)
        call = self._link.begin(
            lambda to: to.start("models.release", types.LeaseParams(lease=self.lease), Any), deadline
        )
        if call is None:
            return
        if not self._link.wait(call, deadline):
            self._link.abandon(call)
            raise RequestTimeout("no answer to `models.release` in time")
        try:
            call.outcome()
        except ConnectionLost:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


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
        self._link: _Link | None = None
        self._begin(_deadline(client._timeout_s))

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
        deadline = _deadline(wait_s)
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
        left_s = _left_s(deadline)
        delay_s = self._backoff.next_s()
        if self._ended.wait(delay_s if left_s is None else min(left_s, delay_s)):
            return
        try:
            # A daemon that was stopped on purpose is not started again by those who watch it.
            self._subscribe(_deadline(self._client._timeout_s), start=False)
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
