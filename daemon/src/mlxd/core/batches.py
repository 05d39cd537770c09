"""Batch jobs: which item runs next, what becomes of one that failed, when a job has ended. What is recorded, and the
items themselves, are in a file that others keep; here are their numbers.

An item that ended, decided by `_ended`:
    1. It was answered, or refused for what it asks itself: that is recorded. Its job ends with the last of them.
    2. It stepped aside for others: it goes back to where it was.
    3. There is no room for it at present (memory, disk, the line): it goes back, and its job waits a while.
    4. Its model cannot be had: the same; after `batch_tries` in a row the job has failed, to be started again by hand.
    5. Whatever it was on died: it may be to blame. Suspects run alone, so that the innocent are cleared; who fails
       `batch_tries` times has that recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject, Job

from . import actions as do
from . import events as ev
from .book import Book, error_object
from .jobs import FIRST_WAIT_S, BatchJob

# Ended jobs that are remembered at most; the oldest go, with all that is recorded of them.
ENDED_BATCHES_KEPT = 500
# Subscribers hear of items that ended no more often than so, per job.
PROGRESS_S = 0.25
# What waits longer each time does so at most for so long, in seconds, and where an error says how long, for so long.
LONGEST_WAIT_S, LONGEST_HINT_S = 30.0, 300.0

_ITS_OWN = frozenset({"invalid_params", "unsupported", "context_exceeded", "deadline_exceeded", "permission_denied"})
_NO_ROOM = frozenset({"queue_full", "memory_pressure", "insufficient_memory", "insufficient_disk", "model_busy",
                      "shutting_down", "cancelled"})  # fmt: skip
_NO_MODEL = frozenset({"model_not_found", "model_not_downloaded", "model_invalid", "load_failed", "download_failed",
                       "verification_failed", "worker_died"})  # fmt: skip

Verdict = Literal["record", "again", "wait", "no_model", "suspect"]


def verdict(error: RpcError | None, began: bool) -> Verdict:
    """What becomes of an item that ended so. `began`: a worker had it by then."""
    if error is None or error.kind in _ITS_OWN or "field" in error.details:
        return "record"
    if error.details.get("yielded"):
        return "again"
    crash_loop = error.kind == "worker_died" and error.details.get("cause") in ("crash_loop", "stopped")
    if began and not crash_loop and error.kind not in ("shutting_down", "cancelled"):
        return "suspect"
    if error.kind in _NO_ROOM or crash_loop:
        return "wait"
    return "no_model" if error.kind in _NO_MODEL else "suspect"


@dataclass(frozen=True, slots=True)
class Flight:
    """An item that runs; `alone`: it is suspected."""

    job: BatchJob
    place: int
    tries: int
    alone: bool = False


class BatchLine:
    """All batch jobs of the book.

    Attributes:
        flights: the items that run, by ticket.
        unrecorded: those that have ended, and are not recorded yet.
        fault: why nothing can be recorded at present.
    """

    def __init__(self, book: Book) -> None:
        self.flights: dict[int, Flight] = {}
        self.unrecorded: dict[int, Flight] = {}
        self.fault: ErrorObject | None = None
        self.held = False  # another daemon may take over: nothing is begun, read or removed
        self._book = book
        self._jobs: dict[str, BatchJob] = {}  # those that have not ended
        self._kept: dict[str, BatchJob] = {}  # those that have, first ended first
        self._suspects: list[tuple[float, Flight]] = []
        self._tickets = itertools.count(1)
        self._served = self._clients = 0
        self._changed: dict[str, BatchJob] = {}
        self._fault_wait_s = FIRST_WAIT_S
        self._write_at: float | None = None
        self._now = 0.0

    # --- jobs come, begin, end ------------------------------------------------------------------------------------

    def found(self, event: ev.BatchFound, now: float) -> None:
        wall = self._book.wall
        job = BatchJob(
            event.job, event.total, event.created_at - wall, event.model, event.name, event.state, event.open,
            event.done, event.failed, error=event.error,
            started_at=None if event.started_at is None else event.started_at - wall,
            ended_at=None if event.ended_at is None else event.ended_at - wall,
        )  # fmt: skip
        self._clients -= 1
        job.client = self._clients
        self._book.jobs[job.job] = job
        if job.ended_at is None:
            self._jobs[job.job] = job
            self._changed[job.job] = job
        else:
            self._kept[job.job] = job
        job.shown = job.seen(wall, None)

    def grew(self, event: ev.BatchGrew, now: float) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            return  # all jobs were lost meanwhile
        job.total, job.model = event.total, event.model
        self._changed[job.job] = job

    def started(self, event: ev.BatchStarted, now: float) -> None:
        """Also again, where it had failed or was cancelled: what is not recorded is still to be done."""
        job = self._book.jobs.get(event.job)
        if not isinstance(job, BatchJob):
            return  # all jobs were lost meanwhile
        # One that is about to end stays so: that is recorded after this, and stands.
        job.open, job.state, job.ended_at, job.error = False, "running", None, None
        job.started_at = event.started_at - self._book.wall
        job.ready.clear()
        job.cursor, job.exhausted, job.reading, job.run = (0, -1), False, False, job.run + 1
        job.strikes, job.wait_s, job.retry_at = 0, FIRST_WAIT_S, None
        self._kept.pop(job.job, None)
        self._jobs[job.job] = self._changed[job.job] = job

    def cancel(self, job: BatchJob, now: float) -> None:
        if job.ended_at is None and job.closing is None:
            self._close(job, "cancelled", None)

    def gone(self, event: ev.BatchGone, now: float) -> None:
        """All that was recorded of it is removed."""
        job = self._book.jobs.pop(event.job, None)
        assert job is None or job.ended_at is not None
        self._kept.pop(event.job, None)
        self._changed.pop(event.job, None)

    def _close(self, job: BatchJob, state: Literal["cancelled", "failed"], error: ErrorObject | None) -> None:
        """Have it end. What runs of it is cancelled, and is to be done if it is ever started again."""
        job.closing, job.error, job.retry_at = state, error, None
        for ticket in [ticket for ticket, flight in self.flights.items() if flight.job is job]:
            del self.flights[ticket]
            self._book.out.append(do.CancelItem(ticket))
        self._suspects = [(due, flight) for due, flight in self._suspects if flight.job is not job]
        job.ready.clear()
        self._book.out.append(do.EndBatch(job.job, state, error))
        self._changed[job.job] = job

    # --- items ----------------------------------------------------------------------------------------------------

    def items(self, event: ev.BatchItems, now: float) -> None:
        job = self._jobs.get(event.job)
        self._fault_wait_s = FIRST_WAIT_S
        if job is None or not job.live or not job.reading or event.run != job.run:
            return  # it ended meanwhile, began anew, or is asked for again
        job.reading = False
        job.cursor, job.exhausted = event.cursor, not event.more
        for place, tries in event.items:
            if tries:
                self._suspects.append((now, Flight(job, place, tries)))
            else:
                job.ready.append((place, tries))

    def ended(self, event: ev.BatchItemEnded, now: float) -> None:
        flight = self.flights.pop(event.ticket, None)
        if flight is None:
            return  # its job was cancelled
        job = flight.job
        what = verdict(event.error, event.began)
        if what == "record":
            job.strikes, job.wait_s = 0, FIRST_WAIT_S
            if job.error is not None and job.retry_at is None:
                job.error = None
                self._changed[job.job] = job
            self._record(event.ticket, flight)
        elif what == "suspect":
            self._suspect(event.ticket, flight, now)
        else:
            if flight.alone:
                self._suspects.append((now, flight))
            else:
                job.ready.appendleft((flight.place, flight.tries))
            if what != "again":
                assert event.error is not None
                self._wait(job, event.error, what == "no_model", now)

    def _record(self, ticket: int, flight: Flight) -> None:
        self.unrecorded[ticket] = flight
        self._book.out.append(do.RecordItem(flight.job.job, flight.place, ticket))

    def _suspect(self, ticket: int, flight: Flight, now: float) -> None:
        tries = flight.tries + 1
        if tries >= self._book.limits.batch_tries:
            self._record(ticket, flight)
            return
        self._book.out.append(do.CountTry(flight.job.job, flight.place, tries))
        self._suspects.append((now + self._again_s(tries), Flight(flight.job, flight.place, tries)))

    def _again_s(self, tries: int) -> float:
        """How long to wait after what went wrong so often: not at first, for it may have been somebody else's fault."""
        return 0.0 if tries == 1 else self._book.limits.batch_retry_s

    def _wait(self, job: BatchJob, error: RpcError, no_model: bool, now: float) -> None:
        """Hold a job's items back for a while; those that were under way all meet with the same, which counts once."""
        if job.retry_at is not None and job.retry_at > now:
            return
        hint = error.details.get("retry_after_s")
        wait_s = min(LONGEST_HINT_S, max(job.wait_s, float(hint) if isinstance(hint, (int, float)) else 0.0))
        job.wait_s = min(LONGEST_WAIT_S, 2 * job.wait_s)
        if no_model:
            job.strikes += 1
            if job.strikes >= self._book.limits.batch_tries:
                self._close(job, "failed", error_object(error))
                return
            wait_s = max(wait_s, self._again_s(job.strikes))
        job.error, job.retry_at = error_object(error), now + wait_s
        self._changed[job.job] = job

    # --- what is recorded -----------------------------------------------------------------------------------------

    def recorded(self, event: ev.BatchRecorded, now: float) -> None:
        self._fault_wait_s = FIRST_WAIT_S
        for ticket in event.tickets:
            self.unrecorded.pop(ticket, None)
        job = self._jobs.get(event.job)
        if job is None:
            return
        job.done, job.failed = event.done, event.failed
        if event.ended is not None:
            job.state, job.closing = event.ended, None
            job.ended_at = (event.ended_at or 0.0) - self._book.wall
            if job.state != "failed":
                job.error = None
            job.retry_at = None
            del self._jobs[job.job]
            self._kept[job.job] = job
        self._changed[job.job] = job

    def store_failed(self, event: ev.BatchStoreFailed, now: float) -> None:
        """Nothing can be read or recorded. No item is begun until it can; it is tried again and again."""
        self.fault = error_object(event.error)
        self._write_at = now + self._fault_wait_s
        self._fault_wait_s = min(LONGEST_WAIT_S, 2 * self._fault_wait_s)
        for job in self._jobs.values():
            job.reading, job.run = False, job.run + 1
            self._changed[job.job] = job

    def store_works(self, event: ev.BatchStoreWorks, now: float) -> None:
        """Or so it seems: how long the next fault is waited out is as before until something was read or recorded."""
        self.fault = self._write_at = None
        self._changed.update(self._jobs)

    def lost(self, event: ev.BatchLost, now: float) -> None:
        """What was recorded of all jobs is gone: they cannot go on."""
        told = error_object(event.error)
        for job in list(self._jobs.values()):
            job.state, job.error, job.ended_at, job.closing, job.retry_at = "failed", told, now, None, None
            job.ready.clear()
            self._changed[job.job] = job
        for ticket in list(self.flights):
            self._book.out.append(do.CancelItem(ticket))
        self._jobs.clear()
        self.flights.clear()
        self.unrecorded.clear()
        self._suspects.clear()
        for name in self._kept:
            del self._book.jobs[name]
        self._kept.clear()
        self.fault = self._write_at = None

    def places(self, job: BatchJob) -> list[int]:
        """Those of its items that were read and are not recorded."""
        under_way = (*self.flights.values(), *self.unrecorded.values(), *(flight for _, flight in self._suspects))
        return [flight.place for flight in under_way if flight.job is job] + [place for place, _ in job.ready]

    # --- settling -------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        self._now = now
        if not self.held:
            self._drop(now)
        if self._write_at is not None and self._write_at <= now and not self.held:
            self._write_at = None
            self._book.out.append(do.WriteAgain())
        if not (self._book.draining or self.held) and self.fault is None:
            for job in self._jobs.values():
                if job.retry_at is not None and job.retry_at <= now:
                    job.retry_at = None  # why it waited is told until something has come of it
            self._begin(now)
            self._read()
        for job in list(self._changed.values()):
            self._show(job, now)

    def _drop(self, now: float) -> None:
        """Have those removed that ended long ago, and the first of too many."""
        while self._kept:
            name, job = next(iter(self._kept.items()))
            assert job.ended_at is not None
            due = job.ended_at + self._book.limits.batch_keep_s <= now
            if not due and len(self._kept) <= ENDED_BATCHES_KEPT:
                break
            del self._kept[name]
            self._book.out.append(do.DeleteBatch(name))

    @property
    def let_go(self) -> bool:
        """Whether no item is under way, or still to be recorded."""
        return not (self.flights or self.unrecorded)

    def next_deadline(self) -> float | None:
        """When time alone changes something."""
        return min((due for due in self._dues() if due > self._now), default=None)

    def _dues(self) -> Iterator[float]:
        if self._write_at is not None and not self.held:
            yield self._write_at
        if not (self._book.draining or self.held):
            yield from (due for due, _ in self._suspects)
            yield from (job.retry_at for job in self._jobs.values() if job.retry_at is not None)
        yield from (job.shown_at + PROGRESS_S for job in self._changed.values() if job.shown_at is not None)
        for job in () if self.held else self._kept.values():
            assert job.ended_at is not None
            yield job.ended_at + self._book.limits.batch_keep_s
            break

    def _begin(self, now: float) -> None:
        """1. As long as many are not recorded yet, nothing begins. 2. A suspect that is due runs, once nothing else
        does. 3. Else items of the jobs in turn, into free slots."""
        slots = self._book.limits.batch_slots
        if any(flight.alone for flight in self.flights.values()) or len(self.unrecorded) >= slots:
            return
        due = [(at, flight) for at, flight in self._suspects if at <= now and flight.job.may_run]
        if due:
            if not self.flights:
                first = min(due, key=lambda one: one[0])
                self._suspects.remove(first)
                self._run(Flight(first[1].job, first[1].place, first[1].tries, alone=True))
            return
        while len(self.flights) < slots:
            able = [job for job in self._jobs.values() if job.ready and job.may_run]
            if not able:
                return
            job = min(able, key=lambda job: job.served)
            place, tries = job.ready.popleft()
            self._run(Flight(job, place, tries))

    def _run(self, flight: Flight) -> None:
        ticket = next(self._tickets)
        self._served += 1
        flight.job.served = self._served
        self.flights[ticket] = flight
        self._book.out.append(do.RunItem(flight.job.job, flight.place, ticket, flight.job.client))

    def _read(self) -> None:
        slots = self._book.limits.batch_slots
        for job in self._jobs.values():
            if job.live and not job.reading and not job.exhausted and len(job.ready) < slots:
                job.reading = True
                self._book.out.append(do.ReadItems(job.job, job.cursor, 2 * slots, job.run))

    def _show(self, job: BatchJob, now: float) -> None:
        """Tell subscribers: at once of what they would act on, of mere progress now and then."""
        seen = job.seen(self._book.wall, self.fault)
        known = job.shown
        if seen == known and job.shown_at is not None:
            del self._changed[job.job]
            return
        same = known is not None and _known_by(known) == _known_by(seen)
        if same and job.shown_at is not None and now < job.shown_at + PROGRESS_S:
            return
        job.shown, job.shown_at = seen, now
        del self._changed[job.job]
        self._book.out.append(do.Publish("job", job=seen))


def _known_by(job: Job) -> tuple[object, ...]:
    """What callers act on."""
    return job.state, job.phase, job.error, job.total_items
