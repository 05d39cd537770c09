"""What happened since the daemon began, by model, and what it comes to. A few additions for each request that ended;
nothing for a token.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from mlxd_client import types

from ..childwire import Heartbeat, PromptCacheStats
from .histogram import Histogram
from .moments import Moments

__all__ = ["Finished", "Gauges", "ModelCounts", "Sample", "Statistics"]

# Models beyond so many are counted together, so that nobody can make this grow by inventing folders.
MAX_MODELS = 64
OTHERS = "others"
# The recent rate is over so many seconds; a worker that was silent for longer than this makes nothing now.
_RECENT_S = 10.0
_SILENT_S = 3.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended. Durations in seconds, None where it did not get so far.

    Attributes:
        outcome: its finish reason, or the kind of its error.
        queue_s: None where it did not count as waiting for a worker.
        decode_s: 0 where its rate is not to be counted.
        total_s: of one that was answered.
    """

    model: str
    method: str
    outcome: str
    queue_s: float | None = None
    first_token_s: float | None = None
    decode_s: float = 0.0
    total_s: float | None = None
    usage: types.Usage | None = None
    speculation: types.Speculation | None = None
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is counted elsewhere, as it stands now."""

    since_at: float
    clients: types.ClientTotals
    events: types.EventTotals
    fetched_bytes: int
    log_lines_dropped: int


class Sample:
    """Values of one kind, from moments and percentiles."""

    __slots__ = ("histogram", "moments")

    def __init__(self) -> None:
        self.moments = Moments()
        self.histogram: Histogram | None = None  # made by the first value: most models never get one of each kind

    def add(self, value: float) -> None:
        if self.histogram is None:
            self.histogram = Histogram()
        self.histogram.add(value)
        self.moments.add(value)

    def told(self) -> types.Distribution | None:
        moments, histogram = self.moments, self.histogram
        if histogram is None:
            return None

        def at(q: float) -> float:
            return min(max(histogram.quantile(q), moments.lowest), moments.highest)

        return types.Distribution(
            count=moments.count, mean=moments.mean, stddev=moments.stddev, least=moments.lowest, most=moments.highest,
            p50=at(0.5), p90=at(0.9), p95=at(0.95), p99=at(0.99),
        )  # fmt: skip


class _Pace:
    """What a worker makes at present, from the running total in its heartbeats."""

    __slots__ = ("_totals", "_worker")

    def __init__(self) -> None:
        self._worker = -1
        self._totals: deque[tuple[float, int]] = deque()

    def beat(self, worker: int, total: int, now: float) -> None:
        if worker != self._worker:
            self._worker = worker
            self._totals.clear()
        self._totals.append((now, total))
        while now - self._totals[0][0] > _RECENT_S:
            self._totals.popleft()

    def told(self, now: float) -> tuple[float, float]:
        """Tokens a second between the last two heartbeats, and over the last ten seconds."""
        totals = self._totals
        if len(totals) < 2 or now - totals[-1][0] > _SILENT_S:
            return 0.0, 0.0
        (then, before), (last, total) = totals[-2], totals[-1]
        now_s = (total - before) / (last - then) if last > then else 0.0
        first, least = totals[0]
        return now_s, (total - least) / (last - first) if last > first else 0.0


@dataclass(slots=True)
class ModelCounts:
    """One model's."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # by method and outcome
    slow: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: Sample = field(default_factory=Sample)
    load_s: Sample = field(default_factory=Sample)
    first_token_s: Sample = field(default_factory=Sample)
    total_s: Sample = field(default_factory=Sample)
    tokens_per_s: Sample = field(default_factory=Sample)
    load_failures: Counter[str] = field(default_factory=Counter)
    unloads: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    prompt_cache: Counter[str] = field(default_factory=Counter)
    speculation: Counter[str] = field(default_factory=Counter)
    pace: _Pace = field(default_factory=_Pace)

    def told(self, model: str, now: float) -> types.ModelStats:
        requests: dict[str, dict[str, int]] = {}
        for (method, outcome), count in self.requests.items():
            requests.setdefault(method, {})[outcome] = count
        now_per_s, recent_per_s = self.pace.told(now)
        return types.ModelStats(
            model=model, requests=requests, slow_requests=self.slow, prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens, completion_tokens=self.completion_tokens, now_tokens_per_s=now_per_s,
            recent_tokens_per_s=recent_per_s, queue_s=self.queue_s.told(), load_s=self.load_s.told(),
            first_token_s=self.first_token_s.told(), total_s=self.total_s.told(),
            tokens_per_s=self.tokens_per_s.told(), load_failures=dict(self.load_failures),
            unloads=dict(self.unloads), deaths=dict(self.deaths),
            prompt_cache=types.PromptCacheTotals(**self.prompt_cache) if self.prompt_cache else None,
            speculation=types.SpeculationTotals(**self.speculation) if self.speculation else None,
        )  # fmt: skip


