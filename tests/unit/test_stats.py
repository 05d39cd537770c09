"""The statistics: sound figures in bounded memory, and Prometheus's format as its specification has it."""

from __future__ import annotations

import math
import statistics as exact
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.childwire import Heartbeat, PromptCacheStats
from mlxd.stats import Finished, Gauges, Statistics, exposition
from mlxd.stats.histogram import RELATIVE_ERROR, Histogram
from mlxd.stats.moments import Moments
from mlxd.stats.statistics import MAX_MODELS, OTHERS
from mlxd_client import types
from support.exposition import read

GAUGES = Gauges(
    since_at=1_700_000_000.0, clients=types.ClientTotals(open=2, subscribers=1, accepted=5, refused=3),
    events=types.EventTotals(published=7, dropped=4, lagged=1), fetched_bytes=11, log_lines_dropped=0,
)  # fmt: skip
STATUS = types.Status(
    version="1.2.3", pid=1, uptime_s=1.0, rss_bytes=30_000_000, clients=2, subscribers=1, workers=[],
    models=types.StatusModels(known=0, loaded=0), queue=types.StatusQueue(waiting=0, running=0),
    memory=types.Memory(budget_bytes=100, used_bytes=10),
)  # fmt: skip
JOBS = [
    types.Job(job=f"batch-{number}", kind="batch", state=state)
    for number, state in enumerate(("running", "running", "queued", "done"))
]  # fmt: skip
PROCESS = exposition.Process(resident_bytes=30_000_000, cpu_s=1.25, open_files=12)

within_range = st.floats(min_value=2.0**-15, max_value=2.0**19)


def text(stats: Statistics, models: list[types.Model] | None = None) -> str:
    return exposition.render(stats.models, stats.told(GAUGES, 0.0), STATUS, models or [], JOBS, PROCESS)


# --- moments ------------------------------------------------------------------------------------------------------


@given(st.lists(within_range, min_size=2, max_size=200))
def test_moments_are_what_the_library_computes_of_all_values(values: list[float]) -> None:
    moments = Moments()
    for value in values:
        moments.add(value)
    assert moments.mean == pytest.approx(exact.fmean(values), rel=1e-12)
    assert moments.stddev == pytest.approx(exact.stdev(values), rel=1e-9, abs=1e-9 * max(values))
    assert (moments.count, moments.lowest, moments.highest) == (len(values), min(values), max(values))


def test_variance_survives_a_large_offset() -> None:
    """Sums of squares would lose it all: 1e9 squared leaves no room for differences of one."""
    moments = Moments()
    values = [1e9 + offset for offset in (4.0, 7.0, 13.0, 16.0)] * 1000
    for value in values:
        moments.add(value)
    assert moments.stddev == pytest.approx(exact.stdev(values), rel=1e-9)
    naive = sum(v * v for v in values) / len(values) - (sum(values) / len(values)) ** 2
    assert abs(naive - exact.pvariance(values)) > 1.0  # so that this test tells the two apart


# --- histogram ----------------------------------------------------------------------------------------------------


@given(st.lists(within_range, min_size=1, max_size=300), st.floats(min_value=0.0, max_value=1.0))
def test_quantiles_are_within_the_error_that_is_promised(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    right = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert abs(histogram.quantile(q) - right) <= RELATIVE_ERROR * right * (1 + 1e-12)


@given(st.lists(st.floats(min_value=0.0, max_value=2.0**22), max_size=100))
def test_counts_up_to_a_power_of_two_are_exact(values: list[float]) -> None:
    """Values on a bound included, which Prometheus counts as within."""
    values = [*values, 0.5, 1.0, 1.0, 2.0]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    powers = range(-10, 11)
    assert histogram.up_to(powers) == [sum(value <= 2.0**power for value in values) for power in powers]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 5e-324, sys.float_info.max])
def test_what_lies_beyond_counts_as_the_end(value: float) -> None:
    histogram = Histogram()
    histogram.add(value)
    assert histogram.quantile(0.5) in (2.0**-16, pytest.approx(2.0**20, rel=RELATIVE_ERROR))
    assert Histogram().quantile(0.5) == 0.0


# --- what happened ------------------------------------------------------------------------------------------------


def test_a_request_counts_where_it_should() -> None:
    stats = Statistics()
    usage = types.Usage(prompt_tokens=100, cached_tokens=60, completion_tokens=21)
    guess = types.Speculation(kind="lookup", drafted_tokens=10, accepted_tokens=4)
    stats.finished(
        Finished("m", "chat", "stop", queue_s=0.25, first_token_s=0.5, decode_s=2.0, total_s=2.5, usage=usage,
                 speculation=guess, slow=True)
    )  # fmt: skip
    stats.finished(Finished("m", "chat", "worker_died", queue_s=0.75))
    stats.finished(Finished("", "process", "model_not_found"))
    nobody, model = stats.told(GAUGES, 0.0).models
    assert nobody.requests == {"process": {"model_not_found": 1}}
    assert nobody.queue_s is None
    assert model.requests == {"chat": {"stop": 1, "worker_died": 1}}
    assert (model.prompt_tokens, model.cached_tokens, model.completion_tokens, model.slow_requests) == (100, 60, 21, 1)
    assert model.queue_s is not None
    assert (model.queue_s.count, model.queue_s.mean, model.queue_s.least, model.queue_s.most) == (2, 0.5, 0.25, 0.75)
    assert model.tokens_per_s is not None
    assert model.tokens_per_s.p50 == 10.0  # of a single value, exact
    assert model.speculation == types.SpeculationTotals(drafted_tokens=10, accepted_tokens=4)
    assert [of.model for of in stats.told(GAUGES, 0.0, "m").models] == ["m"]


