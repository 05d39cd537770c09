"""What outlives a request: downloads, loads and batch jobs, by the names that callers know them by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mlxd_client import errors, types

from ..core import events as ev
from ..core.core import Core
from ..core.jobs import BatchJob, DownloadJob

Watcher = Callable[[float | None], None]


class Jobs:
    """All jobs that the core remembers, and who waits for them."""

    def __init__(self, core: Core, tell: Callable[[ev.Event], None], loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._tell = tell
        self._loop = loop
        self._waiters: dict[str, list[asyncio.Future[types.Job]]] = {}
        self._watchers: dict[str, list[Watcher]] = {}

    @property
    def under_way(self) -> int:
        """How many are to go on; a batch job that nobody has started yet is not."""
        return sum(
            job.ended_at is None and not (isinstance(job, BatchJob) and job.open) for job in self._core.jobs.values()
        )

    def list(self) -> list[types.Job]:
        return [job.view(self._core.wall) for job in self._core.jobs.values()]

    def get(self, job: str) -> types.Job:
        """Raises NotFound."""
        found = self._core.jobs.get(job)
        if found is None:
            raise errors.NotFound("there is no such job", job=job)
        return found.view(self._core.wall)

    async def wait(self, job: str) -> types.Job:
        """The job, once it has ended."""
        now = self.get(job)
        if now.ended_at is not None:
            return now
        waiter: asyncio.Future[types.Job] = self._loop.create_future()
        waiters = self._waiters.setdefault(job, [])
        waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            waiters.remove(waiter)
            raise

    def cancel(self, job: str, *, discard: bool = False) -> types.Job:
        self.get(job)
        self._tell(ev.CancelJob(job, discard))
        return self.get(job)

    async def follow(self, job: str, watcher: Watcher | None) -> None:
        """Wait for a download. Raises what it failed with.

        Args:
            watcher: told how far it is, 0 to 1.
        """
        if watcher is not None:
            self._watchers.setdefault(job, []).append(watcher)
        try:
            ended = await self.wait(job)
        finally:
            if watcher is not None:
                self._watchers[job].remove(watcher)
                if not self._watchers[job]:
                    del self._watchers[job]
        if ended.state == "cancelled":
            raise errors.Cancelled("the download was cancelled", job=job)
        if ended.error is not None:
            kind = errors.BY_KIND.get(ended.error.kind, errors.DownloadFailed)
            raise kind(ended.error.message, **ended.error.details)

    def move(self, error: errors.RpcError) -> None:
        """Another daemon goes on with downloads and batch jobs: whoever waits for one is to ask that daemon."""
        for name in [name for name in self._waiters if isinstance(self._core.jobs.get(name), DownloadJob | BatchJob)]:
            for waiter in self._waiters.pop(name):
                if not waiter.done():
                    waiter.set_exception(error)

    def changed(self, job: types.Job) -> None:
        """A job stands like this now."""
        if job.kind == "download":
            for watcher in self._watchers.get(job.job, ()):
                watcher(job.progress)
        if job.ended_at is not None:
            for waiter in self._waiters.pop(job.job, ()):
                if not waiter.done():
                    waiter.set_result(job)
