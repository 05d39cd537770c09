"""The daemon's mind: `Core.handle(event, now)` changes the state and returns what is to be done. State changes here
and nowhere else; no clock, no IO.

How a request runs, decided by `_settle` after every event:
    1. Its model is Ready and has a free slot: it is dispatched, fairly between clients.
    2. Its model is Downloaded: the model joins the line of pending loads, first come, first served.
    3. The first pending load starts as soon as it fits into the memory budget. Where it does not:
       a. idle models go, least recently used first; never one that is generating, awaited or leased;
       b. if that is not enough, busy models serve what they had accepted by then, and go;
       c. if not even that is enough (leases, or it is larger than the budget): insufficient_memory.
    4. A model that was idle for its keep_alive goes.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from mlxd_client import errors, types
from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject

from . import actions as do
from . import events as ev
from .breaker import Breakers, BreakerState
from .lifecycle import Lifecycle
from .records import Goal, LoadJob, ModelRecord, Request
from .room import plan_room

ENDED_JOBS_KEPT = 64
JobEnd = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Limits:
    """`budget_bytes` bounds all models together; `queue` all waiting requests; `max_batch` one model's running ones."""

    budget_bytes: int
    queue: int = 512
    max_batch: int = 32
    keep_alive_s: float = 300.0


