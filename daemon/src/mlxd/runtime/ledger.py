"""The file of batch jobs, kept by a thread of its own: opened, set aside where it is damaged, written, made room in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxd_client import errors

from ..batch.header import VERSION, version_of
from ..core import events as ev
from ..core.core import Core
from ..core.jobs import BatchJob
from ..stateversion import refuse_newer, too_new

if TYPE_CHECKING:
    from ..batch.store import End, Outcome, Store, Try
    from ..server.runtime_api import Log

T = TypeVar("T")

# How long until a file is tried again that another process still has, in seconds.
AGAIN_S = 5.0


class Ledger:
    """Opened once there is a file, or a first job. SQLite is not even imported before.

    Args:
        path: of the file.
        budget_bytes: what it may grow to; the oldest ended jobs go before that stops anything.
    """

    def __init__(
        self, path: Path, budget_bytes: int, core: Core, tell: Callable[[ev.Event], None], log: Log,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.path = path
        self._budget_bytes = budget_bytes
        self._core = core
        self._tell = tell
        self._log = log
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, "mlxd-batch")
        self._store: Store | None = None
        self._refusal: errors.RpcError | None = None  # a newer mlxd's file, which stays as it is
        self._opening = asyncio.Lock()
        self._outbox: list[tuple[Outcome | Try | End, int | None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._failing = False
        self._another = False  # the file is another daemon's
        self._next_try: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- opening --------------------------------------------------------------------------------------------------

    def refuse_newer(self) -> None:
        """Raises StateTooNew where a newer mlxd wrote the file."""
        refuse_newer(self.path, version_of(self.path) or 0, VERSION)

    async def begin(self) -> None:
        """Tell the core of the jobs that an earlier daemon had. What cannot be read now keeps nobody waiting."""
        if not self.path.exists():
            return
        try:
            await self.open()
        except errors.Unsupported as error:
            self._log.error("batch jobs are left alone", reason=error.message)
        except errors.RpcError as error:
            if self._next_try is None:  # it would say so every few seconds
                self._log.error("batch jobs cannot be read", reason=error.message)
            self._next_try = self._loop.call_later(AGAIN_S, lambda: self.later(self.begin()))

    async def open(self) -> None:
        """Raises Unsupported where a newer mlxd wrote the file, and what Store does."""
        async with self._opening:
            if self._another:
                raise errors.ShuttingDown("another daemon goes on with batch jobs; connect anew", reconnect=True)
            if self._refusal is not None:
                raise errors.Unsupported(self._refusal.message, **self._refusal.details)
            if self._store is not None:
                return
            try:
                store, jobs, aside = await self._loop.run_in_executor(self._thread, self._open_file)
            except errors.Unsupported as error:
                self._refusal = error
                raise
            self._store = store
            if aside is not None:
                self._log.error("the file of batch jobs was damaged, and is set aside", file=str(aside))
            for job in jobs:
                self._tell(found(job))
            self.later(self._sweep())

    def _open_file(self) -> tuple[Store, list[Any], Path | None]:
        from ..batch import schema  # with SQLite, this takes a megabyte that most daemons never need
        from ..batch.store import Store

        aside = None
        try:
            try:
                store = Store(self.path, self._budget_bytes)
                return store, store.jobs(), None
            except schema.Damaged:
                aside = schema.set_aside(self.path)
                store = Store(self.path, self._budget_bytes)
                return store, store.jobs(), aside
        except schema.Newer as error:
            raise self._too_new(error.args[0]) from None

    def _too_new(self, found: int) -> errors.RpcError:
        return errors.Unsupported(
            too_new(self.path, found, VERSION), option="batch", file=str(self.path), found=found, supported=VERSION
        )

    async def ask(self, work: Callable[[Store], T]) -> T:
        """What the thread finds. Raises what Store does, and InternalError where the file turns out to be damaged."""
        await self.open()
        return await self._do(work)

    async def _do(self, work: Callable[[Store], T]) -> T:
        store = self._store
        if store is None or self._another:
            raise errors.InternalError("the file of batch jobs is not open")

        def done() -> T:
            from ..batch import schema

            try:
                if store.closed:  # it was left to another daemon meanwhile
                    store.open()
                return work(store)
            except schema.Newer as error:
                raise self._too_new(error.args[0]) from None
            except schema.Damaged as error:
                store.close()
                raise _FoundDamaged(schema.set_aside(self.path), str(error)) from None

        try:
            return await self._loop.run_in_executor(self._thread, done)
        except _FoundDamaged as error:
            raise self._lost(error) from None

    def _lost(self, error: _FoundDamaged) -> errors.RpcError:
        aside, reason = error.args
        self._store = None
        self._outbox.clear()
        self._failing = False
        self._log.error("the file of batch jobs is damaged, and is set aside", file=str(aside), reason=reason)
        told = errors.InternalError(f"the file of batch jobs is damaged; it is kept as {aside}", file=str(aside))
        self._tell(ev.BatchLost(told))
        return told

    def later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Have it done, whoever gives up on it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to its caller, if there is one
        if not self._tasks:
            self._tell(ev.Tick())  # the daemon may be idle now

    # --- recording ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._tasks or self._writing)

    def record(self, change: Outcome | Try | End, ticket: int | None = None) -> None:
        """Have it recorded, with whatever else comes while the commit before is under way; BatchRecorded will follow,
        or BatchStoreFailed."""
        self._outbox.append((change, ticket))
        if not self._failing:
            self._flush()

    def again(self) -> None:
        """Try what failed."""
        if self._outbox:
            self._flush()
        else:
            self._works()

    def _works(self) -> None:
        self._failing = False
        self._tell(ev.BatchStoreWorks())

    def failed(self, error: errors.RpcError) -> None:
        if not self._failing:
            self._log.warning("batch jobs cannot be recorded", reason=error.message)
        self._failing = True
        self._tell(ev.BatchStoreFailed(error))

    def _flush(self) -> None:
        if self._writing is None and self._outbox:
            self._writing = self._loop.create_task(self._write())

    async def _write(self) -> None:
        batch, self._outbox = self._outbox, []
        changes = [change for change, _ in batch]
        try:
            stands = await self.roomy(lambda store: store.record(changes))
        except errors.RpcError as error:
            if self._store is not None:
                self._outbox[:0] = batch
                self.failed(error)
        else:
            if self._failing:
                self._log.info("batch jobs are recorded again")
                self._works()
            tickets: dict[str, list[int]] = {}
            for change, ticket in batch:
                tickets.setdefault(change.job, []).extend(() if ticket is None else (ticket,))
            known = {stand.job: stand for stand in stands}
            for job, of in tickets.items():
                stand = known.get(job)
                if stand is None:
                    self._tell(ev.BatchRecorded(job, tuple(of), 0, 0))
                    continue
                ended: Any = stand.state if stand.ended_at is not None and stand.state != "deleted" else None
                self._tell(ev.BatchRecorded(job, tuple(of), stand.done, stand.failed, ended, stand.ended_at))
        finally:
            self._writing = None
        if not self._failing:
            self._flush()

    # --- room -----------------------------------------------------------------------------------------------------

    async def roomy(self, work: Callable[[Store], T]) -> T:
        """As `ask`; where the budget is used up, the oldest ended jobs go until it is not."""
        while True:
            try:
                return await self.ask(work)
            except errors.InsufficientDisk:
                oldest = next((job for job in self._core.jobs.values() if _ended(job)), None)
                if oldest is None or not await self._do(lambda store: store.over_budget()):
                    raise
                self._log.warning("a batch job is deleted to make room", job=oldest.job)
                await self.delete(oldest.job)
                await self._sweep()

    async def delete(self, job: str) -> None:
        """Remove a job that has ended. What it takes on disk is free soon after."""
        with contextlib.suppress(errors.NotFound):  # somebody else was first, or it was lost with a damaged file
            await self.ask(lambda store: store.forget(job))
        self._tell(ev.BatchGone(job))

    async def sweep(self) -> None:
        await self._sweep()

    async def _sweep(self) -> None:
        try:
            while await self._do(lambda store: store.sweep()):
                pass
        except errors.RpcError as error:  # the next daemon goes on with it
            self._log.warning("deleted batch jobs could not be removed", reason=error.message)

    async def let_go(self) -> None:
        """Leave the file to another daemon, with all recorded, until `take_back`. Raises RestartFailed."""
        while self._tasks or self._writing is not None:
            await asyncio.wait({*self._tasks, *([] if self._writing is None else [self._writing])})
        if self._outbox:
            raise errors.RestartFailed("what came of batch jobs cannot be recorded at present; see the log")
        self._try_no_more()
        self._another = True
        if self._store is not None:
            await self._loop.run_in_executor(self._thread, self._store.close)

    async def take_back(self) -> None:
        """It is this daemon's after all. Where the core knows its jobs, the next use opens it again."""
        if not self._another:
            return
        self._another = False
        if self._store is None:
            await self.begin()

    def _try_no_more(self) -> None:
        if self._next_try is not None:
            self._next_try.cancel()
            self._next_try = None

    async def close(self) -> None:
        """What was told to be recorded is, where that is possible."""
        self._try_no_more()
        for task in self._tasks:
            task.cancel()
        if not self._failing:
            self._flush()
        while self._writing is not None:
            await asyncio.wait({self._writing})
        store, self._store = self._store, None
        if store is not None and not self._another:
            await self._loop.run_in_executor(self._thread, store.close)
        self._thread.shutdown(wait=False, cancel_futures=True)


class _FoundDamaged(Exception):
    """The file was set aside as `args[0]`, since `args[1]`."""


def _ended(job: object) -> bool:
    return isinstance(job, BatchJob) and job.ended_at is not None


def found(job: Any) -> ev.BatchFound:
    """A job of the store, as the core hears of it."""
    opened = job.state == "open"
    return ev.BatchFound(
        job.job, job.total, job.created_at, job.model, job.name, opened, "queued" if opened else job.state, job.done,
        job.failed, job.started_at, job.ended_at, job.error,
    )  # fmt: skip
