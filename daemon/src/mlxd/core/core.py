"""The daemon's mind: `Core.handle(event, now)` changes the state and returns what is to be done. State changes here
and nowhere else; no clock, no IO.

How a request runs, decided by `_settle` after every event:
    1. Its model is Ready and has a free slot: it is dispatched, fairly between clients.
    2. Its model is Downloaded: the model joins the line of pending loads, first come, first served.
    3. The first pending load starts as soon as it fits into the memory budget. Where it does not:
       a. idle models go, least recently used first; never one that is generating, awaited or leased;
       b. if that is not enough, busy models serve what they had accepted by then, and go;
       c. if not even that is enough (leases, pins, or it is larger than the budget): insufficient_memory.
       Pinned models go for other pinned ones only, and after all that are not.
       What only batch jobs want waits until there is room that nobody else has a use for.
    4. Requests of batch jobs step aside, and are asked for anew later: for one that finds no free slot, for a model
       that needs the room, and when the daemon stops.
    5. A model that was idle for its keep_alive goes, unless it is pinned.
    6. Where the budget was lowered below what the models need, they go in the same order.

Which request is next is decided in requests.py, which load in line.py and room.py; how models come to the disk and
leave it in downloads.py and deletes.py, which items of batch jobs run next in batches.py. Here are the wishes that are
no generations, what concerns several of these parts, and the order in which all of them settle.
"""

from __future__ import annotations

from mlxd_client import errors, types

from . import actions as do
from . import events as ev
from .batches import BatchLine
from .book import ELSEWHERE, Book, in_use
from .deletes import Deletes
from .downloads import DownloadLine
from .drafts import Drafts
from .gauge import Gauge
from .jobs import BatchJob, DownloadJob
from .lifecycle import Lifecycle
from .limits import Limits
from .line import LoadLine
from .memory import Memory
from .preloads import Preloads
from .records import Goal, ModelRecord
from .requests import RequestLine
from .room import room_for

__all__ = ["Core", "Limits"]


