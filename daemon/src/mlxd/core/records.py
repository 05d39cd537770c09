"""What the core remembers: models, requests, goals. State only; nothing is decided here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject, ExcessStep, MemoryHolder, Model

from .events import Priority
from .jobs import DownloadJob, Fetcher, LoadJob
from .lifecycle import Lifecycle
from .queue import FairQueue


@dataclass(slots=True)
class Request:
    """One generation. `ending` is set once its fate is sealed while the worker still holds its slot. One that `yields`
    steps aside for what does not: see Book.step_aside."""

    rid: int
    client: int
    model: str
    seq: int
    priority: Priority
    timeout_s: float | None
    deadline: float | None
    started_at: float | None = None
    ending: RpcError | None = None
    yields: bool = False


@dataclass(slots=True)
class Goal:
    """An Ensure, Unload, Delete or Attach that waits for its model's state."""

    rid: int
    client: int
    kind: Literal["ensure", "unload", "delete", "attach"]
    lease: str | None = None
    asking: bool = False


@dataclass(slots=True)
class ModelRecord:
    """One model. It has a worker exactly while it is Loading or Ready; `stopping` says that worker was told to go.

    `last_seq` is set on a model that must make room: it still serves what was accepted up to then, then goes.

    `download` is the open job that fetches it; `fetcher` the process, its own or one that is about to go. With files
    on disk that is an update, which changes no state. `later` are the needs (memory, context length) of an update that
    came while a worker ran on the old files, and `outdated` the revisions that it replaced and that are still there.
    """

    id: str
    source: Literal["builtin", "hub", "path"]
    lifecycle: Lifecycle
    need_bytes: int
    revision: str | None = None
    size_bytes: int | None = None
    context_length: int | None = None
    kind: Literal["model", "adapter"] = "model"
    default_keep_alive_s: float = 0.0
    keep_alive_wish: float | None = None  # what a request wished for this stay in memory
    pinned: bool = False
    preload: bool = False
    preloading: bool = False  # it is to be loaded although nobody waits for it
    preload_at: float | None = None  # when that is tried next
    max_batch: int = 0  # how many requests its worker runs at a time
    worker: int | None = None
    memory_bytes: int | None = None
    footprint_bytes: int | None = None  # what the last measurement found
    learned_bytes: int = 0  # what running it has turned out to need, where it was loaded before
    allowed_bytes: int | None = None  # what its worker may take in all, as things are now
    granted_bytes: int = 0  # the most of these since the last measurement
    over_step: ExcessStep | None = None  # what was done last about its being past that, and when
    over_at: float = 0.0
    recycling: bool = False  # its worker goes once it has answered what it is at, and another takes its place
    recycled_at: float | None = None
    returning: bool = False  # it is to be loaded again for those who hold it
    stopping: str | None = None
    last_seq: int | None = None
    queue: FairQueue[Request] = field(default_factory=FairQueue)
    running: dict[int, Request] = field(default_factory=dict)
    running_by_client: Counter[int] = field(default_factory=Counter)
    goals: dict[int, Goal] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    asking: set[str] = field(default_factory=set)  # those of them that last as long as a question to its worker
    needed: bool = False  # something that does not yield has used it since it was loaded, or wants it to be
    last_used: float = 0.0
    idle_since: float | None = None
    service_s: float | None = None  # moving average of how long a request holds its slot
    progress: float | None = None
    error: ErrorObject | None = None
    job: LoadJob | None = None
    load_began: float = 0.0
    load_s: float | None = None  # how long the last load took
    latest_revision: str | None = None
    download: DownloadJob | None = None
    fetcher: Fetcher | None = None
    later: tuple[int, int | None] | None = None
    outdated: list[str] = field(default_factory=list)
    deleting: bool = False
    adapter: str | None = None  # what requests get that name none
    prewarmed: int = 0  # system turns that were computed ahead
    capabilities: tuple[str, ...] | None = None
    draft: str | None = None  # the draft model that its worker has
    draft_takes: int = 0  # memory for draft models beside what the model needs: that of the one that is there,
    draft_granted: int = 0  # those that its worker loads,
    draft_promised: int = 0  # and one that is to come once the model is loaded
    published: tuple[object, ...] = ()  # the activity that subscribers know of

    @property
    def reserved_bytes(self) -> int:
        """What the model counts with against the budget."""
        held = max(self.memory_bytes or 0, self.footprint_bytes or 0)
        return 0 if self.worker is None else max(self.wanted_bytes, held)

    @property
    def wanted_bytes(self) -> int:
        """What running the model is expected to take, with its draft model."""
        needs = max(self.need_bytes, self.learned_bytes)
        return needs + self.draft_takes + self.draft_granted + self.draft_promised

    @property
    def keep_alive_s(self) -> float:
        return self.default_keep_alive_s if self.keep_alive_wish is None else self.keep_alive_wish

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for this model to be Ready, or holds it while its worker is recycled."""
        return self.returning or bool(self.queue) or any(g.kind == "ensure" for g in self.goals.values())

    @property
    def wanted(self) -> bool:
        """Whether it is to be Ready, for somebody who waits or by itself."""
        return self.preloading or self.awaited

    @property
    def urgent(self) -> bool:
        """Whether anybody waits for this model to be Ready who does not yield."""
        asked = any(g.kind == "ensure" for g in self.goals.values())
        return self.returning or asked or any(not request.yields for request in self.queue)

    @property
    def held(self) -> bool:
        """Whether it is not to go to make room, nor for pressure."""
        return bool(self.leases) or self.pinned

    @property
    def urgent_load(self) -> bool:
        """The same of a load that waits; one that was asked for by name goes on when its caller has gone."""
        return self.urgent or (self.job is not None and self.job.wanted) or (self.preloading and self.pinned)

    @property
    def pressing(self) -> bool:
        """Busy with something that does not yield."""
        return self.urgent or any(not request.yields for request in self.running.values())

    @property
    def busy(self) -> bool:
        return bool(self.running) or self.wanted

    @property
    def engaged(self) -> bool:
        """Whether its worker is at something that somebody waits for: answers, or a draft model."""
        drafts = self.draft_granted or any(g.kind == "attach" for g in self.goals.values())
        return bool(self.running or self.asking or drafts)

    @property
    def serving(self) -> bool:
        return self.lifecycle.state == "Ready" and self.stopping is None

    @property
    def idle_deadline(self) -> float | None:
        """When the model goes if nothing comes, on the core's clock; None where it stays."""
        if not self.serving or self.idle_since is None or self.leases or self.pinned or self.keep_alive_s < 0:
            return None
        return self.idle_since + self.keep_alive_s

    @property
    def leaving(self) -> Fetcher | None:
        """The fetcher of a download that was cancelled, while it is not gone yet."""
        fetcher = self.fetcher
        return fetcher if fetcher is not None and fetcher.job.state == "cancelled" else None

    def doing(self) -> tuple[str | None, float | None]:
        """The phase and its progress: of what concerns the model's use first, then of its download."""
        if self.deleting:
            return "deleting", None
        if self.stopping is not None:
            return "unloading", self.progress
        if self.lifecycle.state == "Loading":
            return "loading", self.progress
        if self.job is not None and self.job.state == "queued" and self.job.announced:
            return "queued", None
        fetch = self.download
        if self.fetcher is not None and self.leaving is not None:
            fetch = self.leaving.job
        return (None, None) if fetch is None else (fetch.phase, fetch.progress)

    def activity(self) -> tuple[object, ...]:
        memory = (self.memory_bytes, self.footprint_bytes)
        return (*memory, len(self.running), len(self.queue), len(self.leases), self.idle_deadline)

    def view(self, wall: float) -> Model:
        """The model for the wire; `wall` turns the core's clock into Unix seconds."""
        deadline = self.idle_deadline
        loaded = self.lifecycle.state == "Ready"
        phase, progress = self.doing()
        return Model(
            id=self.id, state=self.lifecycle.state, source=self.source, revision=self.revision,
            latest_revision=self.latest_revision, size_bytes=self.size_bytes, phase=phase, progress=progress,
            error=self.error,
            context_length=self.context_length, memory_bytes=self.memory_bytes if loaded else None,
            footprint_bytes=self.footprint_bytes if loaded else None,
            active=len(self.running), waiting=len(self.queue), leases=len(self.leases),
            idle_unload_at=None if deadline is None else deadline + wall, draft_model=self.draft,
            kind=self.kind, pinned=self.pinned, preload=self.preload, adapter=self.adapter,
            prewarmed=self.prewarmed,
            capabilities=None if self.capabilities is None else list(self.capabilities),
        )  # fmt: skip

    def holding(self) -> MemoryHolder:
        """What its worker holds, for the wire."""
        return MemoryHolder(
            model=self.id, reserved_bytes=self.reserved_bytes, footprint_bytes=self.footprint_bytes,
            share_bytes=self.allowed_bytes,
        )  # fmt: skip
