"""Daemons that are killed, and daemons that meet: nothing is left behind, nothing blocks the next, one serves."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from mlxd_client import Client, errors
from support.daemon import PATIENCE_S, Daemon, active, until

CLEANUP = "mlxd/cleanup"
ALREADY_RUNNING = 8


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    assert not alive, alive


def test_a_killed_daemon_takes_its_workers_along() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client(reconnect=False) as client:
        streams = [client.stream_process("!slow 1000", model=daemon.model(name)) for name in "ab"]
        for stream in streams:
            next(iter(stream))
        children = daemon.children()
        assert len(children) == 2
        daemon.kill()
        assert_gone(children)
        for stream in streams:
            with pytest.raises(errors.ConnectionLost):
                stream.wait()


def test_the_next_daemon_sweeps_what_the_killed_one_left() -> None:
    """A worker that hangs does not notice that its daemon is gone; the next daemon ends it before it serves."""
    with Daemon(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        client.load(CLEANUP)
        stream = client.stream_process("!hang")
        active(events, 1)
        orphan = daemon.worker()
        os.kill(orphan.pid, signal.SIGSTOP)  # beyond hanging: it does not even run
        daemon.restart(crash=True)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        with pytest.raises(errors.ConnectionLost):
            stream.wait()
        assert client.process("all is well").text == "all is well"


def test_killed_at_any_moment_and_started_again() -> None:
    """However far it got with starting, loading and answering, the next one serves, and no process is left."""
    chance = random.Random(7)
    with Daemon(bad_child="worker") as daemon:
        for _ in range(4):
            with daemon.client(reconnect=False) as client, client.events() as events:
                stream = client.stream_process("!slow 50")
                for _ in range(chance.randrange(14)):
                    events.get(PATIENCE_S)
                children = daemon.children()
                daemon.kill()
                assert_gone(children)
                with pytest.raises(errors.ConnectionLost):
                    stream.wait()
            daemon.restart(crash=True)
        with daemon.client() as client:
            assert client.process("all is well").text == "all is well"


def serve(daemon: Daemon) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlxd", "serve"]
    return subprocess.Popen(command, env=daemon.env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_of_daemons_started_at_once_exactly_one_serves() -> None:
    daemon = Daemon(bad_child="worker")
    crowd = [serve(daemon) for _ in range(4)]
    try:
        with Client(daemon.socket, start=lambda: None, timeout_s=PATIENCE_S) as client:
            greeting = client.connect(wait_s=PATIENCE_S)
            winner = next(one for one in crowd if one.pid == greeting.server.pid)
            for one in crowd:
                if one is not winner:
                    _, told = one.communicate(timeout=PATIENCE_S)
                    assert one.returncode == ALREADY_RUNNING
                    assert f"already running for {daemon.home} (pid {winner.pid})" in told
            assert client.process("all is well").text == "all is well"
        winner.send_signal(signal.SIGTERM)
        winner.communicate(timeout=PATIENCE_S)
        assert winner.returncode == 0
        assert not daemon.socket.exists()
    finally:
        for one in crowd:
            one.kill()
            one.communicate()
        daemon.remove()


def test_a_stale_socket_blocks_nobody_and_a_live_one_is_not_stolen() -> None:
    daemon = Daemon(bad_child="worker")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(daemon.socket))  # nobody listens
    with daemon, daemon.client() as client:
        assert client.connect().server.pid == daemon.pid
        other = Daemon(bad_child="worker", env={"MLXD_SOCKET": str(daemon.socket)})  # another home, the same socket
        second = serve(other)
        _, told = second.communicate(timeout=PATIENCE_S)
        other.remove()
        assert second.returncode == ALREADY_RUNNING
        assert "already running" in told
        assert client.connect().server.pid == daemon.pid


def test_a_frozen_daemon_goes_on_where_it_stood() -> None:
    """A laptop's lid: after it, workers are not taken for hung, and requests are answered."""
    with Daemon(bad_child="worker", heartbeat_s=1) as daemon, daemon.client() as client, client.events() as events:
        client.load(CLEANUP)
        stream = client.stream_process("!slow 5")
        until(events, "generation_started")
        worker = daemon.worker()
        for pid in (daemon.pid, worker.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # what is tested is that time passes, more of it than a silent worker gets
        for pid in (worker.pid, daemon.pid):
            os.kill(pid, signal.SIGCONT)
        assert stream.wait().usage.completion_tokens == 5
        assert client.status().workers == []
