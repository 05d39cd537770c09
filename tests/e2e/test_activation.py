"""A daemon that a service manager starts for the first client: served, told of, ended when idle, never a loop."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from mlxd_client import errors
from support.activator import PATIENCE_S, Activator


@pytest.fixture
def activator() -> Iterator[Activator]:
    with Activator() as made:
        yield made


def test_who_connected_before_the_daemon_ran_is_served(activator: Activator) -> None:
    before = socket.socket(socket.AF_UNIX)
    before.connect(str(activator.path))
    before.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
    inode = activator.path.stat().st_ino
    activator.start()
    before.settimeout(PATIENCE_S)
    assert before.recv(4096) == b'{"jsonrpc":"2.0","id":1,"result":{}}\n'
    assert activator.hear() == "READY=1"
    with activator.client() as client:
        client.ping()
        assert client.process("all is well").text
    activator.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert activator.hear_until("STOPPING=1")
    assert activator.end()[0] == 0
    assert activator.path.stat().st_ino == inode  # it is the manager's


def test_workers_do_not_see_what_the_manager_told_the_daemon(activator: Activator) -> None:
    activator.start()
    with activator.client() as client:
        client.load("mlxd/cleanup")
        (worker,) = psutil.Process(activator.process.pid).children(recursive=True)  # type: ignore[union-attr]
        assert not {name for name in worker.environ() if name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_"))}
        links = [os.readlink(f"/proc/{worker.pid}/fd/{name}") for name in os.listdir(f"/proc/{worker.pid}/fd")]
        listening = os.readlink(f"/proc/self/fd/{activator.sock.fileno()}")
        assert listening not in links


def test_an_idle_daemon_ends_and_the_next_client_starts_another() -> None:
    with Activator(idle_exit_s=0.3) as activator:
        activator.on_demand()
        for number in range(1, 4):
            with activator.client() as client:
                client.ping()
                assert activator.starts == number
            activator.hear_until("STOPPING=1")
    assert activator.ended == [0, 0, 0]


def test_nobody_is_refused_at_the_moment_of_leaving() -> None:
    """Connections come as the daemon goes, and each finds the one that is there or waits for the next."""
    with Activator(idle_exit_s=0.001) as activator:
        activator.on_demand()
        while activator.starts < 6:
            with activator.client() as client:
                client.ping()
            time.sleep(random.uniform(0, 0.003))
        assert set(activator.ended) == {0}


def test_it_stays_while_a_client_or_a_model_needs_it() -> None:
    with Activator(idle_exit_s=0.05, keep_alive_s=0.5) as activator:
        activator.start()
        with activator.client() as client, client.events(topics=["models"]) as events:
            client.process("one two")
        with activator.client() as client, client.events(topics=["models"]) as events:
            assert client.model("mlxd/cleanup").state == "Ready"
            next(event for event in events if event.name == "unloaded")
            assert activator.process is not None
            assert activator.process.poll() is None
        activator.hear_until("STOPPING=1")
        assert activator.end()[0] == 0


def test_a_batch_job_is_done_before_it_goes() -> None:
    """Nobody is connected, and the model would have gone long since."""
    with Activator(idle_exit_s=0.01, keep_alive_s=0.01) as activator:
        activator.on_demand()
        items = [{"method": "process", "params": {"prompt": f"um the number {n} is it"}} for n in range(12)]
        with activator.client() as client:
            job = client.submit_batch(items)
        activator.hear_until("STOPPING=1")
        assert activator.starts == 1
        with activator.client() as client:  # starts the next one
            ended = client.batch(job.job)
            assert (ended.state, ended.done_items) == ("done", 12)
            opened = client.submit_batch(items, open=True)
        activator.hear_until("STOPPING=1")  # one that is open keeps nobody up
        with activator.client() as client:
            assert client.batch(opened.job).phase == "open"


def test_how_long_it_stays_can_be_changed_while_it_runs() -> None:
    with Activator() as activator:
        activator.start()
        with activator.client() as client:
            assert client.config_set({"idle_exit_s": 0.05}).changed == ["idle_exit_s"]
            client.ping()
        activator.hear_until("STOPPING=1")
        assert activator.end()[0] == 0


def test_a_wrong_configuration_is_no_reason_to_start_again(activator: Activator) -> None:
    (activator.home / "config.toml").write_text("max_bacth = 3\n")
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(activator.path))
    activator.start()
    status, told = activator.end()
    assert status == 0
    assert "did you mean max_batch?" in told
    assert activator.hear() == "READY=1"
    assert "max_bacth" in activator.hear()
    waiting.settimeout(PATIENCE_S)
    assert waiting.recv(1) == b""  # it would start the daemon again and again


def test_two_sockets_are_refused(activator: Activator) -> None:
    activator.start(sockets=2)
    status, told = activator.end()
    assert (status, "2 sockets were handed over" in told) == (0, True)


def test_what_was_meant_for_another_process_is_not_taken(activator: Activator) -> None:
    """As where a shell that systemd started starts a daemon by hand: the variables are the shell's."""
    activator.start(pid_off_by=1)
    status, told = activator.end()
    assert status == 0
    assert "already running" in told  # it tried to listen for itself, where this test holds the socket


