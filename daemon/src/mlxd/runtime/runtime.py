"""The only loop between the core and the world: whatever happens becomes an event, whatever the core wants is done.

Decides nothing. Holds what the core must not know: the timer, the wall clock, and all that actions are done with.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psutil

from mlxd_client import errors, types

from .. import __version__
from ..children.supervisor import Supervisor
from ..core import actions as do
from ..core import events as ev
from ..core.core import Core
from ..core.limits import Limits, Rules
from ..fetchers import Fetchers
from ..library import Library
from ..measure import this_system
from ..prompts import Prompts
from ..server.events import EventLog
from ..stats import Gauges, exposition
from ..workers import WorkerLink
from .asking import Asking
from .batches import Batches
from .crew import Crew
from .figures import Figures
from .generations import Generations
from .goals import Goals
from .holding import Holding
from .jobs import Jobs
from .measuring import Measuring
from .preloads import Preloads
from .supply import Supply

if TYPE_CHECKING:
    from ..server.limits import ServerLimits
    from ..server.runtime_api import Log
    from ..settings import Settings
    from ..store import Store


class Runtime:
    """One daemon's state and children, as the server's methods see them: see server/runtime_api.py.

    Args:
        settings: see settings/table.py.
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
        self.on_restart: Callable[[], Awaitable[types.RestartResult]] | None = None
        self.on_make_room: Callable[[], None] | None = None
        self.activated = False  # somebody else holds the socket, and starts daemons for it
        self.log_lines_dropped: Callable[[], int] = lambda: 0
        self.on_settled: Callable[[], None] = lambda: None  # all that followed from an event is done
        self._supervisor = supervisor
        self._log = log
        self._started_at = loop.time()
        self._process = psutil.Process()
        self._timer: asyncio.Handle | None = None
        self._due: float | None = None
        self._quiet: asyncio.Event = asyncio.Event()
        self._let_go: asyncio.Event = asyncio.Event()
        self._loading_again: set[asyncio.Task[None]] = set()
        self._parting: dict[str, Any] | None = None  # what subscribers are told with `daemon_stopping`
        self._inbox: list[ev.Event] = []
        self._performing = False
        self._settings = settings
        self.core = Core(_bounds(settings), wall=time.time() - loop.time(), job_prefix=f"load-{self.epoch[:6]}")
        self.events = EventLog(self.epoch, self.core.snapshot, limits=limits)
        self._links: dict[int, WorkerLink] = {}
        self._equip(settings, store)
        self._perform = self._performers()

    def _equip(self, settings: Settings, store: Store) -> None:
        """Make the parts that actions are done with."""
        core, tell, log, loop, links = self.core, self.tell, self._log, self.loop, self._links
        self._figures = figures = Figures(settings, log)
        fetchers = Fetchers(self._supervisor, settings.fetcher_command)
        self._library = library = Library(settings, store, fetchers, core, tell, log, loop)
        self._downloads = library.downloads
        self._prompts = prompts = Prompts(settings, links.values, log, loop)
        self._goals = goals = Goals(tell, loop)
        self._jobs = jobs = Jobs(core, tell, loop)
        self._supply = supply = Supply(settings, library, core, goals, jobs, tell, log, adapting=self._adapting)
        self._generations = Generations(links, settings, core, goals, supply, figures, tell, log, loop)
        self._measuring = measuring = Measuring(this_system(settings.system_root), links, core, tell, log, loop)
        self._crew = crew = Crew(
            links, settings, library, prompts, core, self._supervisor, self._generations, figures.statistics,
            measuring, tell, log,
        )  # fmt: skip
        holding = Holding(settings, core, goals, supply, crew, tell, loop, epoch=self.epoch)
        self._preloads = Preloads(supply, tell, self.events.publish, log, loop)
        asking = Asking(settings, holding, crew, figures, tell)
        self.batches = Batches(settings, core, self._generations, supply, jobs, tell, log, loop, epoch=self.epoch)
        self._offer(supply, jobs, holding, asking)

    def _offer(self, supply: Supply, jobs: Jobs, holding: Holding, asking: Asking) -> None:
        """What the server calls of the parts."""
        self.generate = self._generations.generate
        self.jobs, self.job, self.wait_job = jobs.list, jobs.get, jobs.wait
        self.models, self.model, self.catalog = supply.models, supply.model, supply.catalog
        self.download, self.delete, self.verify = supply.download, supply.delete, supply.verify
        self.load, self.unload, self.acquire, self.release = (
            holding.load, holding.unload, holding.acquire, holding.release
        )  # fmt: skip
        self.count_tokens, self.encode, self.decode, self.embed = (
            asking.count_tokens, asking.encode, asking.decode, asking.embed
        )  # fmt: skip

    def _performers(self) -> dict[type, Callable[[Any], object]]:
        crew, generations, goals, downloads = self._crew, self._generations, self._goals, self._downloads
        batches = self.batches
        return {
            do.StartWorker: crew.start, do.StopWorker: crew.stop, do.CancelOnWorker: crew.cancel,
            do.Dispatch: generations.dispatch, do.Deliver: generations.deliver, do.Fail: self._fail,
            do.Publish: self._publish, do.StartFetcher: downloads.start, do.StopFetcher: downloads.stop,
            do.DeleteFiles: self._delete_files, do.DiscardPartial: downloads.discard, do.Prune: self._prune,
            do.Measure: self._measuring.measure, do.Trim: crew.trim,
            do.Answer: lambda action: goals.reached(action.rid, action.model),
            do.Started: lambda action: goals.reached(action.rid, action.job),
            do.Deleted: lambda action: goals.reached(action.rid, action.freed_bytes),
            do.ReadItems: batches.read, do.RunItem: batches.run, do.CancelItem: batches.cancel_item,
            do.RecordItem: batches.record, do.CountTry: batches.count_try, do.EndBatch: batches.end,
            do.DeleteBatch: batches.delete_ended, do.WriteAgain: batches.write_again,
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
        self._measuring.rest()
        if self.core.draining and self.core.quiet:
            self._quiet.set()
        if self.core.let_go:
            self._let_go.set()
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

    # --- what concerns several parts ------------------------------------------------------------------------------

    def _fail(self, action: do.Fail) -> None:
        if not self._generations.fail(action):
            self._goals.failed(action.rid, action.error)

    def _publish(self, action: do.Publish) -> None:
        self.events.publish(
            action.name, model_id=action.model_id, model=action.model, job=action.job, progress=action.progress,
            error=action.error, request=self._generations.name(action.rid),
            details=self._parting if action.name == "daemon_stopping" else action.details,
        )  # fmt: skip
        if action.name in ("memory_pressure", "memory_exceeded"):
            self._log.warning(action.name.replace("_", " "), model=action.model_id, **(action.details or {}))
        if action.job is not None:
            if action.job.kind == "download":
                self._downloads.remember(action.job)
                if action.job.ended_at is not None:
                    self._figures.statistics.downloads[action.job.state] += 1
            self._jobs.changed(action.job)
        if action.error is not None and action.model is not None and action.model.preload:
            self._log.warning("preload", model=action.model_id, kind=action.error.kind, reason=action.error.message)
        if action.name in ("loading_started", "loading_progress", "loading_queued"):
            assert action.model_id is not None
            self._generations.loading(action.model_id, action.progress)

    def _delete_files(self, action: do.DeleteFiles) -> None:
        self._downloads.delete(action)
        self._prompts.forget(action.model)

    def _prune(self, action: do.Prune) -> None:
        """Unless workers have it as an adapter, for which the core keeps no books: then the next daemon does it."""
        if not self._adapting(action.model):
            self._downloads.prune(action)

    def _adapting(self, model: str) -> int:
        """How many workers and open requests have this for an adapter."""
        users = [*(link.adapter for link in self._links.values()), *self._generations.adapters]
        return sum(user is not None and user.id == model for user in users)

    async def cancel_job(self, job: str, *, discard: bool = False) -> types.Job:
        if self.job(job).kind == "batch":
            return await self.batches.cancel(job)
        return self._jobs.cancel(job, discard=discard)

    def personas(self) -> types.PersonasResult:
        return types.PersonasResult(personas=self._settings.personas, templates=self._settings.templates)

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

    # --- memory ---------------------------------------------------------------------------------------------------

    async def plan(self, params: types.PlanParams) -> types.Plan:
        self._measuring.look()  # where nothing is loaded, the last measurement may be from long ago
        return await self._supply.plan(params)

    # --- clients, status ------------------------------------------------------------------------------------------

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
            memory=self._measuring.look(),
            workers=[self._health(model, now) for model in core.deaths],
            tasks=len(asyncio.all_tasks(self.loop)), draining=core.draining, activated=self.activated,
        )  # fmt: skip

    async def stats(self, ref: str | None, clients: types.ClientTotals) -> types.Stats:
        only = None if ref is None else await self._library.resolve(ref)
        return self._figures.told(self._gauges(clients), only)

    async def stories(self, ref: str | None) -> types.StoriesResult:
        """The last changes of state of one model or of all."""
        models = (
            list(self.core.models.values()) if ref is None else [self.core.models[await self._library.resolve(ref)]]
        )
        return types.StoriesResult(
            stories=[
                types.ModelStory(
                    model=model.id,
                    steps=[
                        types.StoryStep(at=at + self.core.wall, cause=t.cause, source=t.source, target=t.target)
                        for at, t in model.lifecycle.steps
                    ],
                )
                for model in models
            ]
        )

    def metrics(self, clients: types.ClientTotals) -> types.MetricsResult:
        stats = self._figures.told(self._gauges(clients))
        status = self.status(clients=clients.open, subscribers=clients.subscribers)
        loaded = [model.view(self.core.wall) for model in self.core.models.values() if model.worker is not None]
        with self._process.oneshot():
            spent = self._process.cpu_times()
            process = exposition.Process(
                resident_bytes=status.rss_bytes, cpu_s=spent.user + spent.system, open_files=self._process.num_fds()
            )
        text = exposition.render(self._figures.statistics.models, stats, status, loaded, self.jobs(), process)
        return types.MetricsResult(content_type=exposition.CONTENT_TYPE, text=text)

    def _gauges(self, clients: types.ClientTotals) -> Gauges:
        events = types.EventTotals(published=self.events.rev, dropped=self.events.dropped, lagged=self.events.lagged)
        return Gauges(
            since_at=self._started_at + self.core.wall, clients=clients, events=events,
            fetched_bytes=self._downloads.fetched_bytes, log_lines_dropped=self.log_lines_dropped(),
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
        return not (self._generations or self._goals or self._links or self._jobs.under_way or self.batches.busy)

    # --- the settings ---------------------------------------------------------------------------------------------

    def reconfigure(self, names: frozenset[str]) -> None:
        """Take over settings that have changed; those of these names are others than before."""
        settings = self._settings
        self._library.take_aliases()
        self._downloads.fetchers.command = settings.fetcher_command
        self._configure_core()
        if names & {"aliases", "draft_models", "context_length"}:
            self._supply.look_again()
        if "preload" in names:
            self._preloads.begin(settings.preload)

    def _configure_core(self) -> None:
        settings, id_of = self._settings, self._library.id_of
        rules = Rules(
            {id_of(ref): seconds for ref, seconds in settings.keep_alive.items()},
            frozenset(map(id_of, settings.pinned)), tuple(dict.fromkeys(map(id_of, settings.preload))),
        )  # fmt: skip
        self.tell(ev.Configure(_bounds(settings), rules))

    # --- from begin to end ----------------------------------------------------------------------------------------

    def refuse_newer_state(self) -> None:
        """Raises StateTooNew where a newer daemon left state that this one cannot read; nothing is changed then."""
        self._downloads.records.refuse_newer()
        self._prompts.refuse_newer()
        self._supervisor.refuse_newer()
        self.batches.ledger.refuse_newer()

    async def begin(self) -> None:
        """Learn what is there, and go on with what an earlier daemon had begun."""
        self._prompts.begin()
        self._configure_core()
        await self._measuring.begin()
        await self._supply.begin()
        await self.batches.ledger.begin()
        self._preloads.begin(self._settings.preload)

    # --- another daemon in place of this one ----------------------------------------------------------------------

    async def restart(self) -> types.RestartResult:
        """Have another daemon take over; see handover.py. Raises RestartFailed, Unsupported."""
        if self.on_restart is None:
            raise errors.Unsupported("nothing can take over from this daemon", option="restart")
        return await self.on_restart()

    async def let_go(self, timeout_s: float) -> None:
        """Stop whatever changes files that another daemon would change, until `go_on`. Raises TimeoutError."""
        self._let_go.clear()
        self.tell(ev.Hold())
        self.batches.put_back()
        async with asyncio.timeout(timeout_s):
            await self._let_go.wait()
            await self._downloads.let_go()
            await self.batches.ledger.let_go()

    async def go_on(self) -> None:
        """No other daemon came. What one that failed has left is ended first, as it may be changing the same files."""
        await self._supervisor.sweep()
        self._downloads.records.take_back()
        await self.batches.ledger.take_back()
        self.tell(ev.GoOn())

    def leave(self, **facts: Any) -> None:
        """Another daemon has taken over. Subscribers are told the facts."""
        self._parting = facts
        self.tell(ev.Leave())
        self._jobs.move(errors.ShuttingDown("another daemon goes on with it; connect anew", reconnect=True))

    def elsewhere(self, held_bytes: int) -> None:
        """The daemon that this one took over from holds so much memory."""
        self.tell(ev.Elsewhere(held_bytes))

    @property
    def held_bytes(self) -> int:
        return self.core.held_bytes

    @property
    def loaded(self) -> list[str]:
        """The models that are loaded, most recently used first, but for those that only batch jobs have used."""
        serving = [model for model in self.core.models.values() if model.serving and model.needed]
        return [model.id for model in sorted(serving, key=lambda model: -model.last_used)]

    def load_again(self, models: list[str]) -> None:
        """Have models loaded, in the background. Where one cannot be, its first request tells why."""

        async def load(model: str) -> None:
            with contextlib.suppress(errors.RpcError):
                await self.load(0, types.LoadParams(model=model))

        for model in models:
            task = self.loop.create_task(load(model))
            self._loading_again.add(task)
            task.add_done_callback(self._loading_again.discard)

    def request_shutdown(self) -> None:
        self.on_shutdown()

    def make_room(self, working: int) -> None:
        """See runtime_api.py. Models that are loaded and not in use keep nobody: the next daemon loads them again."""
        if self.on_make_room is None:
            raise errors.Unsupported("no other daemon can be started in place of this one", option="if_idle")
        leases = sum(len(model.leases) for model in self.core.models.values())
        requests = max(working, len(self.core.requests))
        uses = {"requests": requests, "leases": leases, "jobs": self._jobs.under_way}
        if any(uses.values()):
            told = ", ".join(f"{count} {name}" for name, count in uses.items() if count)
            raise errors.DaemonBusy(f"the daemon is in use: {told}", **uses)
        self.on_make_room()

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
        self._generations.abort()
        self._preloads.abort()
        self.tell(ev.Abort())

    async def close(self, grace_s: float) -> None:
        """Wait until no child is left; they get `grace_s` seconds to go by themselves."""
        await self._supervisor.close(grace_s)
        await self.batches.ledger.close()
        self._measuring.close()
        if self._timer is not None:
            self._timer.cancel()
        self._library.close()
        self._prompts.close()


def _bounds(settings: Settings) -> Limits:
    return Limits(
        budget_bytes=settings.memory_budget_bytes,
        queue=settings.queue_limit,
        max_batch=settings.max_batch,
        keep_alive_s=settings.keep_alive_s,
        downloads=settings.downloads,
        batch_slots=min(settings.batch_slots, settings.max_batch),
        batch_retry_s=settings.batch_retry_s,
        batch_keep_s=settings.batch_keep_s,
        reserve_bytes=settings.memory_reserve_bytes,
        calm_s=settings.memory_calm_s,
    )
