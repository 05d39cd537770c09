"""The wire's structs: params, results, events, states. Data only; nothing here acts.

Sizes end in `_bytes`, durations in `_s` (seconds), times in `_at` (Unix seconds). Absent means unset; nothing is
null: params use msgspec.UNSET, so that an explicit null is refused by name; results use None for what was absent.
Params refuse unknown fields; results tolerate them, since the daemon may be newer than the client.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

__all__ = [
    "EVENT_TOPICS",
    "FINISH_REASONS",
    "MAX_DEPTH",
    "MAX_FRAME_BYTES",
    "MAX_INTEGER",
    "PROTOCOL",
    "TOPICS",
    "UNSET",
    "BadFile",
    "CancelJobParams",
    "CancelParams",
    "CancelResult",
    "CatalogEntry",
    "CatalogResult",
    "ChatParams",
    "ClientInfo",
    "Completion",
    "DeleteResult",
    "DownloadParams",
    "DownloadResult",
    "Empty",
    "ErrorObject",
    "Event",
    "GenerateParams",
    "HelloParams",
    "HelloResult",
    "Job",
    "JobParams",
    "JobsResult",
    "Lease",
    "LeaseParams",
    "Limits",
    "ListParams",
    "LoadParams",
    "Memory",
    "Message",
    "Model",
    "ModelParams",
    "ModelState",
    "ModelsResult",
    "OptionalModelParams",
    "Plan",
    "PlanParams",
    "ProcessParams",
    "ServerInfo",
    "Since",
    "Snapshot",
    "Status",
    "StatusModels",
    "StatusQueue",
    "Stream",
    "SubscribeParams",
    "SubscribeResult",
    "SubscriptionParams",
    "Timings",
    "TokenLogprob",
    "TokensParams",
    "TokensResult",
    "ToolCall",
    "Usage",
    "VerifyResult",
    "WorkerHealth",
]

PROTOCOL = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 64
MAX_INTEGER = 2**53

ModelState = Literal["NotDownloaded", "Downloading", "Downloaded", "Loading", "Ready"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
FINISH_REASONS: tuple[str, ...] = ("stop", "length", "tool_calls", "cancelled")

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
    "unloading_started": "models",
    "unloaded": "models",
    "deleting_started": "models",
    "deleted": "models",
    "error": "models",
    "worker_died": "models",
    "job": "jobs",
    "queue": "queue",
    "generation_started": "generation",
    "generation_finished": "generation",
    "memory_pressure": "system",
    "config_changed": "system",
    "daemon_stopping": "system",
}
TOPICS: frozenset[str] = frozenset(EVENT_TOPICS.values())


class Params(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Base of everything that a client sends."""