class Core:
    """All models, requests, leases and load jobs of one daemon.

    Args:
        limits: see Limits.
        wall: Unix time minus the clock that `now` comes from; only for times on the wire.
        job_prefix: makes job ids unique across runs of the daemon.
    """

    def __init__(self, limits: Limits, *, wall: float = 0.0, job_prefix: str = "load") -> None:
        self.limits = limits
        self.wall = wall
        self.models: dict[str, ModelRecord] = {}
        self.requests: dict[int, Request] = {}
        self.goals: dict[int, str] = {}  # rid → model
        self.jobs: dict[str, LoadJob] = {}
        self.breakers = Breakers()
        self.draining = False
        self.deaths: Counter[str] = Counter()  # of workers, by model, since the daemon started
        self.last_deaths: dict[str, ErrorObject] = {}
        self._pending: dict[str, None] = {}  # models that wait to load, oldest first
        self._by_worker: dict[int, ModelRecord] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._touched: dict[str, None] = {}
        self._out: list[do.Action] = []
        self._seq = 0
        self._workers = 0
        self._job_prefix = job_prefix
        self._jobs_made = 0
        self._ended_jobs: deque[str] = deque()
        self._handlers = {
            ev.Found: self._found, ev.Lost: self._lost, ev.Submit: self._submit, ev.Ensure: self._ensure,
            ev.Release: self._release, ev.Unload: self._unload, ev.Cancel: self._cancel,
            ev.CancelJob: self._cancel_job, ev.ClientGone: self._client_gone, ev.LoadProgress: self._load_progress,
            ev.Loaded: self._loaded, ev.LoadFailed: self._load_failed, ev.WorkerExited: self._worker_exited,
            ev.MemoryReport: self._memory_report, ev.Done: self._done, ev.Tick: self._tick, ev.Drain: self._drain,
            ev.Abort: self._abort,
        }  # fmt: skip

    # --- what the runtime asks ------------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[do.Action]:
        """Take in one event. `now` must not run backwards."""
        self._out = []
        self._handlers[type(event)](event, now)  # type: ignore[operator]
        self._settle(now)
        return self._out

    def next_deadline(self) -> float | None:
        """When a Tick is due at the latest, on the clock of `now`."""
        while self._deadlines and not self._deadline_live(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        times = (m.idle_deadline for m in self._by_worker.values())
        due = [t for t in times if t is not None]
        if self._deadlines:
            due.append(self._deadlines[0][0])
        return min(due, default=None)

    def view(self, model: str) -> types.Model:
        return self.models[model].view(self.wall)

    def snapshot(self) -> types.Snapshot:
        jobs = [j.view(self.wall) for j in self.jobs.values() if j.ended_at is None]
        return types.Snapshot(
            models=[m.view(self.wall) for m in self.models.values()], jobs=jobs, stopping=self.draining
        )

    @property
    def used_bytes(self) -> int:
        return sum(m.reserved_bytes for m in self.models.values())

    @property
    def waiting(self) -> int:
        return sum(len(m.queue) for m in self.models.values())

    @property
    def running(self) -> int:
        return sum(len(m.running) for m in self.models.values())

    @property
    def quiet(self) -> bool:
        """Whether no request or goal is open: what a drain waits for."""
        return not self.requests and not self.goals

    # --- the disk -------------------------------------------------------------------------------------------------

    def _found(self, event: ev.Found, now: float) -> None:
        record = self.models.get(event.model)
        if record is None:
            record = ModelRecord(event.model, event.source, Lifecycle(event.model), event.need_bytes)
            self.models[event.model] = record
            record.keep_alive_s = self._default_keep_alive(event)
        if record.lifecycle.state not in ("NotDownloaded", "Downloaded"):
            return
        facts = (event.source, event.need_bytes, event.revision, event.size_bytes, event.context_length)
        known = (record.source, record.need_bytes, record.revision, record.size_bytes, record.context_length)
        if record.lifecycle.state == "Downloaded" and facts == known:
            return
        record.source, record.need_bytes, record.revision, record.size_bytes, record.context_length = facts
        if record.lifecycle.state == "NotDownloaded":
            self._move(record, "found", now)
        else:
            self._publish("model_found", record)

    def _default_keep_alive(self, event: ev.Found) -> float:
        return self.limits.keep_alive_s if event.keep_alive_s is None else event.keep_alive_s

    def _lost(self, event: ev.Lost, now: float) -> None:
        record = self.models.get(event.model)
        if record is None or record.lifecycle.state != "Downloaded" or record.id in self._pending:
            return  # a loaded model does not need its files; whoever loads it next will find out
        self._move(record, "lost", now)

    # --- wishes ---------------------------------------------------------------------------------------------------

    def _submit(self, event: ev.Submit, now: float) -> None:
        record = self._admit(event.rid, event.model, now)
        if record is None:
            return
        if not self._place_in_line(record, event.client):
            hint = self._retry_after(record)
            self._fail(event.rid, errors.QueueFull("too many requests wait already", retry_after_s=hint))
            return
        self._seq += 1
        deadline = None if event.timeout_s is None else now + event.timeout_s
        request = Request(event.rid, event.client, record.id, self._seq, event.priority, now, deadline)
        self.requests[event.rid] = request
        record.queue.put(request)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, event.rid))
        if event.keep_alive_s is not None:
            record.keep_alive_s = event.keep_alive_s
        self._used(record, now)

    def _place_in_line(self, record: ModelRecord, client: int) -> bool:
        """Whether one more request of this client may wait, or need not wait.

        A client may have as many waiting as there are places left: alone it may take half the line, and however many
        are greedy, the next client finds a place (dynamic thresholds, Choudhury and Hahne, 1998).
        """
        at_once = record.serving and record.last_seq is None and not record.queue
        if at_once and len(record.running) < self.limits.max_batch:
            return True
        free = self.limits.queue - self.waiting
        mine = sum(m.queue.of_client(client) for m in self.models.values() if m.queue)
        return mine < free

    def _retry_after(self, record: ModelRecord) -> float:
        """Seconds after which the line has probably moved by one batch; a hint for the caller."""
        batches = 1 + len(record.queue) / self.limits.max_batch
        return round(min(60.0, max(0.05, (record.service_s or 1.0) * batches)), 3)

    def _ensure(self, event: ev.Ensure, now: float) -> None:
        if event.lease is None:
            self.breakers.reset(event.model)  # a load asked for by name is the command that heals
        record = self._admit(event.rid, event.model, now)
        if record is None:
            return
        if event.keep_alive_s is not None:
            record.keep_alive_s = event.keep_alive_s
        goal = Goal(event.rid, event.client, "ensure", event.lease)
        self._used(record, now)
        if record.serving and record.last_seq is None:
            self._reach(record, goal)
            return
        record.goals[event.rid] = goal
        self.goals[event.rid] = record.id
        if record.job is not None:
            record.job.wanted = True

    def _unload(self, event: ev.Unload, now: float) -> None:
        record = self.models.get(event.model)
        if record is None:
            self._fail(event.rid, errors.ModelNotFound(f"there is no model {event.model!r}", model=event.model))
            return
        if record.worker is None and not record.busy:
            self._out.append(do.Answer(event.rid, self.view(record.id)))
            return
        if record.busy or record.leases:
            uses = {"active": len(record.running), "waiting": len(record.queue), "leases": len(record.leases)}
            uses["loading"] = sum(g.kind == "ensure" for g in record.goals.values())
            told = ", ".join(f"{n} {name}" for name, n in uses.items() if n)
            self._fail(event.rid, errors.ModelBusy(f"{record.id} is in use: {told}", model=record.id, **uses))
            return
        record.goals[event.rid] = Goal(event.rid, event.client, "unload")
        self.goals[event.rid] = record.id
        self._stop(record, now)

    def _admit(self, rid: int, model: str, now: float) -> ModelRecord | None:
        """The model's record if it may take work; else the request has failed."""
        record = self.models.get(model)
        if self.draining:
            self._fail(rid, errors.ShuttingDown("the daemon is stopping and takes no new work"))
        elif record is None or record.lifecycle.state in ("NotDownloaded", "Downloading"):
            self._fail(rid, errors.ModelNotFound(f"there is no model {model!r} on this machine", model=model))
        elif record.worker is None and self.breakers.state(model, now) is BreakerState.OPEN:
            self._fail(rid, self._broken(record, now))
        else:
            return record
        return None

    def _broken(self, record: ModelRecord, now: float) -> RpcError:
        """Why no worker is started for this model at present: its workers kept dying."""
        wait = max(0.0, (self.breakers.retry_at(record.id) or now) - now)
        last = self.last_deaths.get(record.id)
        told = {} if last is None else {"last": last.message}
        return errors.WorkerDied(
            f"workers of {record.id} kept dying; the next try is in {wait:.0f} s, or now with a load",
            cause="crash_loop", model=record.id, retry_after_s=round(wait, 3), **told,
        )  # fmt: skip

    # --- giving up ------------------------------------------------------------------------------------------------

    def _cancel(self, event: ev.Cancel, now: float) -> None:
        request = self.requests.get(event.rid)
        if request is not None:
            self._end(request, errors.Cancelled("the request was cancelled"), now)
        elif event.rid in self.goals:
            record = self.models[self.goals.pop(event.rid)]
            del record.goals[event.rid]
            self._fail(event.rid, errors.Cancelled("the request was cancelled"))
            self._rested(record, now)

    def _end(self, request: Request, error: RpcError, now: float) -> None:
        """Seal a request's fate: at once where it waits, by way of its worker where it runs."""
        record = self.models[request.model]
        if request.rid not in record.running:
            record.queue.remove(request)
            self._close(request, error)
            self._rested(record, now)
        elif request.ending is None:
            request.ending = error
            assert record.worker is not None
            self._out.append(do.CancelOnWorker(request.rid, record.worker))

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
        record.last_used = now
        self._rested(record, now)

    def _cancel_job(self, event: ev.CancelJob, now: float) -> None:
        job = self.jobs.get(event.job)
        if job is None or job.ended_at is not None:
            return
        record = self.models[job.model]
        refusal = errors.Cancelled("the load was cancelled", job=job.job)
        self._fail_all(record, refusal, now)
        self._pending.pop(record.id, None)
        if record.worker is None:
            self._end_job(record, "cancelled", now)
        else:
            self._stop(record, now)

    # --- workers --------------------------------------------------------------------------------------------------

    def _load_progress(self, event: ev.LoadProgress, now: float) -> None:
        record = self._by_worker[event.worker]
        if record.lifecycle.state != "Loading" or record.stopping is not None:
            return
        record.progress = event.progress
        self._publish("loading_progress", record, progress=event.progress)
        if record.job is not None:
            record.job.progress = event.progress
            self._out.append(do.Publish("job", job=record.job.view(self.wall)))

    def _loaded(self, event: ev.Loaded, now: float) -> None:
        record = self._by_worker[event.worker]
        if record.stopping is not None:
            return  # it was told to go meanwhile; its exit will follow
        record.memory_bytes = event.memory_bytes
        record.context_length = event.context_length
        record.error = record.progress = None
        self._move(record, "loaded", now)
        self._end_job(record, "done", now)
        for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
            del record.goals[goal.rid], self.goals[goal.rid]
            self._reach(record, goal)
        self._used(record, now)
        self._rested(record, now)

    def _load_failed(self, event: ev.LoadFailed, now: float) -> None:
        record = self._by_worker[event.worker]
        if record.stopping is not None:
            return
        record.error = _error_object(event.error)
        self._fail_all(record, event.error, now)
        self._end_job(record, "failed", now, record.error)
        self._stop(record, now, "load_failed")

    def _worker_exited(self, event: ev.WorkerExited, now: float) -> None:
        record = self._by_worker.pop(event.worker)
        cause = record.stopping
        was_loading = record.lifecycle.state == "Loading"
        record.worker = record.stopping = record.last_seq = record.memory_bytes = record.idle_since = None
        record.progress = None
        if cause is None:
            cause = "worker_died"
            self._mourn(record, event.error, was_loading, now)
        for request in list(record.running.values()):
            self._lose(record, request, event.error)
        self._move(record, cause, now)
        for goal in [g for g in record.goals.values() if g.kind == "unload"]:
            del record.goals[goal.rid], self.goals[goal.rid]
            self._reach(record, goal)

    def _mourn(self, record: ModelRecord, error: RpcError | None, was_loading: bool, now: float) -> None:
        """A worker died unasked: remember it, and fail what it held."""
        death = error or errors.WorkerDied(f"the worker of {record.id} died", cause="exit")
        record.error = self.last_deaths[record.id] = _error_object(death)
        self.deaths[record.id] += 1
        self.breakers.died(record.id, now)
        if was_loading:
            self._fail_all(record, death, now)
            self._end_job(record, "failed", now, record.error)

    def _lose(self, record: ModelRecord, request: Request, error: RpcError | None) -> None:
        """A request whose worker is gone: it ends as was already decided, else with the worker's death."""
        self._free_slot(record, request)
        death = error or errors.WorkerDied(f"the worker of {record.id} was stopped", cause="stopped")
        self._close(request, request.ending or death)

    def _memory_report(self, event: ev.MemoryReport, now: float) -> None:
        record = self._by_worker.get(event.worker)
        if record is not None and record.lifecycle.state == "Ready":
            record.memory_bytes = event.memory_bytes
            self._touch(record)

    def _done(self, event: ev.Done, now: float) -> None:
        request = self.requests.get(event.rid)
        if request is None:
            return  # ended already: its worker was declared dead
        record = self.models[request.model]
        self._free_slot(record, request)
        if request.started_at is not None:
            took = now - request.started_at
            record.service_s = took if record.service_s is None else 0.8 * record.service_s + 0.2 * took
        self.breakers.succeeded(record.id, now)
        self._close(request, request.ending)
        self._used(record, now)
        self._rested(record, now)

    # --- time -----------------------------------------------------------------------------------------------------

    def _tick(self, event: ev.Tick, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if self._deadline_live(entry):
                request = self.requests[entry[1]]
                self._end(request, self._too_late(request), now)

    def _deadline_live(self, entry: tuple[float, int]) -> bool:
        request = self.requests.get(entry[1])
        return request is not None and request.deadline == entry[0] and request.ending is None

    def _too_late(self, request: Request) -> RpcError:
        record = self.models[request.model]
        if request.started_at is not None:
            phase = "generating"
        else:
            phase = "queued" if record.lifecycle.state == "Ready" else "loading"
        limit = (request.deadline or request.accepted_at) - request.accepted_at
        return errors.DeadlineExceeded(f"not done within {limit:g} s (still {phase})", phase=phase, timeout_s=limit)

    # --- the end --------------------------------------------------------------------------------------------------

    def _drain(self, event: ev.Drain, now: float) -> None:
        if not self.draining:
            self.draining = True
            self._out.append(do.Publish("daemon_stopping"))

    def _abort(self, event: ev.Abort, now: float) -> None:
        self._drain(ev.Drain(), now)
        refusal = errors.ShuttingDown("the daemon stopped before this was done")
        for record in self.models.values():
            self._fail_all(record, refusal, now)
            for request in list(record.running.values()):
                self._free_slot(record, request)
                self._close(request, request.ending or refusal)
            record.leases.clear()
            self._pending.pop(record.id, None)
            if record.worker is None and record.job is not None:
                self._end_job(record, "cancelled", now)
            elif record.worker is not None:
                self._stop(record, now)

    # --- settling: what follows from the state as it is now -------------------------------------------------------

    def _settle(self, now: float) -> None:
        for name in list(self._touched):
            record = self.models[name]
            self._dispatch(record, now)
            if record.wanted and record.worker is None and record.job is None:
                self._pend(record, now)
            elif record.job is not None and record.job.state == "queued" and not (record.wanted or record.job.wanted):
                self._unpend(record, None, now)
        self._make_room(now)
        self._retire(now)
        for name in self._touched:
            record = self.models[name]
            activity = record.activity()
            if activity != record.published:
                record.published = activity
                self._publish("queue", record)
        self._touched.clear()

    def _dispatch(self, record: ModelRecord, now: float) -> None:
        if not record.serving:
            return
        assert record.worker is not None
        while len(record.running) < self.limits.max_batch:
            request = record.queue.pop(record.running_by_client, record.last_seq)
            if request is None:
                return
            request.started_at = now
            record.running[request.rid] = request
            record.running_by_client[request.client] += 1
            record.idle_since = None
            self._out.append(do.Dispatch(request.rid, record.worker))
            self._out.append(do.Publish("generation_started", model_id=record.id, rid=request.rid))

    def _pend(self, record: ModelRecord, now: float) -> None:
        """Put the model into the line of loads."""
        self._jobs_made += 1
        wanted = any(g.kind == "ensure" for g in record.goals.values())
        job = LoadJob(f"{self._job_prefix}-{self._jobs_made}", record.id, wanted, now)
        record.job = self.jobs[job.job] = job
        self._pending[record.id] = None
        self._out.append(do.Publish("job", job=job.view(self.wall)))

    def _unpend(self, record: ModelRecord, refusal: RpcError | None, now: float) -> None:
        """Take the model out of the line: nobody wants it any more, or it cannot be had."""
        del self._pending[record.id]
        announced = record.job is not None and record.job.announced
        if refusal is None:
            self._end_job(record, "cancelled", now)
            if announced:
                self._publish("loading_cancelled", record)
            return
        record.error = _error_object(refusal)
        self._fail_all(record, refusal, now)
        self._end_job(record, "failed", now, record.error)
        self._publish("error", record, error=record.error)

    def _make_room(self, now: float) -> None:
        """Serve the line of loads: only its head is considered, so that nobody overtakes it for ever."""
        while self._pending:
            record = self.models[next(iter(self._pending))]
            room = plan_room(self._by_worker.values(), record, self.limits.budget_bytes)
            refusal = room.refusal
            if room.fits and not self.breakers.admit(record.id, now):
                refusal = self._broken(record, now)
            if refusal is not None:
                self._unpend(record, refusal, now)
                continue
            if room.fits:
                self._start(record, now)
                continue
            for victim in room.stop:
                self._stop(victim, now)
            for victim in room.serve_out:
                victim.last_seq = self._seq
                self._touch(victim)
            break
        else:
            for record in self._by_worker.values():
                record.last_seq = None  # nobody needs the room any more
        for name in self._pending:
            record = self.models[name]
            if record.job is not None and not record.job.announced:
                record.job.announced = True
                self._publish("loading_queued", record)

    def _start(self, record: ModelRecord, now: float) -> None:
        del self._pending[record.id]
        self._workers += 1
        record.worker = self._workers
        self._by_worker[record.worker] = record
        record.error = None
        record.progress = 0.0
        self._out.append(do.StartWorker(record.worker, record.id))
        self._move(record, "load", now)
        assert record.job is not None
        record.job.state = "running"
        self._out.append(do.Publish("job", job=record.job.view(self.wall)))

    def _retire(self, now: float) -> None:
        """Stop the models that are idle for long enough, or that have served what they owed before making room."""
        for record in list(self._by_worker.values()):
            if record.stopping is not None or record.lifecycle.state != "Ready":
                continue
            deadline = record.idle_deadline
            if deadline is not None and deadline <= now and not record.busy:
                self._stop(record, now)
            elif record.last_seq is not None and not record.running:
                self._stop(record, now)  # what may still be served was dispatched before this

    def _stop(self, record: ModelRecord, now: float, cause: str | None = None) -> None:
        """Tell the model's worker to go. The model keeps its state, and its memory, until it is gone."""
        if record.stopping is not None:
            return
        assert record.worker is not None
        loading = record.lifecycle.state == "Loading"
        record.stopping = cause or ("load_cancelled" if loading else "unloaded")
        self._out.append(do.StopWorker(record.worker))
        self._end_job(record, "cancelled", now)
        self._publish("unloading_started", record)

    # --- small changes that many decisions share ------------------------------------------------------------------

    def _move(self, record: ModelRecord, cause: str, now: float) -> None:
        transition = record.lifecycle.apply(cause, now)
        error = record.error if transition.event in ("error", "worker_died") else None
        self._publish(transition.event, record, error=error)

    def _touch(self, record: ModelRecord) -> None:
        self._touched[record.id] = None

    def _used(self, record: ModelRecord, now: float) -> None:
        record.last_used = now
        self._touch(record)
        if record.idle_since is not None:
            record.idle_since = now

    def _rested(self, record: ModelRecord, now: float) -> None:
        """Start the idle timer where nothing runs or waits any more."""
        self._touch(record)
        if record.serving and not record.running and not record.queue and record.idle_since is None:
            record.idle_since = now

    def _reach(self, record: ModelRecord, goal: Goal) -> None:
        """A goal's model stands as wished: grant the lease, if one was asked for, and answer."""
        if goal.lease is not None:
            record.leases[goal.lease] = goal.client
            record.last_seq = None  # whoever counted on its going must plan anew
        self._touch(record)
        self._out.append(do.Answer(goal.rid, self.view(record.id)))

    def _free_slot(self, record: ModelRecord, request: Request) -> None:
        del record.running[request.rid]
        record.running_by_client[request.client] -= 1
        if not record.running_by_client[request.client]:
            del record.running_by_client[request.client]
        self._touch(record)

    def _close(self, request: Request, error: RpcError | None) -> None:
        """The last word on a request: the worker's answer, or an error."""
        del self.requests[request.rid]
        self._out.append(do.Deliver(request.rid) if error is None else do.Fail(request.rid, error))
        if request.started_at is not None:
            self._out.append(do.Publish("generation_finished", model_id=request.model, rid=request.rid))

    def _fail(self, rid: int, error: RpcError) -> None:
        self._out.append(do.Fail(rid, error))

    def _fail_all(self, record: ModelRecord, error: RpcError, now: float) -> None:
        """Fail whatever waits for the model; what runs is its worker's to answer."""
        for request in list(record.queue):
            self._end(request, error, now)
        for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
            del record.goals[goal.rid], self.goals[goal.rid]
            self._fail(goal.rid, error)
        self._touch(record)

    def _end_job(self, record: ModelRecord, state: JobEnd, now: float, error: ErrorObject | None = None) -> None:
        job, record.job = record.job, None
        if job is None:
            return
        job.state, job.ended_at, job.error = state, now, error
        if state == "done":
            job.progress = 1.0
        self._out.append(do.Publish("job", job=job.view(self.wall)))
        self._ended_jobs.append(job.job)
        if len(self._ended_jobs) > ENDED_JOBS_KEPT:
            del self.jobs[self._ended_jobs.popleft()]

    def _publish(
        self, name: str, record: ModelRecord, *, progress: float | None = None, error: ErrorObject | None = None
    ) -> None:
        view = record.view(self.wall)
        self._touch(record)
        self._out.append(do.Publish(name, model_id=record.id, model=view, progress=progress, error=error))


def _error_object(error: RpcError) -> ErrorObject:
    return ErrorObject(kind=error.kind, message=error.message, details=error.details)