def test_a_home_that_another_daemon_holds_ends_it_in_good_order(activator: Activator) -> None:
    first = activator.start()
    assert activator.hear() == "READY=1"
    with activator.client() as client:
        client.ping()
        activator.start()
        status, told = activator.end()
        assert status == 0
        assert f"already running for {activator.home} (pid {first.pid})" in told
        client.ping()
    first.terminate()
    first.communicate()
    assert first.returncode == 0


def test_the_watchdog_hears_from_the_loop() -> None:
    with Activator() as activator:
        activator.env |= {"WATCHDOG_USEC": "100000"}
        process = activator.start()
        assert activator.hear() == "READY=1"
        heard = [activator.hear() for _ in range(6)]
        assert heard.count("WATCHDOG=1") >= 4
        assert "STATUS=0 models loaded, 0 requests running, 0 waiting" in heard
        os.kill(process.pid, signal.SIGSTOP)  # as a loop that hangs
        try:
            assert activator.falls_silent(0.5)
        finally:
            os.kill(process.pid, signal.SIGCONT)


def test_a_manager_without_a_watchdog_hears_how_things_are_too(activator: Activator) -> None:
    activator.start()
    heard = activator.hear_until("STATUS=0 models loaded, 0 requests running, 0 waiting")
    assert heard[0] == "READY=1"
    assert "WATCHDOG=1" not in heard


def test_a_manager_that_is_gone_is_no_trouble(activator: Activator) -> None:
    activator.env["NOTIFY_SOCKET"] = str(activator.home / "nobody")
    activator.start()
    with activator.client() as client:
        client.ping()


def test_without_a_manager_nobody_ends_it_for_being_idle(activator: Activator) -> None:
    from support.daemon import Daemon

    with Daemon(bad_child="worker", idle_exit_s=0.01) as daemon:
        with daemon.client() as client:
            client.ping()
        assert daemon.process is not None
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.process.wait(0.3)


# --- another daemon takes over --------------------------------------------------------------------------------------


def test_the_manager_is_told_of_the_process_that_takes_over(activator: Activator) -> None:
    first = activator.start()
    assert activator.hear() == "READY=1"
    with activator.client() as client:
        result = client.restart()
        assert activator.hear_until(f"MAINPID={result.pid}")
        assert client.status().pid == result.pid
    assert first.wait(PATIENCE_S) == 0
    second = psutil.Process(result.pid)
    second.terminate()
    assert "STOPPING=1" in activator.hear_until("STOPPING=1")
    second.wait(PATIENCE_S)
    assert activator.path.exists()


def test_where_the_process_must_stay_the_next_client_starts_the_new_one() -> None:
    """As under launchd: the new one is only tried, and who connects meanwhile waits in the manager's socket."""
    with Activator() as activator:
        del activator.env["NOTIFY_SOCKET"]
        activator.on_demand()
        with activator.client() as client:
            first = client.status().pid
            result = client.restart()
            assert result.pid is None
            assert client.status().pid != first  # the same client, on a connection that waited
            (activator.home / "config.toml").write_text("max_bacth = 3\n")
            second = client.status().pid
            with pytest.raises(errors.RestartFailed, match="did you mean max_batch"):
                client.restart()
            assert client.status().pid == second
        assert activator.ended == [0]


def test_stopped_by_its_manager_it_sends_clients_to_the_next(activator: Activator) -> None:
    """As `systemctl restart` does: a connection that stays open is told, and its next request is served anyway."""
    activator.on_demand()
    with activator.client() as client:
        assert client.process("all is well").text
        activator.process.terminate()  # type: ignore[union-attr]
        activator.hear_until("STOPPING=1")
        assert client.process("all is well").text
    assert activator.starts == 2
