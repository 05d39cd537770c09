"""The core's books: all state, and the small changes to it that every decision is made of.

Each change keeps the books true in themselves; what follows from it for others is decided in line.py and core.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject

from . import actions as do
from .records import Goal, LoadJob, ModelRecord, Request

ENDED_JOBS_KEPT = 64
JobEnd = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Limits:
    """`budget_bytes` bounds all models together; `queue` all waiting requests; `max_batch` one model's running ones;
    `downloads` all that move bytes at a time, `fetcher_starts` how often a fetcher that dies is started anew for one
    download: after `fetcher_backoff_s`, doubled each time."""

    budget_bytes: int
    queue: int = 512
    max_batch: int = 32
    keep_alive_s: float = 300.0
    downloads: int = 2
    fetcher_starts: int = 3
    fetcher_backoff_s: float = 1.0


class Book:
    """All models, requests, goals and load jobs; and `out`, the actions that the event at hand has led to so far.

    `touched` are the models whose circumstances changed with that event; `pending` those that wait to load, oldest
    first; `by_worker` those that have a worker; `seq` numbers accepted requests.
    """

    def __init__(self, limits: Limits, wall: float, job_prefix: str) -> None:
        self.limits = limits
        self.wall = wall
        self.models: dict[str, ModelRecord] = {}
        self.requests: dict[int, Request] = {}
        self.goals: dict[int, str] = {}  # rid → model
        self.jobs: dict[str, LoadJob] = {}
        self.pending: dict[str, None] = {}
        self.by_worker: dict[int, ModelRecord] = {}
        self.touched: dict[str, None] = {}
        self.out: list[do.Action] = []
        self.seq = 0
        self._job_prefix = job_prefix
        self._jobs_made = 0
        self._ended_jobs: deque[str] = deque()

    # --- models ---------------------------------------------------------------------------------------------------

    def move(self, record: ModelRecord, cause: str, now: float) -> None:
        transition = record.lifecycle.apply(cause, now)
        error = record.error if transition.event in ("error", "worker_died") else None
        self.publish(transition.event, record, error=error)

    def publish(
        self, name: str, record: ModelRecord, *, progress: float | None = None, error: ErrorObject | None = None
    ) -> None:
        view = record.view(self.wall)
        self.touch(record)
        self.out.append(do.Publish(name, model_id=record.id, model=view, progress=progress, error=error))

    def forget(self, record: ModelRecord) -> None:
        """Drop a model that is gone from the disk, and that nobody uses or waits for."""
        del self.models[record.id]
        self.touched.pop(record.id, None)

    def touch(self, record: ModelRecord) -> None:
        self.touched[record.id] = None

    def used(self, record: ModelRecord, now: float) -> None:
        record.last_used = now
        self.touch(record)
        if record.idle_since is not None:
            record.idle_since = now

    def rested(self, record: ModelRecord, now: float) -> None:
        """Start the idle timer where nothing runs or waits any more."""
        self.touch(record)
        if record.serving and not record.running and not record.queue and record.idle_since is None:
            record.idle_since = now

    # --- requests and goals ---------------------------------------------------------------------------------------

    def reach(self, record: ModelRecord, goal: Goal) -> None:
        """A goal's model stands as wished: grant the lease, if one was asked for, and answer."""
        if goal.lease is not None:
            record.leases[goal.lease] = goal.client
            record.last_seq = None  # whoever counted on its going must plan anew
        self.touch(record)
        self.out.append(do.Answer(goal.rid, record.view(self.wall)))

    def free_slot(self, record: ModelRecord, request: Request) -> None:
        del record.running[request.rid]
        record.running_by_client[request.client] -= 1
        if not record.running_by_client[request.client]:
            del record.running_by_client[request.client]
        self.touch(record)

    def end(self, request: Request, error: RpcError, now: float) -> None:
        """Seal a request's fate: at once where it waits, by way of its worker where it runs."""
        record = self.models[request.model]
        if request.rid not in record.running:
            record.queue.remove(request)
            self.close(request, error)
            self.rested(record, now)
        elif request.ending is None:
            request.ending = error
            assert record.worker is not None
            self.out.append(do.CancelOnWorker(request.rid, record.worker))

    def close(self, request: Request, error: RpcError | None) -> None:
        """The last word on a request: the worker's answer, or an error."""
        del self.requests[request.rid]
        if request.started_at is not None:  # before the last word, since the runtime forgets the request with it
            self.out.append(do.Publish("generation_finished", model_id=request.model, rid=request.rid))
        self.out.append(do.Deliver(request.rid) if error is None else do.Fail(request.rid, error))

    def fail(self, rid: int, error: RpcError) -> None:
        self.out.append(do.Fail(rid, error))

    def fail_all(self, record: ModelRecord, error: RpcError, now: float) -> None:
        """Fail whatever waits for the model; what runs is its worker's to answer."""
        for request in list(record.queue):
            self.end(request, error, now)
        for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
            del record.goals[goal.rid], self.goals[goal.rid]
            self.fail(goal.rid, error)
        self.touch(record)

    # --- load jobs ------------------------------------------------------------------------------------------------

    def new_job(self, record: ModelRecord, now: float) -> LoadJob:
        """Open a load job; it waits in line."""
        self._jobs_made += 1
        wanted = any(g.kind == "ensure" for g in record.goals.values())
        job = LoadJob(f"{self._job_prefix}-{self._jobs_made}", record.id, wanted, now)
        record.job = self.jobs[job.job] = job
        self.publish_job(job)
        return job

    def publish_job(self, job: LoadJob) -> None:
        self.out.append(do.Publish("job", job=job.view(self.wall)))

    def end_job(self, record: ModelRecord, state: JobEnd, now: float, error: ErrorObject | None = None) -> None:
        job, record.job = record.job, None
        if job is None:
            return
        job.state, job.ended_at, job.error = state, now, error
        if state == "done":
            job.progress = 1.0
        self.publish_job(job)
        self._ended_jobs.append(job.job)
        if len(self._ended_jobs) > ENDED_JOBS_KEPT:
            del self.jobs[self._ended_jobs.popleft()]


def error_object(error: RpcError) -> ErrorObject:
    return ErrorObject(kind=error.kind, message=error.message, details=error.details)