class Result(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Base of everything that the daemon sends."""


# --- connection ---------------------------------------------------------------------------------------------------

Name = Annotated[str, Meta(min_length=1, max_length=256)]
ModelRef = Annotated[str, Meta(min_length=1, max_length=4096)]


class ClientInfo(Params, kw_only=True):
    name: Name
    version: Annotated[str, Meta(max_length=64)] = ""


class HelloParams(Params, kw_only=True):
    """`protocol` is the range of versions the client speaks, both ends included."""

    protocol: tuple[int, int]
    client: ClientInfo


class ServerInfo(Result, kw_only=True):
    name: str
    version: str
    pid: int


class Limits(Result, kw_only=True):
    frame_bytes: int
    depth: int
    requests_in_flight: int
    queue: int
    subscriber_events: int
    subscriber_bytes: int


class HelloResult(Result, kw_only=True):
    """`epoch` names this run of the daemon: revisions and request ids mean nothing across epochs."""

    protocol: int
    server: ServerInfo
    epoch: str
    limits: Limits
    capabilities: list[str]


class Empty(Params, kw_only=True):
    """No parameters, or nothing to say."""


# --- models -------------------------------------------------------------------------------------------------------


class ErrorObject(Result, kw_only=True):
    """What went wrong, as a field of a model, a job or an event."""

    kind: str
    message: str
    details: dict[str, Any] = {}


class Model(Result, kw_only=True):
    """One model as the daemon sees it.

    Lifecycle fields change with events of topic `models`; the activity fields (from `memory_bytes` on) with `queue`.
    `phase` details a state: `queued` (a load that waits for memory, or a download for its turn), `loading`,
    `unloading`, `deleting`; of a download `planning`, `downloading`, `verifying`, `retrying`. An update is downloaded
    beside what is there: the state stays, `progress` is then the download's. `latest_revision` is set where the hub is
    known to have a newer one than `revision`.
    """

    id: str
    state: ModelState
    source: Literal["builtin", "hub", "path"]
    revision: str | None = None
    latest_revision: str | None = None
    size_bytes: int | None = None
    phase: str | None = None
    progress: float | None = None
    error: ErrorObject | None = None
    context_length: int | None = None
    memory_bytes: int | None = None
    active: int = 0
    waiting: int = 0
    leases: int = 0
    idle_unload_at: float | None = None


ACTIVITY_FIELDS: tuple[str, ...] = ("memory_bytes", "active", "waiting", "leases", "idle_unload_at")


class ModelParams(Params, kw_only=True):
    model: ModelRef


class OptionalModelParams(Params, kw_only=True):
    model: ModelRef | UnsetType = UNSET


KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]


class LoadParams(Params, kw_only=True):
    """`keep_alive` in seconds: -1 never unloads, 0 unloads at once when idle."""

    model: ModelRef
    keep_alive: KeepAlive | UnsetType = UNSET
    adapter: ModelRef | UnsetType = UNSET
    draft_model: ModelRef | UnsetType = UNSET


class ListParams(Params, kw_only=True):
    """`updates` asks the hub for each model's newest revision first; what it does not answer is left out."""

    updates: bool = False


class ModelsResult(Result, kw_only=True):
    models: list[Model]


Revision = Annotated[str, Meta(min_length=1, max_length=200)]


class DownloadParams(Params, kw_only=True):
    """`model` is a repository of the hub, an alias of one, or `org/name@revision`, which is what `revision` makes of
    it: a model of its own, that stays as it is. `repair` also checks the files that are there, and fetches bad ones
    anew."""

    model: ModelRef
    revision: Revision | UnsetType = UNSET
    repair: bool = False


class DownloadResult(Result, kw_only=True):
    """The job that fetches the model: a new one, or the one that does so already."""

    job: str


class PlanParams(Params, kw_only=True):
    """`context_length`, in tokens, is what KV cache is planned for; unset means what a load reserves."""

    model: ModelRef
    revision: Revision | UnsetType = UNSET
    context_length: Annotated[int, Meta(ge=1, le=16_777_216)] | UnsetType = UNSET


class Plan(Result, kw_only=True):
    """What having and running a model would take, before anything happens.

    `download_bytes` is what is not on disk yet. `weights_bytes` and `kv_bytes` are in memory. `fits` says whether the
    model can run beside what must stay; `evicts` names the models that would go to make room, in order. `load_s` is how
    long the last load took, where there was one.
    """

    model: str
    download_bytes: int
    disk_free_bytes: int
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    memory_available_bytes: int
    fits: bool
    revision: str | None = None
    evicts: list[str] = []
    load_s: float | None = None


class DeleteResult(Result, kw_only=True):
    freed_bytes: int


class BadFile(Result, kw_only=True):
    """`reason`: `missing`, `size`, `hash` (other bytes than the hub has under this name), or `safetensors`."""

    file: str
    reason: str


class VerifyResult(Result, kw_only=True):
    ok: bool
    bad_files: list[BadFile] = []


class CatalogEntry(Result, kw_only=True):
    """A recommended model. `uses`: `general`, `light`, `coding`, `vision`, or a user's own word. `smallest_mac_gb` is
    the unified memory of the smallest Mac that runs it comfortably; sizes that are not known are 0. `state` is the
    model's on this machine; `fits` whether it can run here."""

    model: str
    uses: list[str]
    size_bytes: int
    memory_bytes: int
    smallest_mac_gb: int
    name: str = ""
    note: str = ""
    default: bool = False
    state: ModelState = "NotDownloaded"
    fits: bool = True


class CatalogResult(Result, kw_only=True):
    """`memory_bytes` is what all models together may take on this machine."""

    entries: list[CatalogEntry]
    memory_bytes: int


class Lease(Result, kw_only=True):
    lease: str
    model: Model


class LeaseParams(Params, kw_only=True):
    lease: Name


# --- jobs ---------------------------------------------------------------------------------------------------------


class Job(Result, kw_only=True):
    """Whatever outlives a request. Of a download: `phase` as in Model, `done_bytes` of `total_bytes` are on disk,
    `rate_bytes_s` is the average of the last seconds, `attempts` the most that any of its files has needed so far."""

    job: str
    kind: Literal["download", "load", "batch"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    model: str | None = None
    progress: float | None = None
    attempts: int = 1
    phase: str | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None
    rate_bytes_s: float | None = None
    revision: str | None = None
    error: ErrorObject | None = None
    started_at: float | None = None
    ended_at: float | None = None


class JobParams(Params, kw_only=True):
    job: Name


class CancelJobParams(Params, kw_only=True):
    """`discard` also removes what a download has fetched so far; else a later one goes on from there."""

    job: Name
    discard: bool = False


class JobsResult(Result, kw_only=True):
    jobs: list[Job]


# --- generation ---------------------------------------------------------------------------------------------------

Role = Literal["system", "user", "assistant", "tool"]
Text = str


class Message(Params, kw_only=True):
    """One turn. `content` is text; tool fields belong to assistant and tool turns."""

    role: Role
    content: Text = ""
    name: Name | UnsetType = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET
    tool_call_id: Name | UnsetType = UNSET


Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class GenerateParams(Params, kw_only=True):
    """The options that `process` and `chat` share. Unset means: the model's own default, else the daemon's.

    `schema` makes the answer JSON that fits a JSON Schema; true stands for any JSON. `grammar` makes it fit a grammar
    in the dialect of Lark that llguidance reads. They are enforced token by token; at most one of them can be given.
    """

    model: ModelRef | UnsetType = UNSET
    stream: bool = False
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=5)] | UnsetType = UNSET
    top_p: Annotated[float, Meta(gt=0, le=1)] | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    min_p: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | UnsetType = UNSET
    presence_penalty: Annotated[float, Meta(ge=-10, le=10)] | UnsetType = UNSET
    frequency_penalty: Annotated[float, Meta(ge=-10, le=10)] | UnsetType = UNSET
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-1000, le=1000)]], Meta(max_length=1024)] | UnsetType = (
        UNSET
    )
    seed: Annotated[int, Meta(ge=0, le=MAX_INTEGER)] | UnsetType = UNSET
    stop: Annotated[list[Stop], Meta(max_length=16)] | UnsetType = UNSET
    logprobs: Annotated[int, Meta(ge=0, le=20)] | UnsetType = UNSET
    schema: dict[str, Any] | bool | UnsetType = UNSET
    grammar: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    thinking: bool | UnsetType = UNSET
    keep_alive: KeepAlive | UnsetType = UNSET
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] | UnsetType = UNSET
    priority: Literal["interactive", "batch"] = "interactive"
    cache_prompt: bool | UnsetType = UNSET


