"""Subscriptions, snapshots, and the events themselves."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from .base import ErrorObject, ModelRef, Params, PressureLevel, Result
from .jobs import Job
from .models import Model

# Which topic each event belongs to. A subscription may name topics or single events.
EVENT_TOPICS: dict[str, str] = {
    "model_found": "models",
    "model_lost": "models",
    "download_started": "models",
    "download_progress": "models",
    "download_completed": "models",
    "download_cancelled": "models",
    "loading_queued": "models",
    "loading_cancelled": "models",
    "loading_started": "models",
    "loading_progress": "models",
    "loading_completed": "models",
    "draft_attached": "models",
    "model_changed": "models",
    "unloading_started": "models",
    "unloaded": "models",
    "deleting_started": "models",
    "deleted": "models",
    "error": "models",
    "worker_died": "models",
    "memory_exceeded": "models",
    "job": "jobs",
    "queue": "queue",
    "generation_started": "generation",
    "generation_finished": "generation",
    "memory_pressure": "system",
    "config_changed": "system",
    "config_failed": "system",
    "daemon_stopping": "system",
}
TOPICS: frozenset[str] = frozenset(EVENT_TOPICS.values())


class Since(Params, kw_only=True):
    """A position in the event log: what the last event, or the subscription's answer, said."""

    epoch: Annotated[str, Meta(max_length=64)]
    rev: Annotated[int, Meta(ge=0)]


class SubscribeParams(Params, kw_only=True):
    """`topics` holds topics or names of single events; `models` ids. Unset means all."""

    topics: Annotated[list[str], Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    models: Annotated[list[ModelRef], Meta(min_length=1, max_length=256)] | UnsetType = UNSET
    since: Since | UnsetType = UNSET


class Snapshot(Result, kw_only=True):
    """All state that a subscription's deltas change: every matching model, every job that has not ended, and whether
    the machine is short of memory."""

    models: list[Model] = []
    jobs: list[Job] = []
    stopping: bool = False
    memory_pressure: PressureLevel = "normal"


class SubscribeResult(Result, kw_only=True):
    """`snapshot` is absent where `since` was honoured: the deltas go on from there. `resync` says that it was not."""

    subscription: int
    epoch: str
    rev: int
    snapshot: Snapshot | None = None
    resync: bool = False


class SubscriptionParams(Params, kw_only=True):
    subscription: int


class Event(Result, kw_only=True):
    """One `event` notification. `rev` rises strictly within an epoch, with gaps where events did not match.

    `model` is the whole model after the change, so that a client only has to replace what it holds. `lagged` says that
    `dropped` events were lost to a full queue and carries a fresh `snapshot` in their place.
    """

    subscription: int
    rev: int
    name: str
    at: float
    model_id: str | None = None
    progress: float | None = None
    error: ErrorObject | None = None
    model: Model | None = None
    job: Job | None = None
    request: str | None = None
    details: dict[str, Any] | None = None
    dropped: int | None = None
    snapshot: Snapshot | None = None