class Statistics:
    """Of one daemon. Each method takes in what happened; `told` says what it comes to.

    Attributes:
        models: by id, at most MAX_MODELS and OTHERS.
        downloads: that ended, by state.
    """

    def __init__(self) -> None:
        self.models: dict[str, ModelCounts] = {}
        self.downloads: Counter[str] = Counter()

    def of(self, model: str) -> ModelCounts:
        counts = self.models.get(model)
        if counts is None:
            if model and len(self.models) >= MAX_MODELS:
                model = OTHERS
            counts = self.models.setdefault(model, ModelCounts())
        return counts

    # --- requests -------------------------------------------------------------------------------------------------

    def finished(self, request: Finished) -> None:
        counts = self.of(request.model)
        counts.requests[request.method, request.outcome] += 1
        counts.slow += request.slow
        if request.queue_s is not None:
            counts.queue_s.add(request.queue_s)
        if request.first_token_s is not None:
            counts.first_token_s.add(request.first_token_s)
        if request.total_s is not None:
            counts.total_s.add(request.total_s)
        usage = request.usage
        if usage is not None:
            counts.prompt_tokens += usage.prompt_tokens
            counts.cached_tokens += usage.cached_tokens
            counts.completion_tokens += usage.completion_tokens
            # The first token is the prompt's; a rate needs one more.
            if usage.completion_tokens > 1 and request.decode_s > 0:
                counts.tokens_per_s.add((usage.completion_tokens - 1) / request.decode_s)
        if request.speculation is not None:
            counts.speculation["drafted_tokens"] += request.speculation.drafted_tokens
            counts.speculation["accepted_tokens"] += request.speculation.accepted_tokens

    # --- workers --------------------------------------------------------------------------------------------------

    def loaded(self, model: str, load_s: float) -> None:
        self.of(model).load_s.add(load_s)

    def load_failed(self, model: str, kind: str) -> None:
        self.of(model).load_failures[kind] += 1

    def unloaded(self, model: str, reason: str) -> None:
        self.of(model).unloads[reason] += 1

    def died(self, model: str, cause: str) -> None:
        self.of(model).deaths[cause] += 1

    def beat(self, model: str, worker: int, heartbeat: Heartbeat, before: PromptCacheStats | None, now: float) -> None:
        """A worker said how it is. `before` is what it said of its prompt cache last."""
        counts = self.of(model)
        counts.pace.beat(worker, heartbeat.made_tokens, now)
        cache = heartbeat.prompt_cache
        if cache is not None:
            for name in types.PromptCacheTotals.__struct_fields__:
                more = getattr(cache, name) - (0 if before is None else getattr(before, name))
                counts.prompt_cache[name] += max(0, more)

    # --- what it comes to -----------------------------------------------------------------------------------------

    def told(self, gauges: Gauges, now: float, only: str | None = None) -> types.Stats:
        """All of it, or `only` one model's; `now` on the clock of `beat`."""
        return types.Stats(
            since_at=gauges.since_at,
            models=[
                self.models[model].told(model, now) for model in sorted(self.models) if only is None or model == only
            ],
            clients=gauges.clients, events=gauges.events,
            downloads=types.DownloadTotals(ended=dict(self.downloads), fetched_bytes=gauges.fetched_bytes),
            log_lines_dropped=gauges.log_lines_dropped,
        )  # fmt: skip
