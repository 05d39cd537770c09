"""Models that the settings want loaded, or want to stay: by a real daemon, seen by its clients."""

from __future__ import annotations

import json

from mlxd_client import Client
from mlxd_client.mirror import Mirror
from mlxd_client.sync import EventStream
from mlxd_client.types import Model
from support.daemon import Daemon, until

CLEANUP = "mlxd/cleanup"


def ready(client: Client, events: EventStream, model: str) -> Model:
    """Wait until a model is loaded that nobody asked for."""
    if Mirror(events.snapshot).models[model].state != "Ready":
        until(events, "loading_completed", id=model)
    return client.model(model)


def test_a_preloaded_model_is_there_before_anybody_asks_and_after_its_worker_died() -> None:
    settings = {"preload": json.dumps(["dictation"]), "aliases": json.dumps({"dictation": CLEANUP})}
    with Daemon(bad_child="worker", **settings) as daemon, daemon.client() as client, client.events() as events:
        model = ready(client, events, CLEANUP)
        assert (model.preload, model.pinned, model.leases) == (True, False, 0)
        assert model.idle_unload_at is not None, "it stays by its keep_alive"
        first = daemon.worker()
        first.kill()
        seen = [event.name for event in until(events, "loading_started")]
        assert "worker_died" in seen
        until(events, "loading_completed")
        assert daemon.worker().pid != first.pid


def test_what_cannot_be_preloaded_is_said_and_the_rest_is_loaded() -> None:
    wanted = json.dumps(["org/none", "/no/such/folder", CLEANUP])
    with Daemon(bad_child="worker", preload=wanted) as daemon, daemon.client() as client, client.events() as events:
        ready(client, events, CLEANUP)
        told = [line for line in map(json.loads, daemon.log().splitlines()) if line["event"] == "preload"]
        assert [(line["model"], line["kind"]) for line in told] == [
            ("org/none", "model_not_found"), ("/no/such/folder", "model_not_found"),
        ]  # fmt: skip


def test_a_pinned_model_has_no_idle_time_and_goes_by_name_only() -> None:
    settings = {"pinned": json.dumps([CLEANUP]), "keep_alive_s": 0}
    with Daemon(bad_child="worker", **settings) as daemon, daemon.client() as client, client.events() as events:
        other = daemon.model("other")
        model = client.load(CLEANUP, keep_alive=0)
        assert (model.pinned, model.idle_unload_at) == (True, None)
        assert client.process("x", model=other).text == "x"
        until(events, "unloaded", id=other)
        assert client.model(CLEANUP).state == "Ready"
        assert client.unload(CLEANUP).state == "Downloaded"
