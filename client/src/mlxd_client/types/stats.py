"""What the daemon has counted and measured since it began, and the same as text for Prometheus."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from .base import ModelRef, Params, Result


class StatsParams(Params, kw_only=True):
    """Without `model`, of all models."""

    model: ModelRef | UnsetType = UNSET


class Distribution(Result, kw_only=True):
    """Of `count` values. `mean`, `stddev` (the sample's), `least` and `most` are exact; percentiles are at most 3.2 %
    off."""

    count: int
    mean: float
    stddev: float
    least: float
    most: float
    p50: float
    p90: float
    p95: float
    p99: float


class PromptCacheTotals(Result, kw_only=True):
    """As in `cache.list`, over all loads of the model; at most a heartbeat (a second) old."""

    hits: int = 0
    misses: int = 0
    saved_tokens: int = 0
    disk_hits: int = 0
    disk_tokens: int = 0
    disk_failures: int = 0


class SpeculationTotals(Result, kw_only=True):
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class ModelStats(Result, kw_only=True):
    """One model, by its id; `` (empty) stands for requests whose model was never found out, `others` for all models
    beyond the first 64.

    `requests` counts those that have ended, by method and by how: a finish reason, or the kind of an error. The
    distributions are in seconds, but `tokens_per_s`: `queue_s` of all requests that a worker got, and of those whose
    deadline passed before; `first_token_s`, from when the request was accepted, of all that got one; `total_s` and
    `tokens_per_s`, the rate of decoding, of those that were answered; `load_s` of loads. Requests of priority
    `batch`, which wait for as long as others want the model, count in `tokens_per_s` only. A distribution of nothing is
    absent. `now_tokens_per_s` and `recent_tokens_per_s` are what the model makes at present, over all requests: in the
    last second or so, and in the last ten.

    `load_failures` are by kind of error. `unloads` are by reason: `asked`, `idle`, `room` (it was evicted for another
    model), `pressure` (the machine is short of memory), `recycled` (it grew past its share), `cancelled`,
    `load_failed`, `stopping`. `deaths` of workers are by cause: `exit`, `hang`, `garbage`, `never_ready`,
    `spawn_failed`, or the name of a signal.
    """

    model: str
    requests: dict[str, dict[str, int]] = {}
    slow_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    now_tokens_per_s: float = 0.0
    recent_tokens_per_s: float = 0.0
    queue_s: Distribution | None = None
    load_s: Distribution | None = None
    first_token_s: Distribution | None = None
    total_s: Distribution | None = None
    tokens_per_s: Distribution | None = None
    load_failures: dict[str, int] = {}
    unloads: dict[str, int] = {}
    deaths: dict[str, int] = {}
    prompt_cache: PromptCacheTotals | None = None
    speculation: SpeculationTotals | None = None


class ClientTotals(Result, kw_only=True):
    """Connections: `open` now, `accepted` and `refused` so far. `refused_requests` were turned away as they came,
    before any model had to do with them, by method and kind of error."""

    open: int
    subscribers: int
    accepted: int
    refused: int
    refused_requests: dict[str, dict[str, int]] = {}


class EventTotals(Result, kw_only=True):
    """`dropped` were lost to subscribers that did not keep up, which were told so `lagged` times."""

    published: int
    dropped: int
    lagged: int


class DownloadTotals(Result, kw_only=True):
    """`ended` by state; `fetched_bytes` crossed the network, for downloads that failed, too."""

    ended: dict[str, int] = {}
    fetched_bytes: int = 0


class Stats(Result, kw_only=True):
    """All of it since `since_at`, when the daemon began. `log_lines_dropped` could not be written."""

    since_at: float
    models: list[ModelStats]
    clients: ClientTotals
    events: EventTotals
    downloads: DownloadTotals
    log_lines_dropped: int = 0


class MetricsResult(Result, kw_only=True):
    """`text` is in the exposition format that `content_type` names."""

    content_type: str
    text: str
