"""A crowd that does not read, or sends rubbish, beside others who follow; `tools/dev.py faults crowd` is a larger one.

Times are for the command: here it is counted what came to whom, and what is held.
"""

from __future__ import annotations

import select
import time
from typing import Any

import psutil
import pytest

from mlxd_client import errors
from mlxd_client.sync.link import Link
from support.crowd import Crowd, Shape
from support.daemon import PATIENCE_S, Daemon

REQUESTS = 100  # more events than the kernel takes for who does not read
LOOK_S = 0.1
GROWTH_BYTES = 48 * 1024 * 1024


def test_a_crowd_costs_the_others_nothing_but_time() -> None:
    """Each follower is told of each request's end, none is cut off; who never reads is, and what waits is bounded."""
    shape = Shape.of(200)
    with (
        Daemon(bad_child="worker", write_stall_s=3) as daemon,
        Crowd(daemon.socket, shape) as crowd,
        daemon.client() as client,
    ):
        process = psutil.Process(daemon.pid)
        client.load("mlxd/cleanup", keep_alive=-1)
        assert client.status().clients >= shape.followers + shape.deaf + shape.idle
        before = process.memory_info().rss
        crowd.seen()
        for _ in range(REQUESTS):
            assert client.process("hello there").text == "hello there"
        finished, lost, cut = [0] * shape.followers, 0, 0
        give_up_at = time.monotonic() + PATIENCE_S
        while min(finished) < REQUESTS or not cut:
            assert time.monotonic() < give_up_at, f"{min(finished)} of {REQUESTS} are told, {cut} cut off"
            time.sleep(LOOK_S)
            client.ping()
            seen = crowd.seen()
            finished = [had + new for had, new in zip(finished, seen.finished, strict=True)]
            lost, cut = lost + seen.lost, cut + seen.again[0]
        assert finished == [REQUESTS] * shape.followers
        assert lost == 0
        assert process.memory_info().rss < before + GROWTH_BYTES


def test_who_is_hung_up_on_before_it_has_said_anything_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Link.begin

    with Daemon(bad_child="worker", max_clients=1) as daemon, daemon.client(reconnect=False) as first:
        first.ping()

        def late(link: Link, *arguments: Any) -> Any:
            poller = select.poll()
            poller.register(link._sock, select.POLLHUP)
            assert poller.poll(10_000)  # the other end is closed
            return begin(link, *arguments)

        monkeypatch.setattr(Link, "begin", late)
        with daemon.client(reconnect=False, start=False) as second, pytest.raises(errors.QueueFull):
            second.ping()


def test_one_too_many_is_hung_up_on_and_the_others_stay() -> None:
    with Daemon(bad_child="worker", max_clients=3) as daemon:
        clients = [daemon.client(reconnect=False) for _ in range(3)]
        for client in clients:
            client.ping()
        with daemon.client(reconnect=False, start=False) as late, pytest.raises(errors.QueueFull) as refused:
            late.ping()
        assert refused.value.details == {"limit": 3}
        for client in clients:
            client.ping()
            client.close()
        with daemon.client() as again:
            again.ping()
