"""What the core wants done. The runtime performs them, in order, and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mlxd_client.errors import RpcError
from mlxd_client.types import ErrorObject, Job, Model


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Spawn a worker and have it load the model; Loaded, LoadFailed or WorkerExited will follow."""

    worker: int
    model: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ask the worker to go, and see to it; WorkerExited will follow. Said once per worker. `why` is for the statistics:
    `asked`, `idle`, `room` (another model needs it), `cancelled`, `load_failed`, `stopping`, `pressure`, `recycled`."""

    worker: int
    why: str = field(default="asked", compare=False)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the request to the worker; Done, or the worker's exit, will follow."""

    rid: int
    worker: int


@dataclass(frozen=True, slots=True)
class CancelOnWorker:
    """Have the worker end the request at its next step; Done will follow."""

    rid: int
    worker: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """The worker's answer stands: pass it on. Like Answer and Fail, the last thing that is said of a request."""

    rid: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The goal of an Ensure or Unload is reached; `model` is how it stands."""

    rid: int
    model: Model


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends with this error. What the worker said of it so far may go into the details."""

    rid: int
    error: RpcError


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell the subscribers."""

    name: str
    model_id: str | None = None
    model: Model | None = None
    job: Job | None = None
    progress: float | None = None
    error: ErrorObject | None = None
    rid: int | None = None
    details: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StartFetcher:
    """Spawn a fetcher for this model of the hub; Fetched, FetchFailed or FetcherExited will follow."""

    fetcher: int
    job: str
    model: str
    repair: bool = False


@dataclass(frozen=True, slots=True)
class StopFetcher:
    """End the fetcher at once; FetcherExited will follow. Said once per fetcher."""

    fetcher: int


@dataclass(frozen=True, slots=True)
class Started:
    """The answer to a Download: the job that does it."""

    rid: int
    job: str


@dataclass(frozen=True, slots=True)
class DeleteFiles:
    """Remove the model from the disk, and what a download of it has left; FilesDeleted will follow."""

    model: str


@dataclass(frozen=True, slots=True)
class Deleted:
    """The answer to a Delete."""

    rid: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class DiscardPartial:
    """Remove what a cancelled download of this model has fetched so far. Nothing follows."""

    model: str


@dataclass(frozen=True, slots=True)
class Prune:
    """Remove revisions that an update has replaced and nobody uses any more, but for pinned ones. Nothing follows."""

    model: str
    revisions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReadItems:
    """Read items of a batch job that are not recorded, about `count` from this place on; BatchItems will follow."""

    job: str
    after: tuple[int, int]
    count: int
    run: int


@dataclass(frozen=True, slots=True)
class RunItem:
    """Ask the item's model, as one that yields, in the name of this client; BatchItemEnded will follow."""

    job: str
    place: int
    ticket: int
    client: int


@dataclass(frozen=True, slots=True)
class CancelItem:
    """Nobody waits for this item any more; what it comes to is dropped."""

    ticket: int


@dataclass(frozen=True, slots=True)
class RecordItem:
    """Record what came of the item; BatchRecorded will follow, or BatchStoreFailed."""

    job: str
    place: int
    ticket: int


@dataclass(frozen=True, slots=True)
class CountTry:
    """Record, some time, how often the item was tried in vain. Nothing follows."""

    job: str
    place: int
    tries: int


@dataclass(frozen=True, slots=True)
class EndBatch:
    """Record that the job has ended so; BatchRecorded will follow, or BatchStoreFailed."""

    job: str
    state: Literal["failed", "cancelled"]
    error: ErrorObject | None = None


@dataclass(frozen=True, slots=True)
class DeleteBatch:
    """Remove all that is recorded of a job that has ended; BatchGone will follow."""

    job: str


@dataclass(frozen=True, slots=True)
class WriteAgain:
    """Try to record again what could not be; BatchStoreWorks will follow, or BatchStoreFailed."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure memory now; Measured will follow."""


@dataclass(frozen=True, slots=True)
class Trim:
    """Have the worker give back memory that no request needs: of what is kept of prompts, this share may stay. 1 says
    that there is memory again."""

    worker: int
    keep: float


Action = (
    StartWorker | StopWorker | Dispatch | CancelOnWorker | Deliver | Answer | Fail | Publish | StartFetcher
    | Measure | Trim | StopFetcher | Started | DeleteFiles | Deleted | DiscardPartial | Prune | ReadItems | RunItem
    | CancelItem | RecordItem | CountTry | EndBatch | DeleteBatch | WriteAgain
)  # fmt: skip
