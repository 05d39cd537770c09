"""The workers: started and stopped as the core wants, told what each may take of the memory; what they say of
themselves goes to the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlxd_client import errors

from .. import childwire as wire
from ..children.death import Death
from ..children.interface import ChildSpec
from ..children.supervisor import Supervisor
from ..core import actions as do
from ..core import events as ev
from ..core.core import Core
from ..library import Library, draft_bytes
from ..prompts import Prompts
from ..stats import Statistics
from ..workers import AnswerEvents, Attached, WorkerLink
from .measuring import Measuring

if TYPE_CHECKING:
    from ..server.runtime_api import Log
    from ..settings import Settings
    from ..store import Found

# Changes below this are noise: they would make an event a second.
NOISE_BYTES = 1024 * 1024


class Crew:
    """All workers of one daemon.

    Args:
        links: where they are found, by the core's number.
        prompts: what is kept of prompts.
        answers: whom they report to of the requests that they have.
    """

    def __init__(
        self,
        links: dict[int, WorkerLink],
        settings: Settings,
        library: Library,
        prompts: Prompts,
        core: Core,
        supervisor: Supervisor,
        answers: AnswerEvents,
        statistics: Statistics,
        measuring: Measuring,
        tell: Callable[[ev.Event], None],
        log: Log,
    ) -> None:
        self._links = links
        self._prompts = prompts
        self._settings = settings
        self._library = library
        self._core = core
        self._supervisor = supervisor
        self._answers = answers
        self._statistics = statistics
        self._measuring = measuring
        self._tell = tell
        self._log = log
        self._memory: dict[int, int] = {}  # by worker, as last told to the core
        self._adapters: dict[str, wire.Adapter] = {}  # by model, those of workers that are recycled
        measuring.on_told = self._share_memory

    def link(self, model: str) -> WorkerLink:
        """The worker of a model that is Ready. Raises WorkerDied."""
        worker = self._core.models[model].worker
        link = None if worker is None else self._links.get(worker)
        if link is None:
            raise errors.WorkerDied("the model's worker went away", cause="exit")
        return link

    # --- what the core wants --------------------------------------------------------------------------------------

    def start(self, action: do.StartWorker) -> None:
        settings, model = self._settings, action.model
        draft = self._library.drafts.get(model)
        load = wire.LoadModel(
            model=model, path=self._library.paths[model], max_batch=settings.max_batch,
            cache_bytes=settings.prompt_cache_bytes, disk_cache=str(self._prompts.root),
            disk_cache_bytes=self._prompts.budget_bytes,
            kv_bits=settings.kv_bits.get(model, 0), kv_bytes=self._kv_bytes(model, self._core.shares()[action.worker]),
            draft=None if draft is None else wire.Attach(draft=draft.model, path=draft.path),
            context_length=settings.context_length.get(model, 0),
        )  # fmt: skip
        link = WorkerLink(action.worker, load, self, self._answers, load_s=settings.load_s)
        self._links[action.worker] = link
        environment = {"MLXD_BLAS": settings.blas}
        spec = ChildSpec(kind="worker", name=model, argv=settings.worker_command, env=environment)
        link.child = self._supervisor.spawn(spec, link)
        self._log.info("loading", model=model, worker=action.worker, pid=link.child.pid)
        self._share_memory()

    def stop(self, action: do.StopWorker) -> None:
        link = self._links[action.worker]
        assert link.child is not None
        link.child.stop()
        self._statistics.unloaded(link.model, action.why)
        if action.why == "recycled" and link.adapter is not None:
            self._adapters[link.model] = link.adapter

    def cancel(self, action: do.CancelOnWorker) -> None:
        self._links[action.worker].cancel(action.rid)

    def trim(self, action: do.Trim) -> None:
        link = self._links.get(action.worker)
        if link is not None:
            link.trim(action.keep)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _kv_bytes(self, model: str, share: int) -> int:
        """What a worker's KV caches may hold, given what it may take beyond what its model needs; 0 is no bound."""
        reserved = self._library.kv_bytes.get(model, 0)
        return reserved + share if reserved else 0

    def _share_memory(self) -> None:
        """Tell the workers what their KV caches may hold, now that others came, went, or take more or less."""
        for worker, share in self._core.shares().items():
            link = self._links.get(worker)
            if link is not None and (allowed := self._kv_bytes(link.model, share)):
                link.allow(allowed)

    # --- draft models ---------------------------------------------------------------------------------------------

    def attach(self, worker: int, draft: Found, answer: Attached) -> None:
        """Tell a worker to load a draft model, for which there is room. The core hears what has become of it."""
        link = self._links.get(worker)
        if link is None:
            answer(errors.WorkerDied("the model was unloaded meanwhile", cause="stopped"))
            return

        def attached(outcome: wire.Attached | errors.RpcError) -> None:
            if isinstance(outcome, errors.RpcError):
                self._log.warning("no draft model", model=link.model, draft=draft.model, reason=outcome.message)
                self._tell(ev.Attached(worker, None, draft_bytes(draft)))
            else:
                self._log.info("draft model attached", model=link.model, draft=draft.model)
                self._tell(ev.Attached(worker, draft.model, draft_bytes(draft)))
                self.worker_memory(worker, outcome.memory_bytes)
            answer(outcome)

        link.attach(wire.Attach(draft=draft.model, path=draft.path), attached)

    def _draft_of(self, worker: int, loaded: wire.Loaded) -> str | None:
        """The draft model that was loaded with a worker's model."""
        link = self._links[worker]
        if link.draft is not None and loaded.no_draft is not None:
            self._log.warning("no draft model", model=link.model, draft=link.draft, reason=loaded.no_draft)
            return None
        return link.draft

    # --- what workers say of themselves ---------------------------------------------------------------------------

    def worker_progress(self, worker: int, progress: float) -> None:
        self._tell(ev.LoadProgress(worker, progress))

    def worker_loaded(self, worker: int, loaded: wire.Loaded) -> None:
        self._links[worker].ready_at = time.monotonic()
        held = self._measuring.footprint(worker)
        self._log.info(
            "loaded", worker=worker, load_s=round(loaded.load_s, 3), memory_bytes=loaded.memory_bytes,
            footprint_bytes=held,
        )  # fmt: skip
        adapter = self._bring_back_adapter(worker)
        self._tell(
            ev.Loaded(
                worker, loaded.memory_bytes, loaded.context_length, self._draft_of(worker, loaded),
                tuple(loaded.capabilities) or None, self._needs(worker, held),
            )
        )  # fmt: skip
        if adapter is not None:
            self._tell(ev.Adapted(worker, adapter.id))
        model = self._links[worker].model
        self._statistics.loaded(model, self._core.load_s(model) or loaded.load_s)
        self._share_memory()

    def _needs(self, worker: int, held: int | None) -> int | None:
        """What running a model takes, as its worker turned out: what that holds now, and the KV cache it is to have."""
        return None if held is None else held + self._library.kv_bytes.get(self._links[worker].model, 0)

    def _bring_back_adapter(self, worker: int) -> wire.Adapter | None:
        """What a model's requests got that named none, before its worker was recycled, they get again."""
        link = self._links[worker]
        adapter = self._adapters.pop(link.model, None)
        if adapter is not None:

            def answered(told: Any) -> None:
                if isinstance(told, errors.RpcError):
                    self._log.warning("no adapter", model=link.model, adapter=adapter.id, reason=told.message)
                    link.adapter = None
                    self._tell(ev.Adapted(worker, None))

            link.adapter = adapter
            link.adapt(adapter, answered)
        return adapter

    def worker_load_failed(self, worker: int, error: errors.RpcError) -> None:
        self._log.warning("load failed", worker=worker, kind=error.kind, reason=error.message)
        self._statistics.load_failed(self._links[worker].model, error.kind)
        self._tell(ev.LoadFailed(worker, error))

    def worker_memory(self, worker: int, memory_bytes: int) -> None:
        known = self._memory.get(worker, 0)
        if abs(known - memory_bytes) >= NOISE_BYTES:
            self._memory[worker] = memory_bytes
            self._tell(ev.MemoryReport(worker, memory_bytes))
            self._share_memory()

    def worker_beat(self, worker: int, heartbeat: wire.Heartbeat, before: wire.PromptCacheStats | None) -> None:
        self._statistics.beat(self._links[worker].model, worker, heartbeat, before, time.monotonic())

    def worker_cache_failed(self, worker: int, failures: int) -> None:
        model = self._links[worker].model
        self._log.warning("files of the prompt cache could not be read or written", model=model, failures=failures)

    def worker_exited(self, worker: int, death: Death) -> None:
        link = self._links.pop(worker)
        self._memory.pop(worker, None)
        log: Any = self._log.info if death.expected else self._log.error
        log("worker ended", model=link.model, worker=worker, cause=death.cause, told=death.describe())
        if not death.expected:
            self._statistics.died(link.model, death.signal or death.cause)
        self._tell(ev.WorkerExited(worker, None if death.expected else death.to_error()))
        self._share_memory()
