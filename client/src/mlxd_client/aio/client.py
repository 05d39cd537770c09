"""`AsyncClient`, whose methods are coroutines, with its streams and leases."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from .. import types
from ..batching import REFUSED, AnyItem, frames
from ..connect import Start, dial, resolve
from ..errors import ClientError, ConnectionLost, RequestTimeout
from ..methods import Awaiting, Methods, Request, Wait
from ..rpc import MOST_MOVES, Call, Cursor, Session
from ..types import UNSET, BatchResult, Job
from .events import AsyncEventStream
from .link import Link

__all__ = ["AsyncClient", "AsyncModelLease", "AsyncStream"]

# How long closing a stream waits for the daemon to confirm that it ended.
_CLOSE_S = 5.0


class AsyncClient(Methods, Awaiting):
    """A connection to mlxd whose methods are coroutines. Opened on first use, and again after the daemon restarted.

    A request that was in flight when the connection ended raises ConnectionLost and is never sent again by itself,
    since it may have run; the next call connects anew. Where another daemon takes over, what the old one had accepted
    is answered by that, and what it says it has not done goes to the new one. A task that is cancelled cancels its
    request in the daemon.

    Args: as for `Client`; a function given as `start` may be a coroutine function.
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
        self._opening = asyncio.Lock()
        self._link: Link | None = None
        self._left: list[Link] = []  # links to daemons that others took over from
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._live(self._timeout_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self, *, wait_s: Wait = UNSET) -> types.HelloResult:
        """Connect now, and return what the daemon says of itself. Raises ConnectFailed, Unsupported."""
        patience_s = self._timeout_s if wait_s is UNSET else wait_s
        link = await self._live(patience_s)
        greeting = link.greet()
        if not await link.wait(greeting, patience_s):
            raise RequestTimeout(f"mlxd did not introduce itself within {patience_s:g} s")
        return greeting.outcome()

    async def close(self) -> None:
        """End the connection. The daemon cancels what still runs on it and releases its leases."""
        self._closed = True
        for link in (*self._left, self._link):
            if link is not None:
                link.end(ConnectionLost("the client was closed"))
                await link.gone

    @property
    def hello(self) -> types.HelloResult | None:
        """What the daemon said of itself; None before its first answer."""
        return self._link.session.hello if self._link is not None else None

    async def submit_items(
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
        job = await self.submit_batch(first, model=model, key=key, name=name, open=True)
        try:
            at = len(first)
            for frame in rest:
                await self.append_batch(job.job, frame, at=at)
                at += len(frame)
        except REFUSED:
            if job.phase == "open":
                await self.delete_batch(job.job, cancel=True)
            raise
        return await self.start_batch(job.job)

    async def results(self, job: str, *, after: int | None = None) -> AsyncIterator[BatchResult]:
        """All results of a batch job that there are in the order of its items, page by page; see `batch_results`."""
        while True:
            page = await self.batch_results(job, after=after)
            for result in page.results:
                yield result
            if not page.more:
                return
            after = page.results[-1].index

    def events(
        self,
        topics: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        since: tuple[str, int] | None = None,
    ) -> AsyncEventStream:
        """Subscribe, when entered with `async with` or first iterated. The stream has its own connection.

        Args:
            topics: topics or event names (see EVENT_TOPICS); None for all.
            models: ids; None for all.
            since: (epoch, rev) of the last event that was seen, to go on from there.
        """
        cursor = Cursor(
            list(topics) if topics is not None else None, list(models) if models is not None else None, since
        )
        return AsyncEventStream(self, cursor)

    # --- what Methods and the streams stand on --------------------------------------------------------------------

    async def _live(self, wait_s: float | None) -> Link:
        link = self._link
        if link is not None and link.usable:
            return link
        async with self._opening:
            link = self._link
            if link is None or not link.usable:
                used = link is not None and link.session.hello is not None  # an unused one may be closed as idle
                if used and not self._reconnect:
                    raise ConnectionLost("the connection ended, and this client does not reconnect")
                link = self._link = await self._open(wait_s, self._start, again=used)
        return link

    async def _open(self, wait_s: float | None, start: Start, *, again: bool) -> Link:
        if self._closed:
            raise ClientError("the client is closed")
        until = None if wait_s is None else time.monotonic() + wait_s
        dialling = dial(self.path, start, again=again, until=until)
        while True:
            try:
                step = next(dialling)
            except StopIteration as end:
                sock = end.value
                break
            await (asyncio.sleep(step) if isinstance(step, float) else step)
        session = Session(self._name, self._version)
        try:
            _, link = await asyncio.get_running_loop().create_unix_connection(lambda: Link(session), sock=sock)
        except BaseException:
            sock.close()
            raise
        return link

    async def _begin(self, request: Request[Any], wait_s: float | None) -> tuple[Link, Call[Any]]:
        """Send a request. One that meets a connection which had ended goes to a new one, as none of it was sent."""
        for _ in range(2):
            link = self._link
            if link is None or not link.usable:
                link = await self._live(wait_s)
            if link.congested:
                await link.drained(wait_s)
            call = link.begin(lambda to: to.start(request.method, request.params, request.result_type))
            if call is not None:
                return link, call
        raise ConnectionLost("mlxd closes every connection at once")

    def _moved(self, link: Link, call: Call[Any]) -> bool:
        """Whether the request is to be sent again, since another daemon takes over and nothing was done of it."""
        if not (call.moved and self._reconnect):
            return False
        if not link.left:
            link.left = True
            self._left = [old for old in self._left if old.session.busy] + [link]
        return True

    async def _run(self, request: Request[Any]) -> Any:
        return (await self._answer(request))[1]

    async def _answer(self, request: Request[Any]) -> tuple[Link, Any]:
        wait_s = request.patience_s(self._timeout_s)
        for _ in range(MOST_MOVES):
            link, call = await self._begin(request, wait_s)
            try:
                answered = await link.wait(call, wait_s)
            except BaseException:
                link.abandon(call)
                raise
            if not answered:
                link.abandon(call)
                raise RequestTimeout(f"no answer to `{request.method}` within {wait_s:g} s")
            if not self._moved(link, call):
                break
        return link, request.finish(call.outcome())

    def _stream(self, request: Request[types.Completion]) -> AsyncStream:
        return AsyncStream(self, request)

    def _lease(self, request: Request[types.Lease]) -> AsyncModelLease:
        return AsyncModelLease(self, request)


class AsyncStream:
    """An answer as it is made: an async iterator of its text, piece by piece. The request is sent when it is entered
    with `async with`, or first iterated. Where `n` answers were asked, its text is the first one's, and
    `pieces` has all.

    Leaving its `async with` block, or `aclose`, cancels what is not finished. Iterating raises what went wrong.
    """

    def __init__(self, client: AsyncClient, request: Request[types.Completion]) -> None:
        self._client = client
        self._request = request
        self._wait_s = request.patience_s(client._timeout_s)
        self._link: Link | None = None
        self._call: Call[types.Completion] | None = None
        self._moves = 0
        self._closed = False

    @property
    def request_id(self) -> int | None:
        """Of this request on its connection, for `AsyncClient.cancel`; None until it was sent."""
        return self._call.id if self._call is not None else None

    async def _sent(self) -> tuple[Link, Call[types.Completion]]:
        if self._link is None or self._call is None:
            self._link, self._call = await self._client._begin(self._request, self._wait_s)
        return self._link, self._call

    async def __aiter__(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text and not piece.index:
                yield piece.text

    async def pieces(self) -> AsyncIterator[types.Stream]:
        """Everything the daemon says on the way: text, reasoning, tool calls, and phases before the first token."""
        while (piece := await self._next()) is not None:
            yield piece

    async def _next(self) -> types.Stream | None:
        if self._closed:
            return None
        while not self._closed:
            link, call = await self._sent()
            if call.pieces:
                return call.pieces.popleft()
            if call.done:
                if self._moves < MOST_MOVES and self._client._moved(link, call):
                    self._moves += 1
                    self._link = self._call = None  # what is sent next goes to the daemon that has taken over
                    continue
                call.outcome()
                return None
            if not await link.wait(call, self._wait_s, news=True):
                link.abandon(call)
                call.error, call.done = RequestTimeout(f"nothing of the answer within {self._wait_s:g} s"), True
        return None

    @property
    def result(self) -> types.Completion:
        """The whole answer, once the stream has ended. Raises how it failed (Cancelled, where it was closed early)."""
        if self._call is None or not self._call.done:
            raise RuntimeError("the stream has not ended; iterate it, or await wait()")
        return self._call.outcome()

    async def wait(self) -> types.Completion:
        """Read the rest and return the whole answer."""
        async for _ in self.pieces():
            pass
        return self.result

    async def aclose(self) -> None:
        """End the stream: cancel it if it still runs, and wait a few seconds for the daemon to confirm."""
        if self._closed:
            return
        self._closed = True
        link, call = self._link, self._call
        if link is None or call is None or call.done:
            return
        link.cancel(call)
        try:
            ended = await link.wait(call, _CLOSE_S)
        finally:
            if not call.done:
                link.session.forget(call)
        if not ended:
            call.error, call.done = RequestTimeout(f"no end of the stream within {_CLOSE_S:g} s"), True

    async def __aenter__(self) -> Self:
        await self._sent()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        link, call = self._link, self._call
        if link is not None and call is not None and not call.done and not link._loop.is_closed():
            link._loop.call_soon_threadsafe(link.abandon, call)


class AsyncModelLease:
    """A model kept loaded: `lease = await client.acquire(…)` or `async with client.acquire(…) as lease`.

    Ends with its block, `release`, or the connection that holds it.

    Attributes:
        lease: its id; empty until it was given.
        model: the model as it was then.
    """

    lease: str
    model: types.Model

    def __init__(self, client: AsyncClient, request: Request[types.Lease]) -> None:
        self.lease = ""
        self._client = client
        self._request = request
        self._link: Link | None = None
        self._released = False

    async def _acquire(self) -> Self:
        if self._link is None:
            self._link, lease = await self._client._answer(self._request)
            self.lease, self.model = lease.lease, lease.model
        return self

    @property
    def held(self) -> bool:
        """Whether the model is still kept: not released, and the connection alive."""
        return self._link is not None and not self._released and self._link.session.closed is None

    async def release(self) -> None:
        """Give the model free. A connection that ended has done so already."""
        link = self._link
        if link is None or not self.held:
            return
        self._released = True
        call = link.begin(lambda to: to.start("models.release", types.LeaseParams(lease=self.lease), Any))
        if call is None:
            return
        if not await link.wait(call, self._client._timeout_s):
            link.abandon(call)
            raise RequestTimeout("no answer to `models.release` in time")
        try:
            call.outcome()
        except ConnectionLost:
            return

    def __await__(self) -> Generator[Any, None, Self]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Self:
        return await self._acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.release()
