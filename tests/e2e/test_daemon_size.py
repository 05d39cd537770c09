"""What the daemon takes while it does nothing, and that much traffic leaves nothing behind."""

from __future__ import annotations

import contextlib
import socket
import sys

import psutil
import pytest

from mlxd_client import Client, errors
from mlxd_client.codec import encode
from mlxd_client.sync import EventStream
from support.daemon import Daemon, until

CLEANUP = "mlxd/cleanup"
MEGABYTE = 1_000_000


def settled(client: Client, events: EventStream) -> None:
    """Wait until nothing runs or waits."""
    while (queue := client.status().queue).running or queue.waiting:
        until(events, "queue")


def test_an_idle_daemon_is_small_and_alone() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        client.models()
        process = psutil.Process(daemon.pid)
        assert daemon.children() == []
        assert process.memory_info().rss < 40 * MEGABYTE
        assert client.status().rss_bytes < 40 * MEGABYTE
        client.process("x")
        client.unload(CLEANUP)
        until(events, "unloaded")
        assert daemon.children() == []
        assert process.memory_info().rss < 40 * MEGABYTE
        assert client.status().memory.used_bytes == 0


def only_us(client: Client) -> None:
    """Wait until the daemon has noticed that all others left, and let it close what they had."""
    while client.status().clients > 2:  # this one, and its events
        client.ping()
    client.ping()


def burst(daemon: Daemon, client: Client, events: EventStream, number: int) -> None:
    """Ten requests that end in every way there is."""
    finished = [client.stream_process(f"!slow {n % 3}" if n % 3 else "a b") for n in range(4)]
    cancelled = [client.stream_process("!slow 1000") for _ in range(2)]
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(daemon.socket))
            params = {"prompt": "!slow 1000", "stream": True}
            sock.sendall(encode({"jsonrpc": "2.0", "id": 1, "method": "process", "params": params}))
    with daemon.client() as passing, passing.events(), contextlib.suppress(errors.DeadlineExceeded):
        passing.process("!slow 1000", timeout_s=0.01)
    with contextlib.suppress(errors.InternalError):
        client.process("!error")
    for stream in cancelled:
        stream.close()
    for stream in finished:
        stream.wait()
    if number % 10 == 9:
        settled(client, events)
        client.unload(CLEANUP)
    settled(client, events)


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors and threads in /proc")
def test_much_traffic_leaves_nothing_behind() -> None:
    # A short event log, so that what it rightly keeps is kept from the first round on.
    with (
        Daemon(bad_child="worker", log_level="error", event_log=64) as daemon,
        daemon.client() as client,
        client.events(["queue"]) as events,
    ):
        process = psutil.Process(daemon.pid)
        for number in range(10):
            burst(daemon, client, events, number)
        only_us(client)
        counts = (process.num_fds(), process.num_threads(), len(daemon.children()))
        memory = process.memory_info().rss
        for number in range(20):
            burst(daemon, client, events, number)
        only_us(client)
        assert (process.num_fds(), process.num_threads(), len(daemon.children())) == counts
        assert process.memory_info().rss - memory < MEGABYTE
        assert client.status().subscribers == 1
        assert len(client.jobs()) <= 64


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give memory back when they see fit")
def test_large_requests_are_not_kept() -> None:
    """Megabytes in and out, one by one and at once, and with them the memory that they took."""
    large = "x" * 8_000_000
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        crowd = [daemon.client().__enter__() for _ in range(4)]
        for _ in range(2):
            assert client.process(large).text == large
            streams = [one.stream_process(f"!slow 2 {large}") for one in crowd]
            streams.pop().close()
            for stream in streams:
                stream.wait()
        for one in crowd:
            one.close()
        settled(client, events)
        only_us(client)
        assert psutil.Process(daemon.pid).memory_info().rss < 40 * MEGABYTE


def test_more_clients_than_descriptors() -> None:
    """Where the system gives few, those who come too late are turned away; the others, and what is new, are served."""
    with Daemon(bad_child="worker", files=128) as daemon, daemon.client() as client:
        crowd = []
        for _ in range(200):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(daemon.socket))
            crowd.append(sock)
        assert client.process("still here").text == "still here"
        assert [model.id for model in client.models()] == [CLEANUP]
        assert 20 < client.status().clients < 40
        for sock in crowd:
            sock.close()
        while client.status().clients > 1:
            client.ping()
        with daemon.client() as late:
            assert late.process("and again").text == "and again"