def test_models_are_bounded() -> None:
    stats = Statistics()
    for number in range(10 * MAX_MODELS):
        stats.finished(Finished(f"/folder/{number}", "process", "stop"))
    assert len(stats.models) == MAX_MODELS + 1
    assert stats.models[OTHERS].requests["process", "stop"] == 9 * MAX_MODELS


def test_the_present_rate_comes_from_heartbeats() -> None:
    stats = Statistics()
    for second in range(21):
        total = 10 * second if second <= 15 else 150 + 30 * (second - 15)
        stats.beat("m", 1, Heartbeat(made_tokens=total), None, float(second))
    (model,) = stats.told(GAUGES, 20.5).models
    assert model.now_tokens_per_s == 30.0
    assert model.recent_tokens_per_s == pytest.approx((5 * 10 + 5 * 30) / 10)
    (model,) = stats.told(GAUGES, 30.0).models  # it has not been heard of for so long
    assert (model.now_tokens_per_s, model.recent_tokens_per_s) == (0.0, 0.0)
    stats.beat("m", 2, Heartbeat(made_tokens=5), None, 31.0)  # another worker begins anew
    stats.beat("m", 2, Heartbeat(made_tokens=6), None, 32.0)
    assert stats.told(GAUGES, 32.0).models[0].now_tokens_per_s == 1.0


def test_prompt_cache_totals_go_on_over_loads() -> None:
    stats = Statistics()
    first, second = PromptCacheStats(hits=3, misses=1, saved_tokens=30), PromptCacheStats(hits=5, misses=1)
    stats.beat("m", 1, Heartbeat(prompt_cache=first), None, 0.0)
    stats.beat("m", 1, Heartbeat(prompt_cache=second), first, 1.0)
    stats.beat("m", 2, Heartbeat(prompt_cache=PromptCacheStats(hits=1)), None, 2.0)
    assert stats.told(GAUGES, 2.0).models[0].prompt_cache == types.PromptCacheTotals(hits=6, misses=1, saved_tokens=30)


# --- for Prometheus -----------------------------------------------------------------------------------------------


def test_the_text_is_as_the_specification_has_it() -> None:
    stats = Statistics()
    for took in (0.001, 0.5, 0.75, 1.0, 3.0, 5000.0):
        stats.finished(Finished("org/a", "chat", "stop", queue_s=took, total_s=took))
    stats.finished(Finished("org/b", "embed", "done"))
    stats.loaded("org/a", 2.0)
    stats.unloaded("org/a", "room")
    stats.died("org/a", "SIGSEGV")
    stats.beat("org/a", 1, Heartbeat(prompt_cache=PromptCacheStats(hits=2)), None, 0.0)
    stats.downloads["done"] += 1
    found = read(text(stats, [types.Model(id="org/a", state="Ready", source="hub", memory_bytes=5, active=2)]))
    assert found["mlxd_requests_total"].value(model="org/a", method="chat", outcome="stop") == 6
    assert found["mlxd_build_info"].value(version="1.2.3") == 1
    assert found["process_start_time_seconds"].value() == 1_700_000_000
    assert found["mlxd_model_unloads_total"].value(model="org/a", reason="room") == 1
    assert found["mlxd_worker_deaths_total"].value(model="org/a", cause="SIGSEGV") == 1
    assert found["mlxd_prompt_cache_hits_total"].value(model="org/a") == 2
    assert found["mlxd_model_requests_running"].value(model="org/a") == 2
    assert found["mlxd_events_dropped_total"].value() == 4
    assert found["mlxd_jobs"].value(kind="batch", state="running") == 2
    assert sum(found["mlxd_jobs"].samples.values()) == 3
    assert found["mlxd_memory_pressure"].value(level="normal") == 1
    assert sum(found["mlxd_memory_pressure"].samples.values()) == 1
    took = found["mlxd_request_seconds"].samples

    def bucket(le: str) -> float:
        return took["mlxd_request_seconds_bucket", (("le", le), ("model", "org/a"))]

    assert [bucket(le) for le in ("0.5", "1", "4", "1024", "+Inf")] == [2, 4, 5, 5, 6]
    assert took["mlxd_request_seconds_sum", (("model", "org/a"),)] == pytest.approx(5005.251)


@pytest.mark.parametrize("odd", ['a"b', "back\\slash", "line\nbreak", "\x1b[2J", "ümläut", "\udc80", "} 1\nmlxd_x 2"])
def test_odd_names_cannot_break_the_text(odd: str) -> None:
    stats = Statistics()
    stats.finished(Finished(odd, "chat", "stop"))
    whole = text(stats)
    whole.encode()  # a lone surrogate would not go
    ((_, labels),) = read(whole)["mlxd_requests_total"].samples
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in odd)
    assert dict(labels)["model"] == shown


def test_a_folder_is_named_without_its_path() -> None:
    stats = Statistics()
    for path in ("/home/someone/secret-project/model", "/elsewhere/model"):
        stats.finished(Finished(path, "chat", "stop"))
    whole = text(stats)
    names = {dict(labels)["model"] for _, labels in read(whole)["mlxd_requests_total"].samples}
    assert len(names) == 2
    assert all(name.startswith("model#") for name in names)
    assert "someone" not in whole
    assert "secret" not in whole
