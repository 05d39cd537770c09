"""How fast, when again, and when it is enough."""

from __future__ import annotations

from mlxd.fetch.pace import MAX_DELAY_S, Failures, Flow, Limiter, delay_s


def test_a_flow_forgets_what_is_older_than_its_window() -> None:
    flow = Flow(12.0, 100.0)
    flow.add(101.0, 12_000)
    assert not flow.full(111.9)
    assert flow.full(112.0)
    assert flow.rate(112.0) == 1000
    assert flow.rate(113.1) == 0


def test_a_trickle_after_a_burst_is_seen_within_the_window() -> None:
    flow = Flow(30.0, 0.0)
    flow.add(0.5, 50_000_000)
    seen = next(second for second in range(1, 100) if not flow.add(float(second), 2048) and flow.rate(second) < 4096)
    assert 30 <= seen <= 34


def test_a_pause_of_our_own_does_not_count() -> None:
    flow = Flow(10.0, 0.0)
    flow.add(9.0, 100_000)
    flow.pause(1000.0)
    assert flow.rate(1009.5) > 9_000
    assert not flow.full(1009.5)


def test_a_limited_rate_is_shared_by_all_who_ask() -> None:
    limiter = Limiter(1000)
    assert limiter.take(500, 10.0) == 0.5
    assert limiter.take(500, 10.0) == 1.0
    assert limiter.take(1000, 20.0) == 1.0, "what was not used is not saved up"
    assert Limiter(0).take(10**9, 0.0) == 0.0


def test_delays_double_within_bounds_and_honour_the_server() -> None:
    for failures in range(1, 12):
        plain = min(MAX_DELAY_S, 0.5 * 2 ** (failures - 1))
        for _ in range(20):
            assert 0.74 * plain <= delay_s(failures) <= min(MAX_DELAY_S, 1.26 * plain)
    assert len({delay_s(3) for _ in range(20)}) > 1
    assert delay_s(1, 7.0) == 7.0
    assert delay_s(1, 86_400.0) == MAX_DELAY_S


def test_network_failures_are_forgiven_after_progress_and_wrong_bytes_never() -> None:
    failures = Failures(3)
    for _ in range(20):
        failures.brought(Failures.FORGIVEN_AFTER_BYTES)
        failures.network()
        assert failures.count == 1
    failures.brought(Failures.FORGIVEN_AFTER_BYTES - 1)
    failures.network()
    assert not failures.exhausted
    failures.hash()
    assert failures.exhausted
    failures.brought(10**9)
    failures.network()
    assert failures.count == 2
    failures.hash()
    failures.hash()
    assert failures.exhausted
