"""What the core remembers: models, requests, goals, load jobs. State only; the decisions are in core.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject, Job, Model

from .events import Priority
from .lifecycle import Lifecycle
from .queue import FairQueue


@dataclass(slots=True)
class Request:
    """One generation. `ending` is set once its fate is sealed while the worker still holds its slot."""

    rid: int
    client: int
    model: str
    seq: int
    priority: Priority
    timeout_s: float | None
    deadline: float | None
    started_at: float | None = None
    ending: RpcError | None = None


@dataclass(slots=True)
class Goal:
    """An Ensure or Unload that waits for its model's state."""

    rid: int
    client: int
    kind: Literal["ensure", "unload"]
    lease: str | None = None


@dataclass(slots=True)
class LoadJob:
    """One load, from the wish to its end. `wanted`: somebody asked for it by name, so that it outlives its caller."""

    job: str
    model: str
    wanted: bool
    started_at: float
    state: Literal["queued", "running", "done", "failed", "cancelled"] = "queued"
    progress: float | None = None
    error: ErrorObject | None = None
    ended_at: float | None = None
    announced: bool = False  # whether subscribers were told that it waits for memory

    def view(self, wall: float) -> Job:
        """The job for the wire; `wall` turns the core's clock into Unix seconds."""
        ended = None if self.ended_at is None else self.ended_at + wall
        return Job(
            job=self.job, kind="load", state=self.state, model=self.model, progress=self.progress,
            error=self.error, started_at=self.started_at + wall, ended_at=ended,
        )  # fmt: skip


@dataclass(slots=True)
class ModelRecord:
    """One model. It has a worker exactly while it is Loading or Ready; `stopping` says that worker was told to go.

    `last_seq` is set on a model that must make room: it still serves what was accepted up to then, then goes.
    """

    id: str
    source: Literal["builtin", "hub", "path"]
    lifecycle: Lifecycle
    need_bytes: int
    revision: str | None = None
    size_bytes: int | None = None
    context_length: int | None = None
    default_keep_alive_s: float = 0.0
    keep_alive_s: float = 0.0
    worker: int | None = None
    memory_bytes: int | None = None
    stopping: str | None = None
    last_seq: int | None = None
    queue: FairQueue[Request] = field(default_factory=FairQueue)
    running: dict[int, Request] = field(default_factory=dict)
    running_by_client: Counter[int] = field(default_factory=Counter)
    goals: dict[int, Goal] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    last_used: float = 0.0
    idle_since: float | None = None
    service_s: float | None = None  # moving average of how long a request holds its slot
    progress: float | None = None
    error: ErrorObject | None = None
    job: LoadJob | None = None
    published: tuple[object, ...] = ()  # the activity that subscribers know of

    @property
    def reserved_bytes(self) -> int:
        """What the model counts with against the budget."""
        return 0 if self.worker is None else max(self.need_bytes, self.memory_bytes or 0)

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for this model to be Ready."""
        return bool(self.queue) or any(g.kind == "ensure" for g in self.goals.values())

    @property
    def busy(self) -> bool:
        return bool(self.running) or self.wanted

    @property
    def serving(self) -> bool:
        return self.lifecycle.state == "Ready" and self.stopping is None

    @property
    def idle_deadline(self) -> float | None:
        """When the model goes if nothing comes, on the core's clock; None where it stays."""
        if not self.serving or self.idle_since is None or self.leases or self.keep_alive_s < 0:
            return None
        return self.idle_since + self.keep_alive_s

    @property
    def phase(self) -> str | None:
        if self.stopping is not None:
            return "unloading"
        if self.lifecycle.state == "Loading":
            return "loading"
        return "queued" if self.job is not None and self.job.state == "queued" else None

    def activity(self) -> tuple[object, ...]:
        return (self.memory_bytes, len(self.running), len(self.queue), len(self.leases), self.idle_deadline)

    def view(self, wall: float) -> Model:
        """The model for the wire; `wall` turns the core's clock into Unix seconds."""
        deadline = self.idle_deadline
        loaded = self.lifecycle.state == "Ready"
        return Model(
            id=self.id, state=self.lifecycle.state, source=self.source, revision=self.revision,
            size_bytes=self.size_bytes, phase=self.phase, progress=self.progress, error=self.error,
            context_length=self.context_length, memory_bytes=self.memory_bytes if loaded else None,
            active=len(self.running), waiting=len(self.queue), leases=len(self.leases),
            idle_unload_at=None if deadline is None else deadline + wall,
        )  # fmt: skip