class Core:
    """All models, requests, leases and jobs of one daemon.

    Args:
        limits: see Limits.
        wall: Unix time minus the clock that `now` comes from; only for times on the wire.
        job_prefix: begins the ids of load jobs; what follows its first hyphen makes those of all jobs unique across
            runs of the daemon.
    """

    def __init__(self, limits: Limits, *, wall: float = 0.0, job_prefix: str = "load") -> None:
        self._book = book = Book(limits, wall, job_prefix)
        self._gauge = gauge = Gauge(book)
        self._line = line = LoadLine(book, gauge)
        self._downloads = downloads = DownloadLine(book)
        self._deletes = deletes = Deletes(book, line)
        self._drafts = drafts = Drafts(book, line, gauge)
        self._batches = batches = BatchLine(book)
        self._preloads = preloads = Preloads(book, line)
        self._memory = memory = Memory(book, line, gauge)
        self._request_line = requests = RequestLine(book, line, memory)
        self.wall = wall
        self.models, self.requests, self.goals, self.jobs = book.models, book.requests, book.goals, book.jobs
        self.breakers, self.deaths = self._line.breakers, self._line.deaths
        self.last_deaths = self._line.last_deaths
        self._handlers = {
            ev.Found: self._found, ev.Lost: self._lost, ev.Submit: requests.submit, ev.Ensure: self._ensure,
            ev.Release: self._release, ev.Unload: self._unload, ev.Cancel: self._cancel,
            ev.CancelJob: self._cancel_job, ev.ClientGone: self._client_gone, ev.LoadProgress: line.load_progress,
            ev.Loaded: line.loaded, ev.LoadFailed: line.load_failed, ev.WorkerExited: line.worker_exited,
            ev.MemoryReport: line.memory_report, ev.Done: requests.done, ev.Tick: requests.tick, ev.Drain: self._drain,
            ev.Hold: self._hold, ev.GoOn: self._go_on, ev.Leave: self._leave, ev.Elsewhere: self._elsewhere,
            ev.Abort: self._abort, ev.Download: downloads.download, ev.FetchProgress: downloads.fetch_progress,
            ev.Fetched: downloads.fetched, ev.FetchFailed: downloads.fetch_failed,
            ev.FetcherExited: downloads.fetcher_exited, ev.Newest: downloads.newest, ev.Delete: deletes.delete,
            ev.FilesDeleted: deletes.files_deleted, ev.Attach: drafts.attach, ev.Attached: drafts.attached,
            ev.BatchFound: batches.found, ev.BatchGrew: batches.grew, ev.BatchStarted: batches.started,
            ev.BatchItems: batches.items, ev.BatchItemEnded: batches.ended, ev.BatchRecorded: batches.recorded,
            ev.BatchGone: batches.gone, ev.BatchStoreFailed: batches.store_failed,
            ev.BatchStoreWorks: batches.store_works, ev.BatchLost: batches.lost,
            ev.Configure: self._configure, ev.Preload: preloads.preload, ev.Adapted: line.adapted,
            ev.Prewarmed: line.prewarmed,
            ev.Measured: memory.measured,
        }  # fmt: skip

    # --- what the runtime asks ------------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[do.Action]:
        """Take in one event. `now` must not run backwards."""
        self._book.out = []
        self._handlers[type(event)](event, now)  # type: ignore[operator]
        self._settle(now)
        return self._book.out

    def next_deadline(self) -> float | None:
        """When a Tick is due at the latest, on the clock of `now`."""
        times = (m.idle_deadline for m in self._book.by_worker.values())
        due = [t for t in times if t is not None]
        others = (self._request_line, self._downloads, self._preloads, self._gauge, self._batches)
        due += [t for t in (one.next_deadline() for one in others) if t is not None]
        return min(due, default=None)

    def view(self, model: str) -> types.Model:
        return self.models[model].view(self.wall)

    def snapshot(self) -> types.Snapshot:
        jobs = [j.view(self.wall) for j in self.jobs.values() if j.ended_at is None]
        return types.Snapshot(
            models=[m.view(self.wall) for m in self.models.values()], jobs=jobs, stopping=self.draining,
            memory_pressure=self._memory.pressure.level,
        )  # fmt: skip

    def shares(self) -> dict[int, int]:
        """What each worker may take beyond what its model needs, in bytes, by worker; of those that stay."""
        workers = self._book.by_worker.items()
        return {worker: m.allowed_bytes - m.wanted_bytes for worker, m in workers if m.allowed_bytes is not None}

    def memory(self) -> types.Memory:
        """How memory stands, by the last measurement."""
        return self._memory.view()

    @property
    def watchful(self) -> bool:
        """Whether memory is to be measured again and again: somebody uses it, waits for it, or it is short."""
        return bool(self._book.by_worker or self._book.pending) or self._memory.pressure.level != "normal"

    def room_for(self, model: str, need_bytes: int) -> tuple[int, bool, list[str]]:
        """What loading a model would come to; see room.room_for."""
        return room_for(
            self._book.by_worker.values(), model, need_bytes, self.limits.budget_bytes,
            pinned=model in self._book.rules.pinned, spare_bytes=self._gauge.spare_bytes,
        )  # fmt: skip

    def load_s(self, model: str) -> float | None:
        """How long the model's last load took, in seconds; None where there was none."""
        record = self.models.get(model)
        return None if record is None else record.load_s

    @property
    def limits(self) -> Limits:
        return self._book.limits

    @property
    def draining(self) -> bool:
        return self._book.draining

    @property
    def used_bytes(self) -> int:
        return sum(m.reserved_bytes for m in self.models.values())

    @property
    def waiting(self) -> int:
        return self._book.waiting

    @property
    def running(self) -> int:
        return sum(len(m.running) for m in self.models.values())

    @property
    def held_bytes(self) -> int:
        """What the models take, and those will that are about to load: what another daemon has to leave alone."""
        return self.used_bytes + sum(self.models[name].wanted_bytes for name in self._book.pending)

    @property
    def let_go(self) -> bool:
        """Whether nothing of this daemon's changes files of models: what another waits for before it takes over."""
        return not self._book.by_fetcher and not self._book.deleting and self._batches.let_go

    @property
    def quiet(self) -> bool:
        """Whether no request or goal is open: what a drain waits for. Downloads are the next daemon's to finish."""
        return not self.requests and not self.goals

    # --- the disk -------------------------------------------------------------------------------------------------

    def _found(self, event: ev.Found, now: float) -> None:
        record = self.models.get(event.model)
        if record is None:
            record = self._book.new_model(event.model, event.source)
        if record.lifecycle.state not in ("NotDownloaded", "Downloaded") or record.deleting:
            return
        news = self._book.learn(record, event)
        if record.lifecycle.state == "NotDownloaded":
            record.error = None
            self._book.remains.pop(record.id, None)
            self._book.move(record, "found", now)
        elif news:
            self._book.publish("model_found", record)

    def _lost(self, event: ev.Lost, now: float) -> None:
        record = self.models.get(event.model)
        if record is None or record.deleting or record.id in self._book.pending:
            return  # whoever loads it next will find out
        if record.lifecycle.state in ("NotDownloaded", "Downloaded"):  # a loaded model does not need its files
            self._downloads.lost(record, now)

    # --- the settings ---------------------------------------------------------------------------------------------

    def _configure(self, event: ev.Configure, now: float) -> None:
        book = self._book
        book.limits, book.rules = event.limits, event.rules
        book.reshare = True
        book.overhang = (book.waiting, self._downloads.fetching)
        for record in self.models.values():
            if book.apply_rules(record):
                book.publish("model_changed", record)
            if record.pinned:
                record.last_seq = None  # whoever counted on its going must plan anew
            self._preloads.forget(record)
            book.touch(record)

    # --- wishes ---------------------------------------------------------------------------------------------------

    def _ensure(self, event: ev.Ensure, now: float) -> None:
        if event.lease is None:
            self._line.breakers.reset(event.model)  # a load asked for by name is the command that heals
        record = self._line.admit(event.rid, event.model, now)
        if record is None:
            return
        if event.keep_alive_s is not None:
            record.keep_alive_wish = event.keep_alive_s
        record.needed = True
        goal = Goal(event.rid, event.client, "ensure", event.lease, event.asking)
        self._book.used(record, now)
        if record.serving and record.last_seq is None and not record.recycling:
            self._book.reach(record, goal)
            return
        record.goals[event.rid] = goal
        self.goals[event.rid] = record.id
        if record.worker is None:
            record.draft_promised = max(record.draft_promised, event.draft_bytes)
        if record.job is not None:
            record.job.wanted = True

    def _unload(self, event: ev.Unload, now: float) -> None:
        record = self.models.get(event.model)
        if record is None:
            self._book.fail(event.rid, errors.ModelNotFound(f"there is no model {event.model!r}", model=event.model))
            return
        record.preloading = False  # whoever asks for this wants it more
        record.preload_at = None
        self._book.touch(record)
        if record.worker is None and not record.busy:
            self._book.out.append(do.Answer(event.rid, self.view(record.id)))
            return
        if record.busy or record.leases:
            uses = {"active": len(record.running), "waiting": len(record.queue), "leases": len(record.leases)}
            uses["loading"] = sum(g.kind == "ensure" for g in record.goals.values())
            self._book.fail(event.rid, in_use(record.id, uses))
            return
        record.goals[event.rid] = Goal(event.rid, event.client, "unload")
        self.goals[event.rid] = record.id
        self._line.stop(record, now)

    # --- giving up ------------------------------------------------------------------------------------------------

    def _cancel(self, event: ev.Cancel, now: float) -> None:
        request = self.requests.get(event.rid)
        if request is not None:
            self._book.end(request, errors.Cancelled("the request was cancelled"), now)
        elif event.rid in self.goals:
            record = self.models[self.goals.pop(event.rid)]
            del record.goals[event.rid]
            self._book.fail(event.rid, errors.Cancelled("the request was cancelled"))
            self._book.rested(record, now)

    def _client_gone(self, event: ev.ClientGone, now: float) -> None:
        for record in self.models.values():
            for lease in [k for k, client in record.leases.items() if client == event.client]:
                self._drop_lease(record, lease, now)
        mine = [r.rid for r in self.requests.values() if r.client == event.client]
        mine += [rid for rid, model in self.goals.items() if self.models[model].goals[rid].client == event.client]
        for rid in mine:
            self._cancel(ev.Cancel(rid), now)

    def _release(self, event: ev.Release, now: float) -> None:
        for record in self.models.values():
            if record.leases.get(event.lease) == event.client:
                self._drop_lease(record, event.lease, now)

    def _drop_lease(self, record: ModelRecord, lease: str, now: float) -> None:
        del record.leases[lease]
        record.asking.discard(lease)
        record.returning = record.returning and record.held
        record.last_used = now
        self._book.rested(record, now)

    def _cancel_job(self, event: ev.CancelJob, now: float) -> None:
        job = self.jobs.get(event.job)
        if isinstance(job, DownloadJob):
            self._downloads.cancel(job, event.discard, now)
            return
        if isinstance(job, BatchJob):
            self._batches.cancel(job, now)
            return
        if job is None or job.ended_at is not None:
            return
        record = self.models[job.model]
        refusal = errors.Cancelled("the load was cancelled", job=job.job)
        self._book.fail_all(record, refusal, now)
        self._line.cancel(record, now)

    # --- the end --------------------------------------------------------------------------------------------------

    def _drain(self, event: ev.Drain, now: float) -> None:
        if not self.draining:
            self._book.draining = True
            self._book.out.append(do.Publish("daemon_stopping"))
            for record in self.models.values():
                self._book.step_aside(record, now)

    def _hold(self, event: ev.Hold, now: float) -> None:
        self._downloads.hold()
        self._batches.held = True

    def _go_on(self, event: ev.GoOn, now: float) -> None:
        self._downloads.go_on()
        self._batches.held = False

    def _leave(self, event: ev.Leave, now: float) -> None:
        """A model that was asked for is of use only where it stays: these ask the other daemon."""
        self._book.moved = True
        self._drain(ev.Drain(), now)
        elsewhere = errors.ShuttingDown("another daemon has taken over; connect anew", reconnect=True)
        for record in self.models.values():
            for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
                del record.goals[goal.rid], self.goals[goal.rid]
                self._book.fail(goal.rid, elsewhere)
            record.preload_at = None
            if record.worker is None:
                record.preloading = False
            if record.job is not None:
                record.job.wanted = False

    def _elsewhere(self, event: ev.Elsewhere, now: float) -> None:
        """It stands in the books as a model that is about to go: whoever needs its room waits for that."""
        self._book.by_worker.pop(ELSEWHERE, None)
        if event.held_bytes:
            other = ModelRecord(
                "another daemon's models", "path", Lifecycle("another daemon's models"), event.held_bytes
            )
            other.worker, other.stopping, other.footprint_bytes = ELSEWHERE, "unloaded", event.held_bytes
            self._book.by_worker[ELSEWHERE] = other

    def _abort(self, event: ev.Abort, now: float) -> None:
        self._drain(ev.Drain(), now)
        refusal = errors.ShuttingDown("the daemon stopped before this was done")
        for record in self.models.values():
            self._book.fail_all(record, refusal, now)
            for request in list(record.running.values()):
                self._book.free_slot(record, request)
                self._book.close(request, request.ending or refusal)
            record.leases.clear()
            record.asking.clear()
            record.returning = False
            if record.worker is not None or record.job is not None:
                self._line.cancel(record, now)
        self._downloads.abort()
        self._deletes.abort()

    # --- settling: what follows from the state as it is now -------------------------------------------------------

    def _settle(self, now: float) -> None:
        self._preloads.settle(now)
        if self._batches.held:  # items that come only now go back, too
            for record in self.models.values():
                self._book.step_aside(record, now)
        for name in list(self._book.touched):
            record = self.models[name]
            self._request_line.dispatch(record, now)
            if record.wanted and record.worker is None and record.job is None:
                self._line.pend(record, now)
            elif record.job is not None and record.job.state == "queued" and not (record.wanted or record.job.wanted):
                self._line.unpend(record, None, now)
        if self._book.moved:
            self._line.leave(now)
        for record in self._line.make_room(now):
            self._request_line.dispatch(record, now)
        self._line.retire(now)
        self._drafts.settle(now)
        if self._book.reshare:
            self._book.reshare = False
            self._memory.share_out()
        if self._book.deleting:
            self._deletes.settle()
        self._downloads.settle(now)
        self._batches.settle(now)
        for name in self._book.touched:
            record = self.models[name]
            activity = record.activity()
            if activity != record.published:
                record.published = activity
                self._book.publish("queue", record)
        self._book.touched.clear()
