"""Memory, measured on a thread: when the core asks for it, and every second as long as anybody has a use for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil

from mlxd_client import types

from ..core import events as ev
from ..core.core import Core
from ..core.pressure import Reading
from ..measure import System
from ..workers import WorkerLink

if TYPE_CHECKING:
    from ..server.runtime_api import Log

# Seconds between two measurements, and how long one may take: a machine that swaps may stop anybody for a while.
INTERVAL_S = 1.0
PATIENCE_S = 5.0
# How old a measurement may be for those who only look, in seconds.
RECENT_S = 2.0
# Changes of a worker's footprint below this are noise: they would make an event a second.
NOISE_BYTES = 1024 * 1024


class Measuring:
    """Tells the core what the system has, and what the workers hold of it.

    Args:
        links: the workers, by the core's number.
    """

    def __init__(
        self,
        system: System,
        links: Mapping[int, WorkerLink],
        core: Core,
        tell: Callable[[ev.Event], None],
        log: Log,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._system = system
        self._links = links
        self._core = core
        self._tell = tell
        self._log = log
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, "mlxd-memory")
        self._task: asyncio.Task[None] | None = None
        self._again = False  # asked for while one was under way
        self._timer: asyncio.TimerHandle | None = None
        self._footprints: dict[int, int] = {}  # by worker, as last told
        self._told_at = 0.0
        self._mute = False
        self.on_told: Callable[[], None] = lambda: None  # after the core has heard

    async def begin(self) -> None:
        """Measure for the first time: from then on no load is decided without."""
        self.measure()
        assert self._task is not None
        await asyncio.wait({self._task}, timeout=PATIENCE_S)

    def measure(self, _action: object = None) -> None:
        """Measure now; where that is being done already, once more after it."""
        if self._task is not None:
            self._again = True
            return
        self._task = self._loop.create_task(self._measure())
        self._task.add_done_callback(self._done)

    def look(self) -> types.Memory:
        """How memory stands, for those who ask."""
        if self._task is None and self._loop.time() - self._told_at > RECENT_S:
            self._take(*self._read(self._pids()))
        return self._core.memory()

    def footprint(self, worker: int) -> int | None:
        """What a worker holds at this moment; None where that cannot be told."""
        pid = self._pids().get(worker)
        return None if pid is None else self._footprint(pid)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- one measurement ------------------------------------------------------------------------------------------

    async def _measure(self) -> None:
        began_at, pids = self._loop.time(), self._pids()
        job = self._loop.run_in_executor(self._thread, self._read, pids)
        done, _ = await asyncio.wait({job}, timeout=PATIENCE_S)
        if not done:
            self._complain("took too long")
            self._tell(ev.Measured(began_at, None, {}))  # nobody is to wait for it any longer
            await asyncio.wait({job})
            job.cancelled() or job.exception()
            return
        try:
            reading, footprints = job.result()
        except Exception as error:  # a bug, or a system that fails in a new way: loads must go on without it
            self._complain(f"failed: {type(error).__name__}: {error}")
            reading, footprints = None, {}
        self._take(reading, footprints, began_at)

    def _read(self, pids: Mapping[int, int]) -> tuple[Reading | None, dict[int, int]]:
        """On the thread."""
        held = {worker: self._footprint(pid) for worker, pid in pids.items()}
        return self._system.read(), {worker: size for worker, size in held.items() if size is not None}

    def _footprint(self, pid: int) -> int | None:
        found = self._system.footprint(pid)
        if found is None:
            try:
                found = int(psutil.Process(pid).memory_info().rss)
            except psutil.Error:  # it is gone
                return None
        return found

    def _take(self, reading: Reading | None, footprints: dict[int, int], began_at: float | None = None) -> None:
        """Tell the core. What workers were said to hold stays as it was where it has hardly changed."""
        if reading is not None and reading.available_bytes is None:
            self._complain("says nothing of what is available")
        for worker, size in footprints.items():
            known = self._footprints.get(worker)
            if known is not None and abs(known - size) < NOISE_BYTES:
                footprints[worker] = known
        self._footprints = footprints
        self._told_at = self._loop.time()
        self._tell(ev.Measured(self._told_at if began_at is None else began_at, reading, footprints))
        self.on_told()

    def _complain(self, how: str) -> None:
        if not self._mute:
            self._mute = True  # it would say so every second
            self._log.warning("memory cannot be measured; the budget alone decides then", how=how)

    def _pids(self) -> dict[int, int]:
        return {worker: link.child.pid for worker, link in self._links.items() if link.child and link.child.pid}

    # --- and the next one -----------------------------------------------------------------------------------------

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if self._again:
            self._again = False
            self.measure()
        else:
            self.rest()

    def rest(self) -> None:
        """See to it that there is a next one, as long as anybody has a use for it."""
        if self._timer is None and self._task is None and self._core.watchful:
            self._timer = self._loop.call_later(INTERVAL_S, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._core.watchful:
            self.measure()
