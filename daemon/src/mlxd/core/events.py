"""What the core is told. Each is a fact or a wish of the outside world; the time comes beside it, in seconds.

`rid` is the runtime's number for one request; `client` for one connection; `worker` for one worker process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxd_client.errors import RpcError

Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Found:
    """The disk holds this model, whole. `need_bytes` is the memory that running it is expected to take."""

    model: str
    source: Literal["builtin", "hub", "path"]
    need_bytes: int
    revision: str | None = None
    size_bytes: int | None = None
    context_length: int | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The disk does not hold this model any more."""

    model: str


@dataclass(frozen=True, slots=True)
class Submit:
    """A request to generate. `timeout_s` counts from now; `keep_alive_s` changes the model's, where given."""

    rid: int
    client: int
    model: str
    priority: Priority = "interactive"
    timeout_s: float | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Ensure:
    """The goal that the model be Ready: answered once it is. With a `lease`, it stays so while the client holds it."""

    rid: int
    client: int
    model: str
    lease: str | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    client: int
    lease: str


@dataclass(frozen=True, slots=True)
class Unload:
    """The goal that the model hold no memory: answered once its worker is gone; refused while it is in use."""

    rid: int
    client: int
    model: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller gave up on a request of any kind. Unknown ones are ignored: the answer may be under way."""

    rid: int


@dataclass(frozen=True, slots=True)
class CancelJob:
    job: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The connection closed: its requests are cancelled and its leases end."""

    client: int


@dataclass(frozen=True, slots=True)
class LoadProgress:
    worker: int
    progress: float


@dataclass(frozen=True, slots=True)
class Loaded:
    worker: int
    memory_bytes: int
    context_length: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The worker lives, but its model could not be loaded."""

    worker: int
    error: RpcError


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The process is gone and its memory is back. `error` says how, where nobody had asked it to go."""

    worker: int
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    worker: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """The worker answered this request, well or badly; its slot is free."""

    rid: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: whatever is due is done."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The daemon is about to stop: accepted work goes on, new work is refused."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The drain is over: all that still waits or runs is refused, all workers are stopped."""


Event = (
    Found | Lost | Submit | Ensure | Release | Unload | Cancel | CancelJob | ClientGone | LoadProgress | Loaded
    | LoadFailed | WorkerExited | MemoryReport | Done | Tick | Drain | Abort
)  # fmt: skip
