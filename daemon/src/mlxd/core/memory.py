"""What follows from a measurement of memory: what each worker may take, what becomes of one that takes more, and what
is done where the machine is short. Who may load is decided in room.py.
"""

from __future__ import annotations

from typing import Any

from mlxd_client import errors, types
from mlxd_client.errors import RpcError

from . import actions as do
from . import events as ev
from .book import ELSEWHERE, Book
from .gauge import Gauge
from .line import LoadLine
from .pressure import Pressure, Reading, judge
from .records import ModelRecord
from .room import shares

# Seconds that a worker past its share gets before the next step is taken.
GRACE_S = 2.0
# A model's worker is not recycled again within so many seconds: where that does not help, it would only cost.
RECYCLE_S = 300.0
# While pressure lasts, caches are trimmed and a model goes so often, in seconds.
RELIEF_S = 5.0
# What a worker may be past its share without being so: its allocators do not give back to the byte.
SLACK_SHARE = 0.05


class Memory:
    """Watches over the memory of the book's models. `line` stops the workers that have to go.

    What is done about pressure:
        normal    nothing
        warning   caches are trimmed to a half; while it lasts, again every RELIEF_S, and an idle model goes
        critical  caches are emptied, all idle models go; requests of batch priority are refused, and those of batch
                  jobs step aside
    A model that somebody holds never goes for it, nor does one that is loading or busy.
    """

    def __init__(self, book: Book, line: LoadLine, gauge: Gauge) -> None:
        self._book = book
        self._line = line
        self._gauge = gauge
        self.pressure = Pressure()
        self._kills: int | None = None
        self._relief_at = 0.0

    def measured(self, event: ev.Measured, now: float) -> None:
        """Take in a measurement.

        1. What each worker holds counts from now on, where that is more than what its model was expected to need.
        2. The pressure: said where it has changed, and something is done about it.
        3. Workers past their shares: reported, then trimmed, then recycled.
        4. Together they take more than the budget: an idle model goes.
        """
        self._gauge.note(event, now)
        for worker, record in self._book.by_worker.items():
            if worker != ELSEWHERE:  # which says itself what it holds
                self._count(record, event.footprints.get(worker))
        self._feel(event.reading or Reading(), now)
        self._relieve(now)
        for record in list(self._book.by_worker.values()):
            if record.serving and not record.recycling:
                self._watch(record, now)
        self._keep_budget(now)
        self.share_out(fresh=True)

    def _count(self, record: ModelRecord, held: int | None) -> None:
        if record.footprint_bytes != held:
            record.footprint_bytes = held
            self._book.touch(record)

    # --- shares ---------------------------------------------------------------------------------------------------

    def share_out(self, *, fresh: bool = False) -> None:
        """Say anew what each worker may take. `fresh`: what was said before a measurement is over with it."""
        workers = self._book.by_worker
        found = shares(workers.values(), self._book.limits.budget_bytes, self._gauge.spare_bytes)
        for worker, record in workers.items():
            share = found.get(worker)
            record.allowed_bytes = None if share is None else record.wanted_bytes + share
            before = 0 if fresh else record.granted_bytes
            record.granted_bytes = max(before, record.allowed_bytes or 0)

    def _watch(self, record: ModelRecord, now: float) -> None:
        """What becomes of a model by what its worker holds.

        1. No more than it was allowed at any time since the last reading: all is well, and that is its own.
        2. More: it is reported.
        3. Still more after GRACE_S: its caches go.
        4. Still more after another GRACE_S: its worker is recycled, once it has answered what it is at; what waits is
           answered by the next one. Where that was done within RECYCLE_S, nothing more is.
        """
        held, granted = record.footprint_bytes, record.granted_bytes
        if held is None or not granted:
            return
        if held <= granted + max(self._book.limits.slack_bytes, SLACK_SHARE * granted):
            record.over_step, record.allowed_bytes = None, max(record.allowed_bytes or 0, min(held, granted))
            return
        if record.over_step is None:
            self._step(record, "reported", now)
        elif now - record.over_at >= GRACE_S:
            if record.over_step == "reported":
                self._step(record, "trimmed", now)
                self._trim(record, 0.0)
            elif record.over_step == "trimmed" and self._may_recycle(record, now):
                self._step(record, "recycled", now)
                record.recycling, record.recycled_at = True, now

    def _may_recycle(self, record: ModelRecord, now: float) -> bool:
        again = record.recycled_at is None or now - record.recycled_at >= RECYCLE_S
        return again and not self._book.draining

    def _step(self, record: ModelRecord, step: types.ExcessStep, now: float) -> None:
        record.over_step, record.over_at = step, now
        details = {"step": step, "footprint_bytes": record.footprint_bytes, "share_bytes": record.granted_bytes}
        self._book.publish("memory_exceeded", record, details=details)

    def _trim(self, record: ModelRecord, keep: float) -> None:
        assert record.worker is not None
        self._book.out.append(do.Trim(record.worker, keep))

    # --- the budget and the machine -------------------------------------------------------------------------------

    def _keep_budget(self, now: float) -> None:
        """Workers may take more than was foreseen, in all. One goes at a time, for what goes may be enough; and none
        while there is hope that one past its share will give it back."""
        workers = self._book.by_worker.values()
        over = sum(m.reserved_bytes for m in workers) - self._book.limits.budget_bytes
        hope = any(m.over_step is not None and now - m.over_at < 2 * GRACE_S for m in workers)
        if over > self._book.limits.slack_bytes and not hope and all(m.stopping is None for m in workers):
            for record in self._idle()[:1]:
                self._line.stop(record, now, why="room")

    def _idle(self) -> list[ModelRecord]:
        """Those that may go without anybody's noticing, least recently used first."""
        workers = self._book.by_worker.values()
        free = [m for m in workers if m.serving and not (m.busy or m.engaged or m.held or m.recycling)]
        return sorted(free, key=lambda m: m.last_used)

    def _feel(self, reading: Reading, now: float) -> None:
        limits, before = self._book.limits, self.pressure.level
        level, source = judge(reading, limits.reserve_bytes, self._kills)
        self._kills = self._kills if reading.kills is None else reading.kills
        if not self.pressure.read(level, source, limits.calm_s, now):
            return
        self._relief_at = now
        self._book.out.append(do.Publish("memory_pressure", details=self._numbers(reading, before)))
        if self.pressure.level == "critical":
            for record in self._book.models.values():
                self._book.step_aside(record, now)
        elif self.pressure.level == "normal":
            for record in self._book.by_worker.values():
                if record.serving:
                    self._trim(record, 1.0)

    def _relieve(self, now: float) -> None:
        level, since = self.pressure.level, self.pressure.since
        if level == "normal" or now < self._relief_at:
            return
        self._relief_at = now + RELIEF_S
        workers = self._book.by_worker.values()
        idle = self._idle()
        if level == "warning":  # trimming may be enough, and so may the one that is going
            patient = since == now or any(m.stopping is not None for m in workers)
            idle = [] if patient else idle[:1]
        for record in idle:
            self._line.stop(record, now, why="pressure")
        for record in workers:
            if record.serving:
                self._trim(record, 0.0 if level == "critical" else 0.5)

    def _numbers(self, reading: Reading, before: types.PressureLevel) -> dict[str, Any]:
        pressure, limits = self.pressure, self._book.limits
        numbers = {
            "level": pressure.level, "before": before, "source": pressure.source or None,
            "available_bytes": reading.available_bytes, "capacity_bytes": reading.capacity_bytes,
            "reserve_bytes": limits.reserve_bytes, "footprint_bytes": self._footprint_bytes,
            "stalls": [{"source": one.source, "some": one.some, "full": one.full} for one in reading.stalls] or None,
        }  # fmt: skip
        return {name: value for name, value in numbers.items() if value is not None}

    def refusal(self, priority: ev.Priority) -> RpcError | None:
        """Why a request is not taken at present."""
        if priority != "batch" or self.pressure.level != "critical":
            return None
        return errors.MemoryPressure(
            "this machine is short of memory: batch work is not taken until that is over",
            level=self.pressure.level, source=self.pressure.source, retry_after_s=self._book.limits.calm_s,
        )  # fmt: skip

    # --- for those who ask ----------------------------------------------------------------------------------------

    @property
    def _footprint_bytes(self) -> int:
        return sum(m.footprint_bytes or 0 for m in self._book.by_worker.values())

    def view(self) -> types.Memory:
        """How it stands, for the wire."""
        book, gauge, pressure = self._book, self._gauge, self.pressure
        reading = gauge.reading or Reading()
        held = sorted(book.by_worker.values(), key=lambda m: -m.reserved_bytes)
        return types.Memory(
            budget_bytes=book.limits.budget_bytes, used_bytes=sum(m.reserved_bytes for m in held),
            footprint_bytes=self._footprint_bytes, reserve_bytes=book.limits.reserve_bytes,
            capacity_bytes=reading.capacity_bytes, available_bytes=reading.available_bytes,
            measured_at=None if gauge.at is None else gauge.at + book.wall,
            pressure=types.Pressure(
                level=pressure.level, source=pressure.source or None,
                since_at=None if pressure.since is None else pressure.since + book.wall,
            ),
            models=[m.holding() for m in held],
        )  # fmt: skip
