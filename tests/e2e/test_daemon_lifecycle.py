"""A model's life as subscribers see it: every step is told, and what was told is the daemon's state."""

from __future__ import annotations

import pytest

from mlxd_client import Client
from mlxd_client.mirror import Mirror
from mlxd_client.sync import EventStream
from support.daemon import PATIENCE_S, Daemon, active, until

CLEANUP = "mlxd/cleanup"


def names(events: list) -> list[str]:
    """Their names, without those that only repeat another one's news."""
    return [event.name for event in events if event.name not in ("queue", "job")]


def assert_current(mirror: Mirror, events: EventStream, client: Client) -> None:
    """At a quiet point: everything that was told, and nothing else, is what a new subscriber is shown."""
    with client.events() as fresh:
        shown = Mirror(fresh.snapshot)
        while events.rev < fresh.rev:
            event = events.get(PATIENCE_S)
            assert event is not None
            mirror.apply(event)
        assert mirror.snapshot() == shown.snapshot()


def test_a_request_loads_its_model_and_keep_alive_unloads_it() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        mirror = Mirror(events.snapshot)
        assert mirror.models[CLEANUP].state == "Downloaded"
        assert client.process("one two", keep_alive=0).text == "one two"
        seen = until(events, "unloaded")
        assert names(seen) == [
            "loading_started", "loading_progress", "loading_completed", "generation_started", "generation_finished",
            "unloading_started", "unloaded",
        ]  # fmt: skip
        states = [event.model.state for event in seen if event.model is not None and event.name != "queue"]
        assert states == ["Loading", "Loading", "Ready", "Ready", "Downloaded"]
        started, finished = (event for event in seen if event.name.startswith("generation_"))
        assert started.request == finished.request is not None
        jobs = [event.job.state for event in seen if event.name == "job" and event.job is not None]
        assert jobs == ["queued", "running", "running", "done"]
        for event in seen:
            mirror.apply(event)
        assert_current(mirror, events, client)


def test_the_mirror_is_true_at_every_quiet_point() -> None:
    with Daemon(bad_child="worker", steps=True) as daemon, daemon.client() as client, client.events() as events:
        mirror = Mirror(events.snapshot)
        other = daemon.model("other")
        client.load(CLEANUP)
        assert_current(mirror, events, client)
        with client.acquire(other):
            assert_current(mirror, events, client)
        with client.stream_process("!slow 2", keep_alive=7) as stream:
            daemon.step(0)
            assert next(iter(stream)) == "piece0"
            assert_current(mirror, events, client)
        for event in active(events, 0):
            mirror.apply(event)
        assert_current(mirror, events, client)
        client.unload(CLEANUP)
        assert_current(mirror, events, client)
        client.unload(other)
        (daemon.home / "models" / "other" / "config.json").unlink()
        assert [model.id for model in client.models()] == [CLEANUP], "what the disk says, and nothing else"
        assert_current(mirror, events, client)
        assert other not in mirror.models


def test_a_subscriber_survives_its_connection() -> None:
    """The stream goes on where it was: what happened meanwhile is told, nothing twice."""
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        mirror = Mirror(events.snapshot)
        client.load(CLEANUP)
        for event in until(events, "loading_completed"):
            mirror.apply(event)
        assert events._link is not None
        events._link._sock.shutdown(2)  # as if the connection had broken
        client.unload(CLEANUP)
        seen = until(events, "unloaded")
        assert "resync" not in names(seen)
        revs = [event.rev for event in seen]
        assert revs == sorted(set(revs))
        for event in seen:
            mirror.apply(event)
        assert_current(mirror, events, client)


@pytest.mark.parametrize("crash", [False, True])
def test_a_subscriber_survives_the_daemon(crash: bool) -> None:
    """A new daemon is another epoch: the subscriber is told to start again, with the whole state."""
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        mirror = Mirror(events.snapshot)
        client.load(CLEANUP)
        for event in until(events, "loading_completed"):
            mirror.apply(event)
        epoch = events.epoch
        daemon.restart(crash=crash)
        seen = until(events, "resync")
        assert events.epoch != epoch
        assert ("daemon_stopping" in names(seen)) is not crash
        for event in seen:
            mirror.apply(event)
        assert mirror.models[CLEANUP].state == "Downloaded"
        assert not mirror.stopping
        assert_current(mirror, events, client)


def test_a_model_that_nobody_uses_goes_and_a_used_one_stays() -> None:
    with Daemon(bad_child="worker", keep_alive_s=0.2) as daemon, daemon.client() as client, client.events() as events:
        client.process("x")
        seen = until(events, "unloaded")
        gone = next(event for event in seen if event.name == "unloading_started")
        rested = next(e for e in reversed(seen) if e.model is not None and e.model.idle_unload_at is not None)
        assert rested.model is not None
        assert rested.model.idle_unload_at is not None
        assert 0 <= gone.at - rested.model.idle_unload_at + 0.01 < 5
        assert daemon.children() == []
        pinned = client.load(CLEANUP, keep_alive=-1)
        assert pinned.idle_unload_at is None
        until(events, "loading_completed")
        with client.acquire(CLEANUP):
            assert client.process("x", keep_alive=0).text == "x"
            model = client.model(CLEANUP)
            assert (model.state, model.leases, model.idle_unload_at) == ("Ready", 1, None)
        until(events, "unloaded")


def test_a_requests_keep_alive_lasts_as_long_as_the_model_stays_loaded() -> None:
    with Daemon(bad_child="worker", keep_alive_s=300) as daemon, daemon.client() as client, client.events() as events:
        client.process("x", keep_alive=0)
        until(events, "unloaded")
        client.process("x")
        (seen,) = [e for e in until(events, "queue", active=1) if e.name == "loading_completed"]
        assert seen.model is not None
        until(events, "queue", active=0)
        assert client.model(CLEANUP).state == "Ready"
        assert client.model(CLEANUP).idle_unload_at is not None
