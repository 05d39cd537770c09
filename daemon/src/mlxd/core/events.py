"""What the core is told. Each is a fact or a wish of the outside world; the time comes beside it, in seconds.

`rid` is the runtime's number for one request; `client` for one connection; `worker` and `fetcher` for one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject

from .limits import Limits, Rules
from .pressure import Reading

Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Found:
    """The disk holds this model, whole. `need_bytes` is the memory that running it is expected to take. An adapter is
    never run by itself."""

    model: str
    source: Literal["builtin", "hub", "path"]
    need_bytes: int
    revision: str | None = None
    size_bytes: int | None = None
    context_length: int | None = None
    kind: Literal["model", "adapter"] = "model"


@dataclass(frozen=True, slots=True)
class Lost:
    """The disk does not hold this model any more."""

    model: str


@dataclass(frozen=True, slots=True)
class Submit:
    """A request to generate. `timeout_s` counts from when it was accepted, `waited_s` ago; `keep_alive_s` changes the
    model's, where given. One that `yields` is an item of a batch job: it may have to step aside at any time, and is
    asked for again later."""

    rid: int
    client: int
    model: str
    priority: Priority = "interactive"
    timeout_s: float | None = None
    keep_alive_s: float | None = None
    waited_s: float = 0.0
    yields: bool = False


@dataclass(frozen=True, slots=True)
class Ensure:
    """The goal that the model be Ready: answered once it is. With a `lease`, it stays so while the client holds it.
    Where it is not loaded yet, room is made for a draft model of `draft_bytes`, too. `asking`: the lease is for a
    question to its worker, which must be answered before that worker goes."""

    rid: int
    client: int
    model: str
    lease: str | None = None
    keep_alive_s: float | None = None
    draft_bytes: int = 0
    asking: bool = False


@dataclass(frozen=True, slots=True)
class Attach:
    """The goal that the worker, whose model is Ready, have so much memory for a draft model: answered once it has."""

    rid: int
    client: int
    worker: int
    draft_bytes: int


@dataclass(frozen=True, slots=True)
class Attached:
    """A draft model for which Attach got `draft_bytes` is in the worker, in place of the one before. None: it is not,
    and nothing has changed."""

    worker: int
    draft: str | None
    draft_bytes: int


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
    """`discard`: of a download, also remove what it has fetched so far."""

    job: str
    discard: bool = False


@dataclass(frozen=True, slots=True)
class Download:
    """The wish to have this model of the hub, or its newest revision: answered by Started with the job, at once.

    Where a download of it is under way already, with that one. `job` is set where an earlier daemon had begun it: it
    goes on under its old id, began at `started_at` on the wall clock, and nobody waits for an answer.
    """

    rid: int
    client: int
    model: str
    repair: bool = False
    job: str | None = None
    started_at: float | None = None


@dataclass(frozen=True, slots=True)
class FetchProgress:
    fetcher: int
    phase: Literal["planning", "downloading", "verifying", "retrying"]
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The model is on disk, whole and verified, as `found` says."""

    fetcher: int
    found: Found


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The fetcher lives, and has given up."""

    fetcher: int
    error: RpcError


@dataclass(frozen=True, slots=True)
class FetcherExited:
    """The process is gone. `error` says how, where nobody had asked it to go."""

    fetcher: int
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """The wish that the disk hold no file of this model, nor of a download of it that was cut short."""

    rid: int
    client: int
    model: str


@dataclass(frozen=True, slots=True)
class FilesDeleted:
    """What DeleteFiles came to; with an `error`, the model is as it was or gone, as the next Found or Lost will say."""

    model: str
    freed_bytes: int
    error: RpcError | None = None


@dataclass(frozen=True, slots=True)
class Newest:
    """The hub's newest revision of this model."""

    model: str
    revision: str


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
    """`draft` is the draft model that was loaded with it: what it takes is part of the model's needs. `capabilities`
    is what the worker says that the model can do; None where it does not. `needs_bytes` is what running the model
    takes as its worker turned out, where that could be measured."""

    worker: int
    memory_bytes: int
    context_length: int
    draft: str | None = None
    capabilities: tuple[str, ...] | None = None
    needs_bytes: int | None = None


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
    """What a worker's model and caches hold by MLX's count."""

    worker: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The system's memory, None where it cannot be read; and what the workers hold by its count, as far as known, all
    read together from `began_at` on."""

    began_at: float
    reading: Reading | None
    footprints: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """The worker answered this request, well or badly; its slot is free."""

    rid: int


@dataclass(frozen=True, slots=True)
class BatchFound:
    """There is this batch job: a new one, or one that an earlier daemon had. Times are Unix seconds."""

    job: str
    total: int
    created_at: float
    model: str | None = None
    name: str | None = None
    open: bool = False
    state: Literal["running", "queued", "done", "failed", "cancelled"] = "running"
    done: int = 0
    failed: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    error: ErrorObject | None = None


@dataclass(frozen=True, slots=True)
class BatchGrew:
    """An open job has so many items now, all of this model if that is given."""

    job: str
    total: int
    model: str | None = None


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """The job's items are to run, as recorded at `started_at` (Unix seconds): all that are not recorded themselves."""

    job: str
    started_at: float


