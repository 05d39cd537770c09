"""The statistics as text for Prometheus: its exposition format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/. Labels hold ids, kinds and reasons, never what was said;
there are as many as there are models, and statistics.py bounds those.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mlxd_client import types

from .statistics import ModelCounts, Sample

__all__ = ["CONTENT_TYPE", "Process", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The bounds of histograms, as powers of two: 1 ms to 17 minutes, and 1 to 4096 tokens a second.
_DURATIONS = range(-10, 11)
_RATES = range(13)

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What the system says of the daemon's process; in bytes and seconds."""

    resident_bytes: int
    cpu_s: float
    open_files: int


class _Text:
    """Families of metrics, each with its lines together, as the format wants them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, told: str, samples: Iterable[tuple[Labels, float]]) -> None:
        lines = [_line(name, labels, value) for labels, value in samples]
        if lines:
            self._begin(name, kind, told)
            self._lines += lines

    def histogram(self, name: str, told: str, powers: Sequence[int], samples: Iterable[tuple[Labels, Sample]]) -> None:
        begun = False
        for labels, sample in samples:
            if sample.histogram is None:
                continue
            if not begun:
                self._begin(name, "histogram", told)
                begun = True
            count = sample.moments.count
            for power, seen in zip(powers, sample.histogram.up_to(powers), strict=True):
                self._lines.append(_line(f"{name}_bucket", {**labels, "le": _number(2.0**power)}, seen))
            self._lines.append(_line(f"{name}_bucket", {**labels, "le": "+Inf"}, count))
            self._lines.append(_line(f"{name}_sum", labels, sample.moments.total))
            self._lines.append(_line(f"{name}_count", labels, count))

    def _begin(self, name: str, kind: str, told: str) -> None:
        escaped = told.replace("\\", r"\\").replace("\n", r"\n")
        self._lines += [f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"]

    def __str__(self) -> str:
        return "".join(line + "\n" for line in self._lines)


def _line(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{told}}} {_number(value)}" if told else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def label(model: str) -> str:
    """What stands for a model: its id, or of a folder its name and what tells it from others of that name. The rest of
    a path is nobody's business."""
    if not model.startswith("/"):
        return model
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{model.rstrip('/').rpartition('/')[2]}#{digest}"


def render(
    counts: Mapping[str, ModelCounts], stats: types.Stats, status: types.Status, models: Sequence[types.Model],
    jobs: Sequence[types.Job], process: Process,
) -> str:  # fmt: skip
    """All metrics of one daemon.

    Args:
        counts: what was counted, by model.
        stats, status: what it comes to, and how the daemon is.
        models: those that are loaded or being loaded.
        jobs: all that are known.
    """
    text = _Text()
    _daemon(text, stats, status, process)
    _requests(text, [({"model": label(model)}, counts[model]) for model in sorted(counts)], stats)
    _models(text, [({"model": label(model)}, counts[model]) for model in sorted(counts)])
    _now(text, models, jobs, stats)
    return str(text)


def _daemon(text: _Text, stats: types.Stats, status: types.Status, process: Process) -> None:
    def one(name: str, kind: str, told: str, value: float) -> None:
        text.family(name, kind, told, [({}, value)])

    text.family("mlxd_build_info", "gauge", "Which mlxd this is.", [({"version": status.version}, 1)])
    one("process_start_time_seconds", "gauge", "When the daemon began, in Unix seconds.", stats.since_at)
    one("process_resident_memory_bytes", "gauge", "What the daemon itself holds.", process.resident_bytes)
    one("process_cpu_seconds_total", "counter", "Processor time of the daemon itself.", process.cpu_s)
    one("process_open_fds", "gauge", "Open file descriptors of the daemon.", process.open_files)
    one("mlxd_memory_budget_bytes", "gauge", "What all models may hold together.", status.memory.budget_bytes)
    one("mlxd_memory_used_bytes", "gauge", "What the models are counted with.", status.memory.used_bytes)
    memory = status.memory
    one("mlxd_memory_footprint_bytes", "gauge", "What the workers hold by the system's count.", memory.footprint_bytes)
    if memory.available_bytes is not None:
        one("mlxd_memory_available_bytes", "gauge", "What the system has for new users.", memory.available_bytes)
    pressure = memory.pressure.level
    text.family(
        "mlxd_memory_pressure", "gauge", "1 for how short of memory the machine is now, 0 for the others.",
        [({"level": level}, level == pressure) for level in get_args(types.PressureLevel)],
    )  # fmt: skip
    one("mlxd_clients", "gauge", "Open connections.", stats.clients.open)
    one("mlxd_subscribers", "gauge", "Subscriptions to events.", stats.clients.subscribers)
    one("mlxd_clients_accepted_total", "counter", "Connections that were served.", stats.clients.accepted)
    one("mlxd_clients_refused_total", "counter", "Connections that were refused.", stats.clients.refused)
    one("mlxd_events_published_total", "counter", "Events.", stats.events.published)
    one("mlxd_events_dropped_total", "counter", "Events lost to slow subscribers.", stats.events.dropped)
    one("mlxd_log_lines_dropped_total", "counter", "Lines that the log could not take.", stats.log_lines_dropped)
    one("mlxd_downloaded_bytes_total", "counter", "What downloads fetched.", stats.downloads.fetched_bytes)
    refused = stats.clients.refused_requests
    text.family(
        "mlxd_requests_refused_total", "counter", "Requests turned away as they came, by method and kind of error.",
        (
            ({"method": method, "kind": kind}, count)
            for method, by in sorted(refused.items())
            for kind, count in sorted(by.items())
        ),
    )  # fmt: skip
    ended = stats.downloads.ended
    text.family(
        "mlxd_downloads_total", "counter", "Downloads that ended, by how.",
        (({"state": state}, ended[state]) for state in sorted(ended)),
    )  # fmt: skip


