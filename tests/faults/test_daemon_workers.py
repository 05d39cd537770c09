"""Workers that die, hang or talk nonsense at any moment: their requests hear of it at once, and the next one works."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from mlxd_client import Client, errors
from support.daemon import Daemon, active, until

CLEANUP = "mlxd/cleanup"


def assert_died(call: Callable[[], object]) -> dict:
    """Returns: the details of the worker_died that the call must raise."""
    with pytest.raises(errors.WorkerDied) as caught:
        call()
    return caught.value.details


def assert_recovers(client: Client) -> None:
    assert client.process("all is well").text == "all is well"


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("!segfault", {"cause": "signal", "signal": "SIGSEGV"}),
        ("!abort", {"cause": "signal", "signal": "SIGABRT"}),
        ("!exit 3", {"cause": "exit", "exit_code": 3}),
        ("!exit 0", {"cause": "exit", "exit_code": 0}),
        ("!garbage", {"cause": "garbage"}),
    ],
)
def test_a_worker_that_dies_of_a_request(prompt: str, facts: dict) -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        client.load(CLEANUP)
        beside = client.stream_process("!slow 1000")
        active(events, 1)
        details = assert_died(lambda: client.process(prompt))
        assert facts.items() <= details.items()
        assert_died(beside.wait)
        if "exit_code" in facts:
            assert f"last words before exit {facts['exit_code']}" in details["last_words"]
            assert "\x1b" not in details["last_words"]
        died = until(events, "worker_died")[-1]
        assert died.model is not None
        assert (died.model.state, died.model.active, died.model.memory_bytes) == ("Downloaded", 0, None)
        assert died.error is not None
        assert died.error.kind == "worker_died"
        assert_recovers(client)
        (health,) = client.status().workers
        assert (health.model, health.deaths, health.breaker) == (CLEANUP, 1, "closed")


@pytest.mark.parametrize("prompt", ["!hang", "!spin"])
def test_a_worker_that_hangs_is_found_by_its_silence(prompt: str) -> None:
    with Daemon(bad_child="worker", heartbeat_s=1) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        assert assert_died(lambda: client.process(prompt))["cause"] == "hang"
        assert_recovers(client)


def test_a_worker_that_reads_a_long_text_is_not_taken_for_hung() -> None:
    long = "x" * 200_000
    with Daemon(bad_child="worker", heartbeat_s=1) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        assert client.count_tokens(f"!mute 2 {long}") == 3
        assert client.process(f"!mute 2 {long}").usage.prompt_tokens == 3
        assert client.status().workers == []
        assert assert_died(lambda: client.count_tokens("!mute 9"))["cause"] == "hang"


def test_a_killed_worker_is_told_within_a_second() -> None:
    """While idle, with requests running, with requests waiting: those that ran hear of it, those that wait go on."""
    with (
        Daemon(bad_child="worker", max_batch=1) as daemon,
        daemon.client() as client,
        client.events() as events,
    ):
        client.load(CLEANUP)
        daemon.worker().kill()
        until(events, "worker_died")
        assert client.model(CLEANUP).state == "Downloaded"
        running = client.stream_process("!slow 1000")
        until(events, "generation_started")
        waiting = client.stream_process("it had not begun")
        active(events, 1, 1)
        killed_at = time.monotonic()
        daemon.worker().kill()
        details = assert_died(running.wait)
        assert time.monotonic() - killed_at < 1.0
        assert details["signal"] == "SIGKILL"
        assert waiting.wait().text == "it had not begun"


def test_a_worker_killed_while_it_loads() -> None:
    with (
        Daemon(bad_child="late", steps=True) as daemon,
        daemon.client() as client,
        client.events() as events,
    ):
        stream = client.stream_process("x")
        until(events, "loading_started")
        daemon.worker().kill()
        assert assert_died(stream.wait)["signal"] == "SIGKILL"
        failed = [e.job for e in until(events, "worker_died") if e.job is not None][-1]
        assert failed.state == "failed"


@pytest.mark.parametrize(
    ("mode", "cause"), [("never-ready", "never_ready"), ("exit-early:7", "exit"), ("garbage-first", "garbage")]
)
def test_a_worker_that_never_becomes_one(mode: str, cause: str) -> None:
    with Daemon(bad_child=mode, ready_s=1) as daemon, daemon.client() as client:
        assert assert_died(lambda: client.process("x"))["cause"] == cause
        assert client.model(CLEANUP).state == "Downloaded"


@pytest.mark.parametrize("mode", ["segfault", "not-a-message", "huge", "mid-frame", "flood-stderr", "hang", "deaf"])
def test_a_worker_that_goes_wrong_once_it_is_ready(mode: str) -> None:
    """Whatever it does, a request for it ends with an error that says so, and the daemon goes on."""
    with Daemon(bad_child=mode, heartbeat_s=1, load_s=1) as daemon, daemon.client() as client:
        with pytest.raises((errors.WorkerDied, errors.LoadFailed)):
            client.process("x")
        client.ping()


def test_there_is_no_such_program() -> None:
    with Daemon(worker_command="/nowhere/worker") as daemon, daemon.client() as client:
        details = assert_died(lambda: client.process("x"))
        assert details["cause"] == "spawn_failed"
        client.ping()


def test_a_crash_loop_stops_and_a_load_heals() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        for _ in range(3):
            assert assert_died(lambda: client.process("!segfault"))["cause"] == "signal"
        (health,) = client.status().workers
        assert (health.deaths, health.breaker) == (3, "open")
        assert health.retry_at is not None
        assert health.last_death is not None
        until(events, "worker_died")
        spawned = daemon.log().count("child spawned")
        for call in (lambda: client.process("x"), lambda: client.acquire(CLEANUP), lambda: client.count_tokens("x")):
            details = assert_died(call)
            assert details["cause"] == "crash_loop"
            assert 0 < details["retry_after_s"] <= 300
        assert daemon.log().count("child spawned") == spawned, "it was tried all the same"
        assert client.load(CLEANUP).state == "Ready"
        assert client.status().workers[0].breaker == "closed"
        assert_recovers(client)


def test_one_models_crash_loop_is_no_other_models_business() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        healthy = daemon.model("healthy")
        for _ in range(3):
            assert_died(lambda: client.process("!abort"))
        assert assert_died(lambda: client.process("x"))["cause"] == "crash_loop"
        assert client.process("x", model=healthy).text == "x"


def test_a_worker_that_will_not_go_is_made_to() -> None:
    """An unload of a worker that heeds neither `stop` nor SIGTERM still ends, and gives the memory back."""
    with Daemon(bad_child="ignore-all") as daemon, daemon.client() as client:
        client.load(CLEANUP)
        worker = daemon.worker()
        assert client.unload(CLEANUP).state == "Downloaded"
        assert not worker.is_running()
        assert client.status().memory.used_bytes == 0


def test_an_error_of_one_request_is_only_its_own() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        with client.stream_process("!slow 20") as beside:
            with pytest.raises(errors.InternalError, match="asked to fail"):
                client.process("!error")
            assert beside.wait().usage.completion_tokens == 20
        assert client.status().workers == []


def test_a_lease_outlives_its_worker() -> None:
    """The next request loads the model again, and then it is kept as before."""
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        with client.acquire(CLEANUP):
            daemon.worker().kill()
            until(events, "worker_died", leases=1)
            assert client.process("again", keep_alive=0).text == "again"
            until(events, "queue", active=0, leases=1)
            model = client.model(CLEANUP)
            assert (model.state, model.idle_unload_at) == ("Ready", None)
        until(events, "unloaded")
