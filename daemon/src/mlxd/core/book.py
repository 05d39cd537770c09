"""The core's books: all state, and the small changes to it that every decision is made of.

Each change keeps the books true in themselves; what follows from it for others is decided by those who make it.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from mlxd_client.errors import ModelBusy, RpcError
from mlxd_client.types import ErrorObject

from . import actions as do
from .events import Found
from .jobs import BatchJob, DownloadJob, Fetcher, LoadJob
from .lifecycle import Lifecycle
from .limits import Limits, Rules
from .records import Goal, ModelRecord, Request

ENDED_JOBS_KEPT = 64
# Models whose download came to nothing are remembered, so that people see why; this many, and so long at least.
REMAINS_KEPT = 64
REMAINS_S = 600.0
JobEnd = Literal["done", "failed", "cancelled"]
# In `by_worker`, what another daemon holds on this machine: a model that is about to go, and not among `models`.
ELSEWHERE = 0


class Book:
    """All models, requests, goals and jobs; and `out`, the actions that the event at hand has led to so far.

    `touched` are the models whose circumstances changed with that event; `pending` those that wait to load, oldest
    first; `by_worker` those that have a worker; `seq` numbers accepted requests.

    `downloads` are the open downloads by model, `by_fetcher` the processes that fetch; `deleting` the models that are
    about to go, and whether DeleteFiles was said; `outdated` those that old revisions lie beside. `remains` are the
    models that are not here and that nothing happens to, with the time since which. `overhang` is how many requests
    waited and how many fetchers there were when the limits changed last: no more may come, but none has to go.
    """

    def __init__(self, limits: Limits, wall: float, job_prefix: str) -> None:
        self.limits = limits
        self.rules = Rules()
        self.overhang = (0, 0)
        self.wall = wall
        self.models: dict[str, ModelRecord] = {}
        self.requests: dict[int, Request] = {}
        self.goals: dict[int, str] = {}  # rid → model
        self.jobs: dict[str, LoadJob | DownloadJob | BatchJob] = {}
        self.pending: dict[str, None] = {}
        self.by_worker: dict[int, ModelRecord] = {}
        self.downloads: dict[str, DownloadJob] = {}
        self.by_fetcher: dict[int, Fetcher] = {}
        self.deleting: dict[str, bool] = {}
        self.outdated: dict[str, None] = {}
        self.remains: dict[str, float] = {}
        self.draining = False
        self.moved = False  # another daemon has taken over
        self.touched: dict[str, None] = {}
        self.out: list[do.Action] = []
        self.reshare = False  # what workers may take has to be said anew
        self.seq = 0
        self._job_prefix = job_prefix
        self._loads_made = 0
        self._downloads_made = 0
        self._ended_jobs: deque[str] = deque()

    # --- models ---------------------------------------------------------------------------------------------------

    def new_model(self, model: str, source: Literal["builtin", "hub", "path"] = "hub") -> ModelRecord:
        """A record of a model that nothing is known of yet."""
        record = self.models[model] = ModelRecord(model, source, Lifecycle(model), 0)
        self.apply_rules(record)
        return record

    def apply_rules(self, record: ModelRecord) -> bool:
        """Take over what the settings say of a model. Returns whether its view shows something new."""
        rules = self.rules
        before = (record.pinned, record.preload)
        record.pinned, record.preload = record.id in rules.pinned, record.id in rules.preload
        record.default_keep_alive_s = rules.keep_alive_s.get(record.id, self.limits.keep_alive_s)
        return before != (record.pinned, record.preload)

    def learn(self, record: ModelRecord, found: Found) -> bool:
        """Take over what the disk says. Returns whether it is news.

        What a worker was started with is left as it is until that worker is gone: the budget counts with it.
        """
        needs = (found.need_bytes, found.context_length)
        facts = (found.source, found.revision, found.size_bytes, found.kind)
        known = (record.source, record.revision, record.size_bytes, record.kind)
        news = facts != known or (record.need_bytes, record.context_length) != needs
        record.source, record.revision, record.size_bytes, record.kind = facts
        if record.worker is None:
            if needs[0] != record.need_bytes:
                record.learned_bytes = 0
            record.need_bytes, record.context_length = needs
        else:
            record.later = needs
        if record.latest_revision == record.revision:
            record.latest_revision = None
        return news

    def move(self, record: ModelRecord, cause: str, now: float) -> None:
        transition = record.lifecycle.apply(cause, now)
        error = record.error if transition.event in ("error", "worker_died") else None
        self.publish(transition.event, record, error=error)

    def publish(
        self, name: str, record: ModelRecord, *, progress: float | None = None, error: ErrorObject | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        view = record.view(self.wall)
        self.touch(record)
        self.out.append(
            do.Publish(name, model_id=record.id, model=view, progress=progress, error=error, details=details)
        )

    def forget(self, record: ModelRecord) -> None:
        """Drop a model that is gone from the disk, and that nobody uses or waits for."""
        del self.models[record.id]
        self.touched.pop(record.id, None)
        self.outdated.pop(record.id, None)
        self.remains.pop(record.id, None)

    def remain(self, record: ModelRecord, now: float) -> None:
        """Remember a model that is not here; the one that has been so for longest may have to make room."""
        if record.deleting:
            return
        self.remains.pop(record.id, None)
        self.remains[record.id] = now
        if len(self.remains) > REMAINS_KEPT:
            oldest = (self.models[name] for name in self.remains)
            gone = next((m for m in oldest if m.fetcher is None and m is not record), None)
            if gone is not None:
                self.lose(gone)

    def lose(self, record: ModelRecord) -> None:
        """Forget a model that is not here, and say so."""
        self.publish("model_lost", record)
        self.forget(record)

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

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return sum(len(m.queue) for m in self.models.values())

    def reach(self, record: ModelRecord, goal: Goal) -> None:
        """A goal's model stands as wished: grant the lease, if one was asked for, and answer."""
        if goal.lease is not None:
            record.leases[goal.lease] = goal.client
            if goal.asking:
                record.asking.add(goal.lease)
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

    def step_aside(self, record: ModelRecord, now: float, most: int | None = None) -> None:
        """End requests of a model that yield, latest first; with `most`, only so many, of those that run."""
        running = [r for r in record.running.values() if r.yields and r.ending is None]
        for request in running[::-1][:most]:
            self.end(request, stepped_aside(record.id), now)
        if most is None:
            for request in [r for r in record.queue if r.yields]:
                self.end(request, stepped_aside(record.id), now)

    def fail(self, rid: int, error: RpcError) -> None:
        self.out.append(do.Fail(rid, error))

    def fail_all(self, record: ModelRecord, error: RpcError, now: float) -> None:
        """Fail whatever waits for the model; what runs is its worker's to answer."""
        for request in list(record.queue):
            self.end(request, error, now)
        for goal in [g for g in record.goals.values() if g.kind == "ensure"]:
            del record.goals[goal.rid], self.goals[goal.rid]
            self.fail(goal.rid, error)
        record.preloading = False
        self.touch(record)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def new_job(self, record: ModelRecord, now: float) -> LoadJob:
        """Open a load job; it waits in line."""
        self._loads_made += 1
        wanted = any(g.kind == "ensure" for g in record.goals.values())
        job = LoadJob(f"{self._job_prefix}-{self._loads_made}", record.id, wanted, now)
        record.job = self.jobs[job.job] = job
        self.publish_job(job)
        return job

    def new_download_id(self) -> str:
        """An id like those of load jobs: `download-`, what makes it unique across runs, and a number."""
        self._downloads_made += 1
        run = self._job_prefix.partition("-")[2]
        return "-".join(part for part in ("download", run, str(self._downloads_made)) if part)

    def publish_job(self, job: LoadJob | DownloadJob) -> None:
        self.out.append(do.Publish("job", job=job.view(self.wall)))

    def end_job(self, record: ModelRecord, state: JobEnd, now: float, error: ErrorObject | None = None) -> None:
        """End the model's load job, if it has one."""
        job, record.job = record.job, None
        if job is None:
            return
        if state == "done":
            job.progress = 1.0
        self.close_job(job, state, now, error)

    def close_job(
        self, job: LoadJob | DownloadJob, state: JobEnd, now: float, error: ErrorObject | None = None
    ) -> None:
        """The last word on a job. The last few stay on the books for those who ask later."""
        job.state, job.ended_at, job.error = state, now, error
        self.publish_job(job)
        self._ended_jobs.append(job.job)
        if len(self._ended_jobs) > ENDED_JOBS_KEPT:
            del self.jobs[self._ended_jobs.popleft()]


def stepped_aside(model: str) -> RpcError:
    return ModelBusy(f"this stepped aside for others that use {model}, or need its room", model=model, yielded=True)


def in_use(model: str, uses: dict[str, int]) -> RpcError:
    return ModelBusy(f"{model} is in use: {counted(uses)}", model=model, **uses)


def counted(uses: dict[str, int]) -> str:
    """What there is any of, for people: `2 requests, 1 lease`."""
    return ", ".join(f"{n} {name.removesuffix('s') if n == 1 else name}" for name, n in uses.items() if n)


def error_object(error: RpcError) -> ErrorObject:
    return ErrorObject(kind=error.kind, message=error.message, details=error.details)