@dataclass(frozen=True, slots=True)
class BatchItems:
    """The answer to a ReadItems of this run: each item's place, and how often it was tried already."""

    job: str
    run: int
    items: tuple[tuple[int, int], ...]
    cursor: tuple[int, int]
    more: bool


@dataclass(frozen=True, slots=True)
class BatchItemEnded:
    """An item was answered, or refused with an `error`; `began`: a worker had it by then."""

    ticket: int
    error: RpcError | None = None
    began: bool = True


@dataclass(frozen=True, slots=True)
class BatchRecorded:
    """What ended under these tickets is recorded, and with it how many of the job's items are. `ended`: so has the job
    itself, at `ended_at` (Unix seconds)."""

    job: str
    tickets: tuple[int, ...]
    done: int
    failed: int
    ended: Literal["done", "failed", "cancelled"] | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class BatchGone:
    """Nothing is recorded of this job any more, which had ended."""

    job: str


@dataclass(frozen=True, slots=True)
class BatchStoreFailed:
    """Batch jobs cannot be read or recorded at present."""

    error: RpcError


@dataclass(frozen=True, slots=True)
class BatchStoreWorks:
    """They can again."""


@dataclass(frozen=True, slots=True)
class BatchLost:
    """What was recorded of batch jobs is damaged, and set aside: all of them are lost."""

    error: RpcError


@dataclass(frozen=True, slots=True)
class Configure:
    """The settings are these from now on. What is accepted already stays so; models that do not fit any more go."""

    limits: Limits
    rules: Rules


@dataclass(frozen=True, slots=True)
class Preload:
    """The wish that a model on this disk be loaded, which nobody waits for: none goes for it, unless it is pinned."""

    model: str


@dataclass(frozen=True, slots=True)
class Adapted:
    """Requests that name no adapter get this one from the worker now."""

    worker: int
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Prewarmed:
    """So many system turns have been computed ahead by the worker since its model was loaded."""

    worker: int
    turns: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: whatever is due is done."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The daemon is about to stop: accepted work goes on, new work is refused."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Another daemon may take over: downloads let go of the disk and wait, until GoOn or for good."""


@dataclass(frozen=True, slots=True)
class GoOn:
    """No other daemon came: downloads go on."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Another daemon has taken over: accepted generations go on, all else is asked of that one; models go as soon as
    they are idle. Said after Hold."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The daemon that this one took over from still holds so much memory; 0 once it is gone."""

    held_bytes: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The drain is over: all that still waits or runs is refused, all workers are stopped."""


Event = (
    Found | Lost | Submit | Ensure | Release | Unload | Cancel | CancelJob | ClientGone | LoadProgress | Loaded
    | LoadFailed | WorkerExited | MemoryReport | Done | Tick | Drain | Hold | GoOn | Leave | Elsewhere | Abort
    | Download | FetchProgress | Fetched | FetchFailed | FetcherExited | Delete | FilesDeleted | Newest | Attach
    | Attached | Configure | Preload | Adapted | Prewarmed | Measured
    | BatchFound | BatchGrew | BatchStarted | BatchItems | BatchItemEnded | BatchRecorded | BatchGone | BatchStoreFailed
    | BatchStoreWorks | BatchLost
)  # fmt: skip
