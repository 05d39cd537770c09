"""The daemon's health in numbers."""

from __future__ import annotations

from typing import Literal

import msgspec

from .base import ErrorObject, Params, PressureLevel, Result


class StatusModels(Result, kw_only=True):
    known: int
    loaded: int


class StatusQueue(Result, kw_only=True):
    waiting: int
    running: int


class MemoryHolder(Result, kw_only=True):
    """What one loaded model is counted with, what its worker holds by the system's count, and what it may hold."""

    model: str
    reserved_bytes: int
    footprint_bytes: int | None = None
    share_bytes: int | None = None


class Pressure(Result, kw_only=True):
    """How short of memory the machine is. `source` says by what: `kernel` (macOS), `psi` or `cgroup` (stalls), `oom` (a
    process was killed for lack of memory), `available` (next to none is left); `since_at` since when."""

    level: PressureLevel = "normal"
    source: str | None = None
    since_at: float | None = None


class Memory(Result, kw_only=True):
    """`budget_bytes` bounds the models together; `used_bytes` is what they are counted with, of which `footprint_bytes`
    are in use by the system's count. `available_bytes` of `capacity_bytes` are what the system, or the container, has
    for new users; loads leave `reserve_bytes` of them. What is not known is absent."""

    budget_bytes: int
    used_bytes: int
    footprint_bytes: int = 0
    reserve_bytes: int = 0
    capacity_bytes: int | None = None
    available_bytes: int | None = None
    measured_at: float | None = None
    pressure: Pressure = msgspec.field(default_factory=Pressure)
    models: list[MemoryHolder] = []


class WorkerHealth(Result, kw_only=True):
    """How a model's workers fared: deaths so far, and until when its breaker refuses to start another."""

    model: str
    deaths: int
    last_death: ErrorObject | None = None
    breaker: Literal["closed", "open", "half_open"] = "closed"
    retry_at: float | None = None


class ShutdownParams(Params, kw_only=True):
    """`if_idle`: only if nobody needs the daemon, so that another can be started in its place."""

    if_idle: bool = False


class RestartResult(Result, kw_only=True):
    """The daemon that has taken over; `pid` is absent where a service manager is yet to start it."""

    version: str
    pid: int | None = None


class Status(Result, kw_only=True):
    """`activated`: launchd or systemd holds the socket, and started the daemon for its first client."""

    """`config_error`: the settings' file cannot be used as it is now, and what it said before stands."""

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
    tasks: int = 0
    draining: bool = False
    activated: bool = False
    config_error: ErrorObject | None = None
