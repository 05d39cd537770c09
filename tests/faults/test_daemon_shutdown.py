"""How the daemon ends when it is asked to: running work gets its time, new work a refusal, nothing outlives it."""

from __future__ import annotations

import signal
import socket
import time

import pytest

from mlxd_client import errors
from mlxd_client.codec import encode
from support.daemon import PATIENCE_S, Daemon, active, until

CLEANUP = "mlxd/cleanup"


def ended(daemon: Daemon) -> int:
    """Wait for its exit. Returns the status."""
    assert daemon.process is not None
    return daemon.process.wait(PATIENCE_S)


def terminate(daemon: Daemon) -> None:
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)


def test_running_work_is_finished_and_new_work_refused() -> None:
    with (
        Daemon(bad_child="worker", steps=True, max_batch=1, drain_s=30) as daemon,
        daemon.client(reconnect=False) as client,
        client.events() as events,
    ):
        running = client.stream_process("!slow 2")
        waiting = client.stream_process("it was accepted")
        active(events, 1, 1)
        terminate(daemon)
        until(events, "daemon_stopping")
        for refused in (
            lambda: client.process("x"),
            lambda: client.load(CLEANUP),
            lambda: client.acquire(CLEANUP),
            lambda: client.count_tokens("x"),
        ):
            with pytest.raises(errors.ShuttingDown):
                refused()
        assert client.status().draining
        daemon.step(0, 1)
        assert running.wait().text == "piece0 piece1"
        assert waiting.wait().text == "it was accepted"
        assert ended(daemon) == 0
        assert not daemon.socket.exists()


@pytest.mark.parametrize("mode", ["worker", "ignore-stop", "ignore-all"])
def test_what_is_not_done_in_time_is_refused_and_the_daemon_goes(mode: str) -> None:
    """Under full load, with workers that heed nothing too: out within the drain and two seconds."""
    with (
        Daemon(bad_child=mode, steps=True, max_batch=2, drain_s=0.5) as daemon,
        daemon.client(reconnect=False) as client,
        client.events() as events,
    ):
        streams = [client.stream_process("!slow 9") for _ in range(12)]
        loading = client.stream_process("!slow 9", model=daemon.model("other"))
        active(events, 2, 10)
        daemon.step(0)
        children = daemon.children()
        asked_at = time.monotonic()
        terminate(daemon)
        for stream in (*streams, loading):
            with pytest.raises(errors.ShuttingDown):
                stream.wait()
        assert ended(daemon) == 0
        assert time.monotonic() - asked_at < 0.5 + 2.0
        assert not any(child.is_running() for child in children)


def test_a_second_signal_hurries() -> None:
    with (
        Daemon(bad_child="worker", steps=True, drain_s=3600) as daemon,
        daemon.client(reconnect=False) as client,
        client.events() as events,
    ):
        stream = client.stream_process("!slow 2")
        active(events, 1)
        terminate(daemon)
        until(events, "daemon_stopping")
        terminate(daemon)
        with pytest.raises(errors.ShuttingDown):
            stream.wait()
        assert ended(daemon) == 0


def test_the_shutdown_method_does_the_same() -> None:
    with (
        Daemon(bad_child="worker", steps=True, drain_s=30) as daemon,
        daemon.client(reconnect=False) as client,
        client.events() as events,
    ):
        stream = client.stream_process("!slow 1")
        active(events, 1)
        client.shutdown()
        until(events, "daemon_stopping")
        with pytest.raises(errors.ShuttingDown):
            client.process("x")
        daemon.step(0)
        assert stream.wait().text == "piece0"
        assert ended(daemon) == 0


def test_a_drain_that_waits_for_a_load() -> None:
    """A request that was accepted before the signal is served, though its model was not loaded yet."""
    with (
        Daemon(bad_child="late", steps=True, drain_s=30) as daemon,
        daemon.client() as client,
        client.events() as events,
    ):
        stream = client.stream_process("hello")
        until(events, "loading_started")
        terminate(daemon)
        until(events, "daemon_stopping")
        daemon.step(0)
        assert stream.wait().text == "hello"
        assert ended(daemon) == 0


def test_clients_that_do_not_read_delay_the_end_by_little() -> None:
    with Daemon(bad_child="worker", drain_s=0.2) as daemon, daemon.client() as client:
        client.load(CLEANUP)
        with client.events() as events:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(daemon.socket))
            request = {"jsonrpc": "2.0", "method": "process", "params": {"prompt": "x" * 200_000}}
            for number in range(4):
                sock.sendall(encode(request | {"id": number}))
            for _ in range(4):
                until(events, "generation_finished")
            asked_at = time.monotonic()
            terminate(daemon)
            assert ended(daemon) == 0
            assert time.monotonic() - asked_at < 0.2 + 2.0
            sock.close()


def test_signals_do_not_change_how_a_daemon_ends_that_is_ending_already() -> None:
    for _ in range(3):
        with Daemon(drain_s=5) as daemon, daemon.client(reconnect=False) as client:
            client.shutdown()
            assert daemon.process is not None
            while daemon.process.poll() is None:
                terminate(daemon)
            assert daemon.process.returncode == 0