class ProcessParams(GenerateParams, kw_only=True):
    """One prompt in, one text out."""

    prompt: Annotated[str, Meta(min_length=1)]
    system: str | UnsetType = UNSET


class ChatParams(GenerateParams, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    tools: list[dict[str, Any]] | UnsetType = UNSET
    tool_choice: str | dict[str, Any] | UnsetType = UNSET


class Usage(Result, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timings(Result, kw_only=True):
    """Where the time of one request went, in seconds since it was accepted or, for parts, their own length."""

    queue_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


class ToolCall(Result, kw_only=True):
    id: str
    name: str
    arguments: dict[str, Any]


class TokenLogprob(Result, kw_only=True):
    """One generated token's natural-log probability, and the most likely alternatives, best first."""

    token: str
    token_id: int
    logprob: float
    top: list[tuple[str, float]] = []


class Completion(Result, kw_only=True):
    """`invented` names the words of the answer that its prompt does not account for; only models that promise to
    rewrite faithfully (see `guard` in their mlxd.json) are checked. Whoever needs certainty keeps the prompt then.
    `structured` is the parsed answer where a `schema` was asked and the answer is whole; null, and what the wire cannot
    carry, are in `text` only."""

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    structured: Any = None
    logprobs: list[TokenLogprob] | None = None
    invented: list[str] | None = None


class Stream(Result, kw_only=True):
    """A `stream` notification: the next piece of the answer to request `id`. `seq` counts from 0 without gaps."""

    id: int | str
    seq: int
    text: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    phase: Literal["queued", "downloading", "loading", "prompt"] | None = None
    progress: float | None = None


class TokensParams(Params, kw_only=True):
    model: ModelRef | UnsetType = UNSET
    text: str | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)] | UnsetType = UNSET


class TokensResult(Result, kw_only=True):
    tokens: int


class CancelParams(Params, kw_only=True):
    """`id` of a request on the same connection."""

    id: int | str


class CancelResult(Result, kw_only=True):
    """Whether there was such a request to cancel; its own response says how it ended."""

    cancelled: bool


# --- status -------------------------------------------------------------------------------------------------------


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


# --- events -------------------------------------------------------------------------------------------------------


class Since(Params, kw_only=True):
    """A position in the event log: what the last event, or the subscription's answer, said."""

    epoch: Annotated[str, Meta(max_length=64)]
    rev: Annotated[int, Meta(ge=0)]


class SubscribeParams(Params, kw_only=True):
    """`topics` holds topics or event names (see EVENT_TOPICS); `models` ids. Unset means all."""

    topics: Annotated[list[str], Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    models: Annotated[list[ModelRef], Meta(min_length=1, max_length=256)] | UnsetType = UNSET
    since: Since | UnsetType = UNSET


class Snapshot(Result, kw_only=True):
    """All state that a subscription's deltas change: every matching model and every job that has not ended."""

    models: list[Model] = []
    jobs: list[Job] = []
    stopping: bool = False


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
