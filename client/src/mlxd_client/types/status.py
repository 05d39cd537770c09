"""The daemon's health in numbers."""

from __future__ import annotations

from typing import Literal

from .base import ErrorObject, Result


class StatusModels(Result, kw_only=True):
    known: int
    loaded: int


class StatusQueue(Result, kw_only=True):
    waiting: int
    running: int


class Memory(Result, kw_only=True):
    """`budget_bytes` bounds the models together; `used_bytes` is what they are counted with."""

    budget_bytes: int
    used_bytes: int


class WorkerHealth(Result, kw_only=True):
    """How a model's workers fared: deaths so far, and until when its breaker refuses to start another."""

    model: str
    deaths: int
    last_death: ErrorObject | None = None
    breaker: Literal["closed", "open", "half_open"] = "closed"
    retry_at: float | None = None


class Status(Result, kw_only=True):
    version: str
    pid: int
    uptime_s: float
    rss_bytes: int
    models: StatusModels
    queue: StatusQueue
    clients: int
    subscribers: int
    memory: Memory
    workers: list[WorkerHealth]
    draining: bool = False
