"""The only loop between the core and the world: whatever happens becomes an event, whatever the core wants is done.

Decides nothing. Holds what the core must not know: futures, sinks, workers' links, timers, the wall clock.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import psutil

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from . import __version__, texts
from . import childwire as wire
from .children.death import Death
from .children.interface import ChildSpec
from .children.supervisor import Supervisor
from .core import actions as do
from .core import events as ev
from .core.core import Core, Limits
from .fetchers import Fetchers
from .generation import (
    Generation,
    characters,
    check_tools,
    completion,
    count_params,
    refuse_unsupported,
    with_text,
    worker_params,
)
from .library import Library, draft_bytes
from .prompts import Prompts, ask
from .server.events import EventLog
from .workers import Attached, WorkerLink

if TYPE_CHECKING:
    from .server.limits import ServerLimits
    from .server.runtime_api import Log, Sink
    from .settings import Settings
    from .store import Found, Store

# What a request says that wants the model without the adapter that it was loaded with.
NO_ADAPTER = "none"

T = TypeVar("T")


class Runtime:
    """One daemon's state and children, as the server's methods see them.

    Args:
        settings: see settings.py.
        store: finds models on disk.
        supervisor: starts and watches children.
        log: a structlog logger.
    """

    version = __version__

    def __init__(
        self,
        settings: Settings,
        store: Store,
        supervisor: Supervisor,
        log: Log,
        *,
        limits: ServerLimits,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self.epoch = secrets.token_hex(8)
        self.on_shutdown: Callable[[], None] = lambda: None
        self.on_settled: Callable[[], None] = lambda: None  # all that followed from an event is done
        self._settings = settings
        self._supervisor = supervisor
        self._log = log
        self._started_at = loop.time()
        self._process = psutil.Process()
        bounds = Limits(
            budget_bytes=settings.memory_budget_bytes,
            queue=settings.queue_limit,
            max_batch=settings.max_batch,
            keep_alive_s=settings.keep_alive_s,
            downloads=settings.downloads,
        )
        self.core = Core(bounds, wall=time.time() - loop.time(), job_prefix=f"load-{self.epoch[:6]}")
        fetchers = Fetchers(supervisor, settings.fetcher_command)
        self._library = Library(settings, store, fetchers, self.core, self.tell, log, loop)
        self._downloads = downloads = self._library.downloads
        self.events = EventLog(self.epoch, self.core.snapshot, limits=limits)
        self._rids = itertools.count(1)
        self._leases = itertools.count(1)
        self._open: dict[int, Generation] = {}
        self._goals: dict[int, asyncio.Future[Any]] = {}
        self._job_waiters: dict[str, list[asyncio.Future[types.Job]]] = {}
        self._watchers: dict[str, list[Callable[[float | None], None]]] = {}  # of downloads that requests wait for
        self._links: dict[int, WorkerLink] = {}
        self._prompts = Prompts(settings, self._links.values, log, loop)
        self._memory: dict[int, int] = {}  # by worker, as last told to the core
        self._resolving: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._due: float | None = None
        self._quiet: asyncio.Event = asyncio.Event()
        self._inbox: list[ev.Event] = []
        self._performing = False
        self._perform: dict[type, Callable[[Any], None]] = {
            do.StartWorker: self._start_worker, do.StopWorker: self._stop_worker, do.Dispatch: self._dispatch,
            do.CancelOnWorker: self._cancel_on_worker, do.Deliver: self._deliver, do.Answer: self._answer,
            do.Fail: self._fail, do.Publish: self._publish, do.StartFetcher: downloads.start,
            do.StopFetcher: downloads.stop, do.DeleteFiles: self._delete_files, do.DiscardPartial: downloads.discard,
            do.Prune: self._prune, do.Started: lambda action: self._reached(action.rid, action.job),
            do.Deleted: lambda action: self._reached(action.rid, action.freed_bytes),
        }  # fmt: skip

    # --- the loop: event → core → actions -------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """Give the core an event and do what it wants. What performing brings about comes after it, in order."""
        self._inbox.append(event)
        if self._performing:
            return
        self._performing = True
        try:
            while self._inbox:
                for action in self.core.handle(self._inbox.pop(0), self.loop.time()):
                    self._do(action)
        finally:
            self._performing = False
        self._set_timer()
        if self.core.draining and self.core.quiet:
            self._quiet.set()
        self.on_settled()

    def _do(self, action: do.Action) -> None:
        try:
            self._perform[type(action)](action)
        except Exception as error:  # a bug in one caller's sink; the other actions concern other callers
            self._log.error("an action failed", action=type(action).__name__, exc_info=error)

    def _set_timer(self) -> None:
        due = self.core.next_deadline()
        if self._timer is not None:
            if due == self._due:
                return
            self._timer.cancel()
        # What is due at once is no timer to uvloop, and could not be asked when it is due.
        self._due = due
        self._timer = None if due is None else self.loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tell(ev.Tick())

    # --- performing -----------------------------------------------------------------------------------------------

    def _start_worker(self, action: do.StartWorker) -> None:
        settings = self._settings
        draft = self._library.drafts.get(action.model)
        load = wire.LoadModel(
            model=action.model, path=self._library.paths[action.model], max_batch=settings.max_batch,
            cache_bytes=settings.prompt_cache_bytes, disk_cache=str(self._prompts.root),
            disk_cache_bytes=self._prompts.budget_bytes,
            kv_bits=settings.kv_bits.get(action.model, 0),
            kv_bytes=self._kv_bytes(action.model, self.core.shares()[action.worker]),
            draft=None if draft is None else wire.Attach(draft=draft.model, path=draft.path),
            context_length=settings.context_length.get(action.model, 0),
        )  # fmt: skip
        link = WorkerLink(action.worker, load, self, load_s=settings.load_s)
        self._links[action.worker] = link
        environment = {"MLXD_BLAS": settings.blas}
        spec = ChildSpec(kind="worker", name=action.model, argv=settings.worker_command, env=environment)
        link.child = self._supervisor.spawn(spec, link)
        self._log.info("loading", model=action.model, worker=action.worker, pid=link.child.pid)
        self._share_memory()

    def _kv_bytes(self, model: str, share: int) -> int:
        """What a worker's KV caches may hold, given what it may take beyond what its model needs; 0 is no bound."""
        reserved = self._library.kv_bytes.get(model, 0)
        return reserved + share if reserved else 0

    def _share_memory(self) -> None:
        """Tell the workers what their KV caches may hold, now that others came, went, or take more or less."""
        for worker, share in self.core.shares().items():
            link = self._links.get(worker)
            if link is not None and (allowed := self._kv_bytes(link.model, share)):
                link.allow(allowed)

    def _stop_worker(self, action: do.StopWorker) -> None:
        child = self._links[action.worker].child
        assert child is not None
        child.stop()

    def _delete_files(self, action: do.DeleteFiles) -> None:
        self._downloads.delete(action)
        self._prompts.forget(action.model)

    def _prune(self, action: do.Prune) -> None:
        """Unless workers have it as an adapter, for which the core keeps no books: then the next daemon does it."""
        if not self._adapts(action.model):
            self._downloads.prune(action)

    def _adapts(self, model: str) -> int:
        """How many workers and open requests have this for an adapter."""
        users = [link.adapter for link in self._links.values()] + [each.adapter for each in self._open.values()]
        return sum(user is not None and user.id == model for user in users)

    def _dispatch(self, action: do.Dispatch) -> None:
        request = self._open[action.rid]
        link = self._links[action.worker]
        request.dispatched_at = time.monotonic()
        request.ready_at = link.ready_at or 0.0
        try:
            if request.params.adapter is UNSET:
                request.adapter = link.adapter
            link.generate(request.rid, worker_params(request.kind, request.params, request.adapter))
        except Exception as error:  # a bug; the caller must hear of it all the same
            self._log.error("handing a request over failed", request=request.sink.request_name, exc_info=error)
            request.outcome = errors.InternalError(f"the request could not be handed over: {type(error).__name__}")
            self.tell(ev.Done(action.rid))

    def _cancel_on_worker(self, action: do.CancelOnWorker) -> None:
        self._links[action.worker].cancel(action.rid)

    def _deliver(self, action: do.Deliver) -> None:
        request = self._open.pop(action.rid)
        outcome = request.outcome
        if isinstance(outcome, wire.Generated) and outcome.finish_reason != "cancelled":
            self._finished(request, outcome.finish_reason)
            request.sink.done(completion(request, outcome))
        else:
            error = outcome if isinstance(outcome, errors.RpcError) else errors.Cancelled("the request was cancelled")
            self._refused(request, with_text(error, outcome))

    def _answer(self, action: do.Answer) -> None:
        self._reached(action.rid, action.model)

    def _reached(self, rid: int, answer: Any) -> None:
        waiter = self._goals.pop(rid, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _fail(self, action: do.Fail) -> None:
        request = self._open.pop(action.rid, None)
        if request is not None:
            self._refused(request, with_text(action.error, request.outcome))
            return
        waiter = self._goals.pop(action.rid, None)
        if waiter is not None and not waiter.done():
            waiter.set_exception(action.error)

    def _refused(self, request: Generation, error: errors.RpcError) -> None:
        self._finished(request, error.kind)
        request.sink.fail(error)

    def _finished(self, request: Generation, how: str) -> None:
        took = round(time.monotonic() - request.accepted_at, 4)
        self._log.info("request ended", request=request.sink.request_name, how=how, took_s=took)

    def _publish(self, action: do.Publish) -> None:
        request = self._open.get(action.rid) if action.rid is not None else None
        self.events.publish(
            action.name, model_id=action.model_id, model=action.model, job=action.job, progress=action.progress,
            error=action.error, request=None if request is None else request.sink.request_name,
        )  # fmt: skip
        if action.job is not None and action.job.kind == "download":
            self._downloads.remember(action.job)
            for waiting in self._watchers.get(action.job.job, ()):
                waiting(action.job.progress)
        if action.job is not None and action.job.ended_at is not None:
            for waiter in self._job_waiters.pop(action.job.job, ()):
                if not waiter.done():
                    waiter.set_result(action.job)
        if action.name in ("loading_started", "loading_progress", "loading_queued"):
            assert action.model_id is not None
            for queued in self.core.models[action.model_id].queue:
                self._open[queued.rid].sink.phase("loading", action.progress)

    # --- what workers report --------------------------------------------------------------------------------------

    def worker_progress(self, worker: int, progress: float) -> None:
        self.tell(ev.LoadProgress(worker, progress))

    def worker_loaded(self, worker: int, loaded: wire.Loaded) -> None:
        self._links[worker].ready_at = time.monotonic()
        self._log.info("loaded", worker=worker, load_s=round(loaded.load_s, 3), memory_bytes=loaded.memory_bytes)
        self.tell(ev.Loaded(worker, loaded.memory_bytes, loaded.context_length, self._draft_of(worker, loaded)))
        self._share_memory()

    def _draft_of(self, worker: int, loaded: wire.Loaded) -> str | None:
        """The draft model that was loaded with a worker's model."""
        link = self._links[worker]
        if link.draft is not None and loaded.no_draft is not None:
            self._log.warning("no draft model", model=link.model, draft=link.draft, reason=loaded.no_draft)
            return None
        return link.draft

    def worker_load_failed(self, worker: int, error: errors.RpcError) -> None:
        self._log.warning("load failed", worker=worker, kind=error.kind, reason=error.message)
        self.tell(ev.LoadFailed(worker, error))

    def worker_piece(self, rid: int, text: str, reasoning: str, index: int = 0) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.sink.piece(text, reasoning, index)

    def worker_calls(self, rid: int, calls: list[types.ToolCall], malformed: list[types.MalformedToolCall]) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.sink.calls(calls, malformed)

    def worker_answered(self, rid: int, outcome: wire.Generated | errors.RpcError) -> None:
        request = self._open.get(rid)
        if request is not None:
            request.outcome = outcome
            self.tell(ev.Done(rid))

    def worker_memory(self, worker: int, memory_bytes: int) -> None:
        """Changes below a MiB are noise: they would make an event a second."""
        known = self._memory.get(worker, 0)
        if abs(known - memory_bytes) >= 1024 * 1024:
            self._memory[worker] = memory_bytes
            self.tell(ev.MemoryReport(worker, memory_bytes))
            self._share_memory()

    def worker_cache_failed(self, worker: int, failures: int) -> None:
        model = self._links[worker].model
        self._log.warning("files of the prompt cache could not be read or written", model=model, failures=failures)

    def worker_exited(self, worker: int, death: Death) -> None:
        link = self._links.pop(worker)
        self._memory.pop(worker, None)
        log = self._log.info if death.expected else self._log.error
        log("worker ended", model=link.model, worker=worker, cause=death.cause, told=death.describe())
        self.tell(ev.WorkerExited(worker, None if death.expected else death.to_error()))
        self._share_memory()

    # --- models ---------------------------------------------------------------------------------------------------

    async def scan(self) -> None:
        """Tell the core what the disk holds now."""
        await self._library.scan()

    async def begin(self) -> None:
        """Learn what is there, and go on with what an earlier daemon had begun."""
        self._prompts.begin()
        left = await self._downloads.begin()
        await self.scan()
        for one in left:
            self._log.info("going on with a download", model=one.model, job=one.job)
            rid = next(self._rids)
            self.tell(ev.Download(rid, 0, one.model, repair=one.repair, job=one.job, started_at=one.started_at))

    async def models(self, *, updates: bool = False) -> list[types.Model]:
        await self.scan()
        if updates:
            await self._library.look_for_updates()
        return self.core.snapshot().models

    async def model(self, ref: str) -> types.Model:
        try:
            return self.core.view(await self._library.resolve(ref))
        except errors.ModelNotFound:
            named = self._hub_model(ref)
            if named is None or named not in self.core.models:
                raise
            return self.core.view(named)  # it is on its way, or was

    async def load(self, client: int, params: types.LoadParams) -> types.Model:
        adapter = None if params.adapter is UNSET else await self._adapter(params.adapter)
        if params.system is not UNSET and not self._settings.prompt_cache_bytes:
            raise errors.Unsupported("no prompts are kept, by the setting `prompt_cache_bytes`", option="system")
        model = await self._have(params.model)
        keep_alive = None if params.keep_alive is UNSET else params.keep_alive
        draft = None if params.draft_model is UNSET else await self._have_draft(params.draft_model, model)
        room = 0 if draft is None else draft_bytes(draft)
        # It cannot go before all that was asked for is there.
        lease = None if params.adapter is UNSET and params.system is UNSET else self._new_lease()
        try:
            view: types.Model = await self._reach(
                lambda rid: ev.Ensure(rid, client, model, lease=lease, keep_alive_s=keep_alive, draft_bytes=room)
            )
            if draft is not None:
                view = await self._attach(client, model, draft)
            if lease is None:
                return view
            if params.adapter is not UNSET:
                adapted: asyncio.Future[Any] = self.loop.create_future()
                self._link(model).adapt(adapter, lambda answer: settle(adapted, answer))
                await adapted
            if params.system is not UNSET:
                link = self._link(model)
                path = None if link.adapter is None else link.adapter.path
                await ask(link, "prewarm", wire.Prewarm(system=params.system, adapter=path), len(params.system))
        finally:
            if lease is not None:
                self.tell(ev.Release(client, lease))
        return self.core.view(model)

    async def _have_draft(self, ref: str, model: str) -> Found:
        """The draft model that `ref` names. Raises what `_have` does, and InvalidParams for what is none."""
        try:
            draft = await self._have(ref)
            if draft != model:
                found = await self._library.find(draft)
                if found.kind == "adapter":
                    raise errors.ModelInvalid("it is an adapter", model=draft)
                return found
        except errors.ModelInvalid as error:
            told = f"{ref} cannot be a draft model: {error.message}"
            raise errors.InvalidParams(told, **error.details | {"field": "draft_model"}) from None
        except errors.ModelNotFound as error:
            error.details["field"] = "draft_model"
            raise
        raise errors.InvalidParams("a model is no draft model of itself: it would only be slower", field="draft_model")

    async def _attach(self, client: int, model: str, draft: Found) -> types.Model:
        """Have a draft model guess for a model that is Ready."""
        worker = self.core.models[model].worker
        if worker is None:
            raise errors.WorkerDied("the model was unloaded meanwhile", cause="stopped", model=model)
        await self._reach(lambda rid: ev.Attach(rid, client, worker, draft_bytes(draft)))
        attached: asyncio.Future[wire.Attached] = self.loop.create_future()
        self._attach_now(worker, draft, lambda answer: settle(attached, answer))
        await attached
        return self.core.view(model)

    def _attach_now(self, worker: int, draft: Found, answer: Attached) -> None:
        """Tell a worker to load a draft model, for which there is room. The core hears what has become of it."""
        link = self._links.get(worker)
        if link is None:
            answer(errors.WorkerDied("the model was unloaded meanwhile", cause="stopped"))
            return

        def attached(outcome: wire.Attached | errors.RpcError) -> None:
            if isinstance(outcome, errors.RpcError):
                self._log.warning("no draft model", model=link.model, draft=draft.model, reason=outcome.message)
                self.tell(ev.Attached(worker, None, draft_bytes(draft)))
            else:
                self._log.info("draft model attached", model=link.model, draft=draft.model)
                self.tell(ev.Attached(worker, draft.model, draft_bytes(draft)))
                self.worker_memory(worker, outcome.memory_bytes)
            answer(outcome)

        link.attach(wire.Attach(draft=draft.model, path=draft.path), attached)

    async def _adapter(self, ref: str, waiting: Callable[[float | None], None] | None = None) -> wire.Adapter | None:
        """The adapter that `ref` names, fetched first where the settings allow that, as `_have` does with models."""
        if ref == NO_ADAPTER:
            return None
        try:
            found = await self._bring(ref, self._library.adapter, "adapter", waiting)
        except (errors.ModelNotFound, errors.ModelNotDownloaded) as error:
            error.details["field"] = "adapter"
            raise
        return wire.Adapter(id=found.adapter, path=found.path)

    def _new_lease(self) -> str:
        return f"{self.epoch[:6]}-{next(self._leases)}"

    def _link(self, model: str) -> WorkerLink:
        """The worker of a model that is Ready."""
        worker = self.core.models[model].worker
        link = None if worker is None else self._links.get(worker)
        if link is None:
            raise errors.WorkerDied("the model's worker went away", cause="exit")
        return link

    async def unload(self, ref: str) -> types.Model:
        model = await self._library.resolve(ref)
        view: types.Model = await self._reach(lambda rid: ev.Unload(rid, 0, model))
        return view

    async def acquire(self, client: int, ref: str, *, keep_alive_s: float | None = None) -> types.Lease:
        model = await self._have(ref)
        lease = self._new_lease()
        try:
            view = await self._reach(lambda rid: ev.Ensure(rid, client, model, lease=lease, keep_alive_s=keep_alive_s))
        except asyncio.CancelledError:
            self.tell(ev.Release(client, lease))
            raise
        return types.Lease(lease=lease, model=view)

    def release(self, client: int, lease: str) -> None:
        if not any(m.leases.get(lease) == client for m in self.core.models.values()):
            raise errors.NotFound("this connection holds no such lease", lease=lease)
        self.tell(ev.Release(client, lease))

    async def _reach(self, goal: Callable[[int], ev.Event]) -> Any:
        """Tell the core a goal and wait for it; whoever stops waiting gives it up."""
        rid = next(self._rids)
        waiter: asyncio.Future[Any] = self.loop.create_future()
        self._goals[rid] = waiter
        self.tell(goal(rid))
        try:
            return await waiter
        except asyncio.CancelledError:
            self.tell(ev.Cancel(rid))
            raise

    # --- the hub and the disk -------------------------------------------------------------------------------------

    async def plan(self, params: types.PlanParams) -> types.Plan:
        return await self._library.plan(params)

    async def download(self, client: int, params: types.DownloadParams) -> str:
        revision = None if params.revision is UNSET else params.revision
        model = self._downloads.model_of(params.model, revision)
        if self._settings.download == "never":
            raise errors.Unsupported("downloads are turned off by the setting `download`", option="download")
        return await self._start_download(client, model, repair=params.repair)

    async def _start_download(self, client: int, model: str, *, repair: bool = False) -> str:
        job: str = await self._reach(lambda rid: ev.Download(rid, client, model, repair=repair))
        if repair:
            self._downloads.records.repair(job)
        return job

    async def delete(self, client: int, ref: str) -> int:
        model = self._downloads.model_of(ref)
        if model not in self.core.models and not await self._library.on_disk(model):
            raise errors.ModelNotFound(f"there is no model {model} on this machine", model=model)
        if users := self._adapts(model):
            raise errors.ModelBusy(f"{model} is in use: {users} as adapter", model=model, adapting=users)
        freed: int = await self._reach(lambda rid: ev.Delete(rid, client, model))
        return freed

    async def verify(self, ref: str) -> types.VerifyResult:
        named = self._hub_model(ref)
        record = self.core.models.get(named) if named is not None else None
        if record is not None and record.lifecycle.state == "Downloading":
            raise errors.ModelBusy(f"{record.id} is being downloaded", model=record.id)
        return await self._library.verify(ref)

    async def catalog(self) -> types.CatalogResult:
        await self.scan()
        return await self._library.catalog()

    def _hub_model(self, ref: str) -> str | None:
        """The id of the model of the hub that `ref` may name."""
        try:
            return self._downloads.model_of(ref)
        except errors.RpcError:
            return None

    async def _have(self, ref: str, waiting: Callable[[float | None], None] | None = None) -> str:
        """The id of the model that `ref` names, fetched first where the settings allow that.

        Args:
            waiting: told how far the download is, 0 to 1.

        Raises:
            ModelNotFound, ModelInvalid: there is none, here or on the hub.
            ModelNotDownloaded: the hub has it, and fetching it is for the caller to ask for.
            RpcError: why it could not be fetched.
        """
        return await self._bring(ref, self._library.resolve, "model", waiting)

    async def _bring(
        self, ref: str, look: Callable[[str], Awaitable[T]], kind: Literal["model", "adapter"],
        waiting: Callable[[float | None], None] | None,
    ) -> T:  # fmt: skip
        """What `look` finds on disk, fetched first if need be. Raises as `_have`."""
        try:
            return await look(ref)
        except errors.ModelNotFound as error:
            model = self._hub_model(ref)
            if model is None or "/" not in model or self._settings.download == "never":
                raise
            record = self.core.models.get(model)
            under_way = record is not None and record.lifecycle.state == "Downloading"
            if self._downloads.fetchers.offline and not under_way:
                raise
            if self._settings.download == "ask":
                raise await self._not_downloaded(model, error, kind) from None
            if kind == "adapter" and (await self._library.plan_download(model)).kind == "model":
                raise  # gigabytes that are no adapter
        job = await self._start_download(0, model)
        await self._watch_job(job, waiting)
        return await look(ref)

    async def _not_downloaded(
        self, model: str, otherwise: errors.ModelNotFound, kind: Literal["model", "adapter"]
    ) -> errors.RpcError:
        """The refusal of a request for what the hub has, with what fetching it would take."""
        try:
            plan = await self._library.plan_download(model)
        except errors.ModelNotFound:
            return otherwise
        except errors.QueueFull as error:
            return error
        except errors.RpcError as error:
            return errors.ModelNotFound(f"{otherwise.message}, and the hub was no help: {error.message}", model=model)
        if kind != plan.kind:
            told = f"{model} is an adapter: name it as `adapter`, beside the model that it was made for"
            return otherwise if kind == "adapter" else errors.ModelInvalid(told, model=model)
        told = f"{model} is not on this machine, but the hub has it"
        return errors.ModelNotDownloaded(told, model=model, plan=msgspec.to_builtins(plan))

    async def _watch_job(self, job: str, waiting: Callable[[float | None], None] | None) -> None:
        """Wait for a download. Raises what it failed with."""
        if waiting is not None:
            self._watchers.setdefault(job, []).append(waiting)
        try:
            ended = await self.wait_job(job)
        finally:
            if waiting is not None:
                self._watchers[job].remove(waiting)
                if not self._watchers[job]:
                    del self._watchers[job]
        if ended.state == "cancelled":
            raise errors.Cancelled("the download was cancelled", job=job)
        if ended.error is not None:
            kind = errors.BY_KIND.get(ended.error.kind, errors.DownloadFailed)
            raise kind(ended.error.message, **ended.error.details)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def jobs(self) -> list[types.Job]:
        return [job.view(self.core.wall) for job in self.core.jobs.values()]

    def job(self, job: str) -> types.Job:
        found = self.core.jobs.get(job)
        if found is None:
            raise errors.NotFound("there is no such job", job=job)
        return found.view(self.core.wall)

    async def wait_job(self, job: str) -> types.Job:
        now = self.job(job)
        if now.ended_at is not None:
            return now
        waiter: asyncio.Future[types.Job] = self.loop.create_future()
        waiters = self._job_waiters.setdefault(job, [])
        waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            waiters.remove(waiter)
            raise

    def cancel_job(self, job: str, *, discard: bool = False) -> types.Job:
        self.job(job)
        self.tell(ev.CancelJob(job, discard))
        return self.job(job)

    # --- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        client: int,
        kind: Literal["process", "chat"],
        params: types.ProcessParams | types.ChatParams,
        sink: Sink,
    ) -> Generation:
        """Admit a generation; see runtime_api.py. The disk is asked only where the model is not loaded."""
        refuse_unsupported(params)
        ref = self._settings.default_model if params.model is UNSET else params.model
        request = Generation(self.tell, next(self._rids), client, kind, params, sink)
        self._open[request.rid] = request
        known = self._library.known(ref)
        if known is not None and params.adapter is UNSET:
            self._submit(request, known)
        else:
            task = request.waiting = self.loop.create_task(self._resolve_and_submit(request, ref))
            self._resolving.add(task)
            task.add_done_callback(lambda task: self._resolved(task, request))
        return request

    async def _resolve_and_submit(self, request: Generation, ref: str) -> None:
        limit_s = None if request.params.timeout_s is UNSET else request.params.timeout_s
        patience = asyncio.timeout(limit_s)
        try:
            async with patience:

                def waiting(progress: float | None) -> None:
                    request.sink.phase("downloading", progress)

                if request.params.adapter is not UNSET:
                    request.adapter = await self._adapter(request.params.adapter, waiting)
                model = await self._have(ref, waiting)
        except errors.RpcError as error:
            self._turn_away(request, error)
        except Exception as error:
            if patience.expired():  # a disk may raise TimeoutError, too
                told = f"not done within {limit_s:g} s (still downloading)"
                self._turn_away(request, errors.DeadlineExceeded(told, phase="downloading", timeout_s=limit_s))
                return
            # a bug, or a disk that fails in a new way: the caller must hear of it all the same
            self._log.error("resolving a model failed", request=request.sink.request_name, exc_info=error)
            self._turn_away(request, errors.InternalError(f"the model could not be looked up: {type(error).__name__}"))
        else:
            request.waiting = None
            self._submit(request, model)

    def _resolved(self, task: asyncio.Task[None], request: Generation) -> None:
        self._resolving.discard(task)
        if task.cancelled():  # it may not even have begun
            gave_up = errors.Cancelled("the request was cancelled")
            stopping = errors.ShuttingDown("the daemon stopped before this was done")
            self._turn_away(request, gave_up if request.gave_up else stopping)

    def _turn_away(self, request: Generation, error: errors.RpcError) -> None:
        del self._open[request.rid]
        self._refused(request, error)

    def _submit(self, request: Generation, model: str) -> None:
        if request.gave_up:
            self._turn_away(request, errors.Cancelled("the request was cancelled"))
            return
        params = request.params
        request.model = model
        loading = self.core.models[model].lifecycle.state != "Ready"
        self.tell(
            ev.Submit(
                request.rid, request.client, model, params.priority,
                timeout_s=None if params.timeout_s is UNSET else params.timeout_s,
                waited_s=time.monotonic() - request.accepted_at,
                keep_alive_s=None if params.keep_alive is UNSET else params.keep_alive,
            )
        )  # fmt: skip
        if request.dispatched_at is None and request.rid in self._open:
            request.sink.phase("loading" if loading else "queued", None)

    async def count_tokens(self, client: int, params: types.TokensParams) -> types.TokensResult:
        if (params.text is UNSET) == (params.messages is UNSET):
            raise errors.InvalidParams("give either text or messages", field="text")
        check_tools(params.tools)
        turns = [] if params.messages is UNSET else params.messages
        length = len(params.text or "") + characters(turns)
        length += sum(len(msgspec.json.encode(tool)) for tool in params.tools or ())
        _, result = await self._ask(client, params.model, "count", count_params(params), length)
        return msgspec.convert(result, types.TokensResult)

    async def encode(self, client: int, params: types.EncodeParams) -> types.EncodeResult:
        _, result = await self._ask(client, params.model, "encode", texts.encode_params(params), len(params.text))
        return texts.encoded(result)

    async def decode(self, client: int, params: types.DecodeParams) -> types.DecodeResult:
        _, result = await self._ask(client, params.model, "decode", texts.decode_params(params), len(params.tokens))
        return texts.decoded(result)

    async def embed(self, client: int, params: types.EmbedParams) -> types.EmbedResult:
        limit_s = None if params.timeout_s is UNSET else params.timeout_s
        keep_alive_s = None if params.keep_alive is UNSET else params.keep_alive
        longest = max(map(len, params.input))
        patience = asyncio.timeout(limit_s)
        try:
            async with patience:
                model, result = await self._ask(
                    client, params.model, "embed", texts.embed_params(params), longest, keep_alive_s
                )
        except TimeoutError:
            if not patience.expired():  # a disk may raise it, too
                raise
            told = f"not done within {limit_s:g} s"
            raise errors.DeadlineExceeded(told, phase="embedding", timeout_s=limit_s) from None
        return texts.embedded(model, params.encoding, result)

    async def _ask(
        self, client: int, ref: str | msgspec.UnsetType, method: str, params: Any, characters: int,
        keep_alive_s: float | None = None,
    ) -> tuple[str, Any]:  # fmt: skip
        """Ask a model's worker for what is no generation. Returns the model's id and the plain result."""
        ref = self._settings.default_model if ref is UNSET else ref
        # Leased, so that the model cannot go between loading and asking.
        lease = await self.acquire(client, ref, keep_alive_s=keep_alive_s)
        try:
            link = self._link(lease.model.id)
            return lease.model.id, await ask(link, method, params, characters)
        finally:
            self.tell(ev.Release(client, lease.lease))

    # --- what is kept of prompts ----------------------------------------------------------------------------------

    async def caches(self) -> types.CacheResult:
        return await self._prompts.list()

    async def clear_caches(self, ref: str | None) -> types.ClearCacheResult:
        if ref is None:
            return await self._prompts.clear(None)
        try:
            model = await self._library.resolve(ref)
        except (errors.ModelNotFound, errors.ModelInvalid):
            if not await self._prompts.has(ref):  # what it left behind can be cleared all the same
                raise
            model = ref
        return await self._prompts.clear(model)

    # --- clients, status, the end ---------------------------------------------------------------------------------

    def client_gone(self, client: int) -> None:
        self.tell(ev.ClientGone(client))

    @property
    def draining(self) -> bool:
        return self.core.draining

    def snapshot(self) -> types.Snapshot:
        return self.core.snapshot()

    def status(self, *, clients: int, subscribers: int) -> types.Status:
        core, now = self.core, self.loop.time()
        return types.Status(
            version=self.version, pid=self._process.pid, uptime_s=now - self._started_at,
            rss_bytes=self._process.memory_info().rss,
            models=types.StatusModels(
                known=len(core.models), loaded=sum(m.lifecycle.state == "Ready" for m in core.models.values())
            ),
            queue=types.StatusQueue(waiting=core.waiting, running=core.running),
            clients=clients, subscribers=subscribers,
            memory=types.Memory(budget_bytes=core.limits.budget_bytes, used_bytes=core.used_bytes),
            workers=[self._health(model, now) for model in core.deaths],
            draining=core.draining,
        )  # fmt: skip

    def _health(self, model: str, now: float) -> types.WorkerHealth:
        core = self.core
        retry_at = core.breakers.retry_at(model)
        return types.WorkerHealth(
            model=model, deaths=core.deaths[model], last_death=core.last_deaths.get(model),
            breaker=core.breakers.state(model, now).value,
            retry_at=None if retry_at is None else retry_at + core.wall,
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        """Nothing is loaded, under way or waited for."""
        if self._open or self._goals or self._resolving or self._links:
            return False
        return all(job.ended_at is not None for job in self.core.jobs.values())

    def request_shutdown(self) -> None:
        self.on_shutdown()

    async def drain(self, limit_s: float) -> None:
        """Take no new work, and wait up to `limit_s` seconds for the work that was accepted."""
        self.tell(ev.Drain())
        try:
            async with asyncio.timeout(limit_s):
                await self._quiet.wait()
        except TimeoutError:
            self._log.warning("drain limit reached", waiting=self.core.waiting, running=self.core.running)

    def abort(self) -> None:
        """Refuse whatever is still open, and stop all workers."""
        for task in self._resolving:
            task.cancel()
        self.tell(ev.Abort())

    async def close(self, grace_s: float) -> None:
        """Wait until no child is left; they get `grace_s` seconds to go by themselves."""
        await self._supervisor.close(grace_s)
        if self._timer is not None:
            self._timer.cancel()
        self._library.close()
        self._prompts.close()


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Hand over a result, or an RpcError to raise."""
    if future.done():
        return
    if isinstance(answer, errors.RpcError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