Counted = Sequence[tuple[dict[str, str], ModelCounts]]


def _requests(text: _Text, models: Counted, stats: types.Stats) -> None:
    text.family(
        "mlxd_requests_total", "counter", "Requests that ended, by method and by finish reason or kind of error.",
        (
            ({**labels, "method": method, "outcome": outcome}, count)
            for labels, counts in models
            for (method, outcome), count in sorted(counts.requests.items())
        ),
    )  # fmt: skip
    plain: tuple[tuple[str, str, Callable[[ModelCounts], int]], ...] = (
        ("mlxd_slow_requests_total", "Requests that were logged as slow.", lambda counts: counts.slow),
        ("mlxd_prompt_tokens_total", "Tokens of prompts, cached ones included.", lambda counts: counts.prompt_tokens),
        ("mlxd_cached_tokens_total", "Tokens of prompts not computed anew.", lambda counts: counts.cached_tokens),
        ("mlxd_completion_tokens_total", "Tokens of answers.", lambda counts: counts.completion_tokens),
    )
    for name, told, value in plain:
        text.family(name, "counter", told, [(labels, value(counts)) for labels, counts in models])
    text.histogram(
        "mlxd_request_queue_seconds", "How long requests waited for a worker.", _DURATIONS,
        ((labels, counts.queue_s) for labels, counts in models),
    )  # fmt: skip
    text.histogram(
        "mlxd_request_first_token_seconds", "From a request to the first token of its answer.", _DURATIONS,
        ((labels, counts.first_token_s) for labels, counts in models),
    )  # fmt: skip
    text.histogram(
        "mlxd_request_seconds", "From a request to its whole answer.", _DURATIONS,
        ((labels, counts.total_s) for labels, counts in models),
    )  # fmt: skip
    text.histogram(
        "mlxd_request_tokens_per_second", "How fast single requests decoded.", _RATES,
        ((labels, counts.tokens_per_s) for labels, counts in models),
    )  # fmt: skip


def _models(text: _Text, models: Counted) -> None:
    def by(name: str, told: str, kind: str, of: Callable[[ModelCounts], Mapping[str, int]]) -> None:
        text.family(
            name, "counter", told,
            (({**labels, kind: key}, count) for labels, counts in models for key, count in sorted(of(counts).items())),
        )  # fmt: skip

    text.histogram(
        "mlxd_model_load_seconds", "How long loads took.", _DURATIONS,
        ((labels, counts.load_s) for labels, counts in models),
    )  # fmt: skip
    by("mlxd_model_load_failures_total", "Loads that failed.", "kind", lambda counts: counts.load_failures)
    by("mlxd_model_unloads_total", "Unloads; `room` is an eviction.", "reason", lambda counts: counts.unloads)
    by("mlxd_worker_deaths_total", "Workers that died unasked.", "cause", lambda counts: counts.deaths)
    for field, told in (
        ("hits", "Requests that found the beginning of their prompt."),
        ("misses", "Requests that found nothing of their prompt."),
        ("saved_tokens", "Tokens that were not computed anew."),
        ("disk_hits", "Requests that took up tokens from files."),
        ("disk_failures", "Files that could not be read or written."),
    ):
        name = f"mlxd_prompt_cache_{field}_total"
        text.family(name, "counter", told, [(to, c.prompt_cache[field]) for to, c in models if c.prompt_cache])
    for field, told in (
        ("drafted_tokens", "Tokens that were guessed ahead."),
        ("accepted_tokens", "Guessed tokens that were right."),
    ):
        name = f"mlxd_speculation_{field}_total"
        text.family(name, "counter", told, [(to, c.speculation[field]) for to, c in models if c.speculation])


def _now(text: _Text, models: Sequence[types.Model], jobs: Sequence[types.Job], stats: types.Stats) -> None:
    open_jobs = Counter((job.kind, job.state) for job in jobs if job.state in ("queued", "running"))
    text.family(
        "mlxd_jobs", "gauge", "Downloads, loads and batch jobs that have not ended.",
        [({"kind": kind, "state": state}, count) for (kind, state), count in sorted(open_jobs.items())],
    )  # fmt: skip
    shown = sorted(models, key=lambda model: label(model.id))
    plain: tuple[tuple[str, str, Callable[[types.Model], float]], ...] = (
        ("mlxd_model_ready", "1 where a model is loaded, 0 where it is being loaded.", lambda m: m.state == "Ready"),
        ("mlxd_model_memory_bytes", "What a model and its caches hold.", lambda m: m.memory_bytes or 0),
        ("mlxd_model_requests_running", "Requests that a model works on.", lambda m: m.active),
        ("mlxd_model_requests_waiting", "Requests that wait for a model.", lambda m: m.waiting),
        ("mlxd_model_leases", "Leases that keep a model loaded.", lambda m: m.leases),
    )
    for name, told, value in plain:
        text.family(name, "gauge", told, [({"model": label(model.id)}, value(model)) for model in shown])
    text.family(
        "mlxd_model_tokens_per_second", "gauge", "What a model made in the last ten seconds, over all requests.",
        [({"model": label(of.model)}, of.recent_tokens_per_s) for of in stats.models],
    )  # fmt: skip
