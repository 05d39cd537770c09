"""The line of loads: who may load next, who goes to make room, and what becomes of workers.

First come, first served: only the head of the line is considered, so that nobody overtakes it for ever.
"""

from __future__ import annotations

from collections import Counter

from mlxd_client import errors
from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject

from . import actions as do
from . import events as ev
from .book import Book, error_object
from .breaker import Breakers, BreakerState
from .gauge import Gauge
from .records import ModelRecord, Request
from .room import Manner, Room, plan_room, plan_shed


class LoadLine:
    """Starts and stops the workers of the book's models.

    Attributes:
        breakers: stop a model whose workers keep dying from being tried again at once.
        deaths: how many workers died unasked, by model; `last_deaths` says how.
    """

    def __init__(self, book: Book, gauge: Gauge) -> None:
        self.breakers = Breakers()
        self.deaths: Counter[str] = Counter()
        self.last_deaths: dict[str, ErrorObject] = {}
        self._book = book
        self._gauge = gauge
        self._workers = 0

    # --- waiting, starting, stopping ------------------------------------------------------------------------------

    def admit(self, rid: int, model: str, now: float) -> ModelRecord | None:
        """The model's record if it may take work; else the request has failed."""
        record = self._book.models.get(model)
        if self._book.draining and not self._book.moved:  # else it was accepted before that
            self._book.fail(rid, errors.ShuttingDown("the daemon is stopping and takes no new work"))
        elif record is None or record.lifecycle.state in ("NotDownloaded", "Downloading"):
            self._book.fail(rid, errors.ModelNotFound(f"there is no model {model!r} on this machine", model=model))
        elif record.deleting:
            self._book.fail(rid, errors.ModelBusy(f"{model} is being deleted", model=model, deleting=1))
        elif record.kind == "adapter":
            told = f"{model} is an adapter: name it as `adapter`, beside the model that it was made for"
            self._book.fail(rid, errors.ModelInvalid(told, model=model))
        elif record.worker is None and self.breakers.state(model, now) is BreakerState.OPEN:
            self._book.fail(rid, self.broken(record, now))
        else:
            return record
        return None

    def pend(self, record: ModelRecord, now: float) -> None:
        """Put the model into the line of loads."""
        self._book.new_job(record, now)
        self._book.pending[record.id] = None

    def unpend(self, record: ModelRecord, refusal: RpcError | None, now: float) -> None:
        """Take the model out of the line: nobody wants it any more, or it cannot be had."""
        del self._book.pending[record.id]
        record.returning = False
        announced = record.job is not None and record.job.announced
        if refusal is None:
            self._book.end_job(record, "cancelled", now)
            if announced:
                self._book.publish("loading_cancelled", record)
            return
        record.error = error_object(refusal)
        self._book.fail_all(record, refusal, now)
        self._book.end_job(record, "failed", now, record.error)
        self._book.publish("error", record, error=record.error)

    def make_room(self, now: float) -> list[ModelRecord]:
        """Serve the line of loads: only its head is considered, so that nobody overtakes it for ever.

        Returns: models that were to go for it, and may go on.
        """
        released: list[ModelRecord] = []
        over = plan_shed(self._book.by_worker.values(), self._book.limits.budget_bytes)
        if over is not None:
            self._clear(over, now)
        while (choice := self._next_load(now)) is not None:
            record, room = choice
            refusal = room.refusal
            if room.system and self._gauge.settling(now):
                break
            if room.fits and not self.breakers.admit(record.id, now):
                refusal = self.broken(record, now)
            if refusal is not None:
                self.unpend(record, refusal, now)
                continue
            if room.fits:
                self._start(record, now)
                continue
            self._clear(room, now)
            break
        if over is None and not any(self._book.models[name].urgent_load for name in self._book.pending):
            released = [record for record in self._book.by_worker.values() if record.last_seq is not None]
            for record in released:
                record.last_seq = None  # nobody needs the room any more
                self._book.touch(record)
                if record.serving and not record.recycling:
                    self._answer(record)
        for name in self._book.pending if not self._gauge.waited_for else ():
            record = self._book.models[name]
            if record.job is not None and not record.job.announced:
                record.job.announced = True
                self._book.publish("loading_queued", record)
        return released

    def _clear(self, room: Room, now: float) -> None:
        """Have those go that a plan names."""
        for victim in room.stop:
            self.stop(victim, now, why="room")
        for victim in room.serve_out:
            victim.last_seq = self._book.seq
            self._book.step_aside(victim, now)
            self._book.touch(victim)

    def _next_load(self, now: float) -> tuple[ModelRecord, Room] | None:
        """The load to be decided on, and what room there is for it: the first that anybody waits for; else, of those
        that only batch jobs or the settings want, the first for which something can be done without anybody's
        noticing. None as long as memory is being measured for it."""
        pending = [self._book.models[name] for name in self._book.pending]
        if not pending:
            self._gauge.rest()
        since = max((record.job.started_at for record in pending if record.job is not None), default=0.0)
        if not pending or not self._gauge.ready(now, since):
            return None
        workers, budget, spare = self._book.by_worker.values(), self._book.limits.budget_bytes, self._gauge.spare_bytes
        for record in pending:
            if record.urgent_load:
                return record, plan_room(workers, record, budget, spare_bytes=spare)
        for record in pending:
            manner: Manner = "patient" if record.awaited else "modest"
            room = plan_room(workers, record, budget, manner, spare_bytes=spare)
            if room.fits or room.stop or room.refusal is not None:
                return record, room
        return None

    def _start(self, record: ModelRecord, now: float) -> None:
        del self._book.pending[record.id]
        self._workers += 1
        record.worker = self._workers
        self._book.by_worker[record.worker] = record
        self._book.reshare = True
        record.error = None
        record.returning = False
        record.max_batch = self._book.limits.max_batch
        record.progress = 0.0
        record.load_began = now
        self._book.out.append(do.StartWorker(record.worker, record.id))
        self._book.move(record, "load", now)
        assert record.job is not None
        record.job.state = "running"
        self._book.publish_job(record.job)

    def retire(self, now: float) -> None:
        """Stop the models that are idle for long enough, or that have served what they owed before making room."""
        for record in list(self._book.by_worker.values()):
            if record.stopping is not None or record.lifecycle.state != "Ready":
                continue
            if record.recycling and not record.engaged:
                self.stop(record, now, "recycled", why="recycled")
                continue
            deadline = record.idle_deadline
            if deadline is not None and deadline <= now and not record.busy:
                self.stop(record, now, why="idle")
            elif record.last_seq is not None and not record.running:
                self.stop(record, now, why="room")  # what may still be served was dispatched before this

    def leave(self, now: float) -> None:
        """Let models go that nobody uses any more, and loads that nobody waits for: another daemon has taken over."""
        for record in list(self._book.by_worker.values()):
            if not (record.busy or record.leases):
                self.stop(record, now)
        for name in list(self._book.pending):
            if not self._book.models[name].wanted:
                self.unpend(self._book.models[name], None, now)

    def stop(self, record: ModelRecord, now: float, cause: str | None = None, *, why: str = "asked") -> None:
        """Tell the model's worker to go. The model keeps its state, and its memory, until it is gone.

        Args:
            why: see actions.StopWorker.
        """
        if record.stopping is not None:
            return
        assert record.worker is not None
        loading = record.lifecycle.state == "Loading"
        record.stopping = cause or ("load_cancelled" if loading else "unloaded")
        self._book.out.append(do.StopWorker(record.worker, why))
        self._book.reshare = True
        self._book.end_job(record, "cancelled", now)
        self._book.publish("unloading_started", record)

    def cancel(self, record: ModelRecord, now: float) -> None:
        """Give up on a load, wherever it stands; who waits for it has been told."""
        if record.worker is None:
            self.unpend(record, None, now)
        else:
            self.stop(record, now, why="stopping" if self._book.draining else "cancelled")

    def broken(self, record: ModelRecord, now: float) -> RpcError:
        """Why no worker is started for this model at present: its workers kept dying."""
        wait = max(0.0, (self.breakers.retry_at(record.id) or now) - now)
        last = self.last_deaths.get(record.id)
        told = {} if last is None else {"last": last.message}
        return errors.WorkerDied(
            f"workers of {record.id} kept dying; one is tried in {wait:.0f} s, or at once by `mlxd load {record.id}`",
            cause="crash_loop", model=record.id, retry_after_s=round(wait, 3), **told,
        )  # fmt: skip

    # --- what workers do ------------------------------------------------------------------------------------------

    def load_progress(self, event: ev.LoadProgress, now: float) -> None:
        record = self._book.by_worker[event.worker]
        if record.lifecycle.state != "Loading" or record.stopping is not None:
            return
        record.progress = event.progress
        self._book.publish("loading_progress", record, progress=event.progress)
        if record.job is not None:
            record.job.progress = event.progress
            self._book.publish_job(record.job)

    def loaded(self, event: ev.Loaded, now: float) -> None:
        record = self._book.by_worker[event.worker]
        if record.stopping is not None:
            return  # it was told to go meanwhile; its exit will follow
        record.memory_bytes = event.memory_bytes
        if event.needs_bytes is not None:
            record.learned_bytes = event.needs_bytes
        self._book.reshare = True
        record.context_length = event.context_length
        record.draft = event.draft
        record.capabilities = event.capabilities
        record.preloading = False
        record.error = record.progress = None
        record.load_s = now - record.load_began
        self._book.move(record, "loaded", now)
        self._book.end_job(record, "done", now)
        self._answer(record)
        self._book.used(record, now)
        self._book.rested(record, now)

    def _answer(self, record: ModelRecord) -> None:
        """Tell those that wait for the model to be Ready that it is."""
        for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
            del record.goals[goal.rid], self._book.goals[goal.rid]
            self._book.reach(record, goal)

    def load_failed(self, event: ev.LoadFailed, now: float) -> None:
        record = self._book.by_worker[event.worker]
        if record.stopping is not None:
            return
        record.error = error_object(event.error)
        self._book.fail_all(record, event.error, now)
        self._book.end_job(record, "failed", now, record.error)
        self.stop(record, now, "load_failed", why="load_failed")

    def worker_exited(self, event: ev.WorkerExited, now: float) -> None:
        record = self._book.by_worker.pop(event.worker)
        self._gauge.exited(now)
        self._book.reshare = True
        cause = record.stopping
        record.footprint_bytes = record.allowed_bytes = record.over_step = None
        record.granted_bytes, record.recycling = 0, False
        record.returning = cause == "recycled" and record.held and not self._book.draining
        was_loading = record.lifecycle.state == "Loading"
        record.worker = record.stopping = record.last_seq = record.memory_bytes = record.idle_since = None
        record.progress = record.draft = record.adapter = record.capabilities = None
        record.prewarmed = 0
        record.draft_takes = record.draft_granted = record.draft_promised = 0
        record.needed = record.urgent
        if record.later is not None:
            (record.need_bytes, record.context_length), record.later = record.later, None
            record.learned_bytes = 0
        if cause is None:
            cause = "worker_died"
            self._mourn(record, event.error, was_loading, now)
        elif cause == "unloaded" and not record.wanted:
            record.keep_alive_wish = None  # what requests wished was for this stay in memory
        for request in list(record.running.values()):
            self._lose(record, request, event.error)
        self._book.move(record, cause, now)
        for goal in [g for g in record.goals.values() if g.kind == "unload"]:
            del record.goals[goal.rid], self._book.goals[goal.rid]
            self._book.reach(record, goal)

    def _mourn(self, record: ModelRecord, error: RpcError | None, was_loading: bool, now: float) -> None:
        """A worker died unasked: remember it, and fail what it held."""
        death = error or errors.WorkerDied(f"the worker of {record.id} died", cause="exit")
        record.error = self.last_deaths[record.id] = error_object(death)
        self.deaths[record.id] += 1
        self.breakers.died(record.id, now)
        if record.preload:  # it is loaded again, as soon as its breaker allows
            record.preload_at = max(now, self.breakers.retry_at(record.id) or now)
        if was_loading:
            self._book.fail_all(record, death, now)
            self._book.end_job(record, "failed", now, record.error)

    def _lose(self, record: ModelRecord, request: Request, error: RpcError | None) -> None:
        """A request whose worker is gone: it ends as was already decided, else with the worker's death."""
        self._book.free_slot(record, request)
        death = error or errors.WorkerDied(f"the worker of {record.id} was stopped", cause="stopped")
        self._book.close(request, request.ending or death)

    def adapted(self, event: ev.Adapted, now: float) -> None:
        record = self._book.by_worker.get(event.worker)
        if record is not None and record.adapter != event.adapter and record.lifecycle.state == "Ready":
            record.adapter = event.adapter
            self._book.publish("model_changed", record)

    def prewarmed(self, event: ev.Prewarmed, now: float) -> None:
        record = self._book.by_worker.get(event.worker)
        if record is not None and record.prewarmed != event.turns and record.lifecycle.state == "Ready":
            record.prewarmed = event.turns
            self._book.publish("model_changed", record)

    def memory_report(self, event: ev.MemoryReport, now: float) -> None:
        record = self._book.by_worker.get(event.worker)
        if record is not None and record.lifecycle.state == "Ready":
            record.memory_bytes = event.memory_bytes
            self._book.reshare = True
            self._book.touch(record)
