"""`Client`, whose methods block, with its streams and leases."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from .. import types
from ..batching import REFUSED, AnyItem, frames
from ..connect import Start, dial, resolve
from ..errors import ClientError, ConnectionLost, RequestTimeout, RpcError
from ..methods import Blocking, Methods, Request, Wait
from ..rpc import MOST_MOVES, Call, Cursor, Session, fresh
from ..types import UNSET, BatchResult, Job
from .events import EventStream
from .link import CLOSE_S, Link, deadline_after

__all__ = ["Client", "ModelLease", "Stream"]


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
        self._link: Link | None = None
        self._left: list[Link] = []  # links to daemons that others took over from
        self._closed = False

    def __enter__(self) -> Self:
        self._live(deadline_after(self._timeout_s))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, *, wait_s: Wait = UNSET) -> types.HelloResult:
        """Connect now, and return what the daemon says of itself. Raises ConnectFailed, Unsupported."""
        patience_s = self._timeout_s if wait_s is UNSET else wait_s
        deadline = deadline_after(patience_s)
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

    def _live(self, deadline: float | None) -> Link:
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

    def _open(self, deadline: float | None, start: Start, *, again: bool) -> Link:
        if self._closed:
            raise ClientError("the client is closed")
        dialling = dial(self.path, start, again=again, until=deadline)
        while True:
            try:
                step = next(dialling)
            except StopIteration as end:
                return Link(end.value, Session(self._name, self._version))
            if not isinstance(step, float):
                raise TypeError("`start` returned an awaitable; only AsyncClient can wait for it")
            time.sleep(step)

    def _begin(self, request: Request[Any], deadline: float | None) -> tuple[Link, Call[Any]]:
        """Send a request. One that meets a connection which had ended goes to a new one, as none of it was sent:
        the first write to a Unix socket whose peer has closed it fails at once (EPIPE)."""
        for _ in range(2):
            link = self._live(deadline)
            call = link.begin(lambda to: to.start(request.method, request.params, request.result_type), deadline)
            if call is not None:
                return link, call
        why = link.session.closed
        raise fresh(why) if isinstance(why, RpcError) else ConnectionLost("mlxd closes every connection at once")

    def _moved(self, link: Link, call: Call[Any]) -> bool:
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

    def _answer(self, request: Request[Any]) -> tuple[Link, Any]:
        wait_s = request.patience_s(self._timeout_s)
        deadline = deadline_after(wait_s)
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
        link, call = self._begin(request, deadline_after(wait_s))
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
        link: Link,
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
            if not self._link.wait(call, deadline_after(self._wait_s), news=True):
                self._link.abandon(call)
                call.error, call.done = RequestTimeout(f"nothing of the answer within {self._wait_s:g} s"), True
        return None

    def _again(self) -> None:
        """Ask the daemon that has taken over."""
        self._moves += 1
        self._link, self._call = self._client._begin(self._request, deadline_after(self._wait_s))
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
            if not self._link.wait(call, deadline_after(CLOSE_S)):
                self._link.abandon(call)
                call.error, call.done = RequestTimeout(f"no end of the stream within {CLOSE_S:g} s"), True
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

    def __init__(self, client: Client, link: Link, lease: types.Lease) -> None:
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
        deadline = deadline_after(self._client._timeout_s)
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
