"""Apps of several versions on one machine: they share a daemon, and the newest that may be serves."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxd_client import errors
from support.daemon import PATIENCE_S, active
from support.restarts import Relay, newer

CLEANUP = "mlxd/cleanup"


class App:
    """`mlxd serve --stdio --join`, as an app starts it."""

    def __init__(self, daemon: Relay, program: list[str]) -> None:
        command = [*program, "serve", "--stdio", "--join"]
        self.process = subprocess.Popen(
            command, env=daemon.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["result"]

    def end(self) -> None:
        self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0


def test_an_idle_older_one_makes_room(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client, client.events() as events:
        assert client.process("hello").text == "hello"  # its model is loaded, and not in use
        left = client.submit_batch(
            [{"method": "process", "params": {"prompt": "later"}}], open=True
        )  # nobody starts it
        old = daemon.newest()
        app = App(daemon, newer(tmp_path))
        status = app.ask("status")
        assert status["version"] == "9.9.9"
        assert next(event for event in events if event.name == "daemon_stopping").details == {"reason": "make_room"}
        old.wait(PATIENCE_S)
        assert daemon.process is not None
        assert daemon.process.wait() == 0
        assert client.process("hello").text == "hello"  # a client that was connected is served by the new one
        assert client.status().pid == daemon.note(status["pid"]).pid
        assert client.batch(left.job).phase == "open"
        older = App(daemon, daemon.program)  # and an older app by the newer daemon
        assert older.ask("status")["pid"] == status["pid"]
        older.end()
        app.end()


def test_a_busy_older_one_is_joined(tmp_path: Path) -> None:
    with Relay(bad_child="worker", steps=True) as daemon, daemon.client() as client, client.events() as events:
        stream = client.stream_process("!slow 1")
        active(events, 1)
        with pytest.raises(errors.DaemonBusy, match=r"in use: 1 request$") as busy:
            client.shutdown(if_idle=True)
        assert busy.value.details == {"requests": 1, "leases": 0, "jobs": 0}
        app = App(daemon, newer(tmp_path))
        assert app.ask("status")["version"] == "0.1.0"
        assert not client.status().draining
        daemon.step(0)
        assert stream.wait().text == "piece0"
        with client.acquire(CLEANUP), pytest.raises(errors.DaemonBusy, match=r"1 lease$"):
            client.shutdown(if_idle=True)
        app.end()


def test_two_that_race_to_replace_it_are_served_by_one(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon:
        old = daemon.newest()
        programs = [newer(tmp_path, "9.9.1"), newer(tmp_path, "9.9.2")]
        apps = [App(daemon, program) for program in programs for _ in range(2)]
        told = [app.ask("status") for app in apps]
        assert len({status["pid"] for status in told}) == 1
        assert told[0]["version"] in ("9.9.1", "9.9.2")
        old.wait(PATIENCE_S)
        losers = [one for one in daemon.daemons() if one.pid != told[0]["pid"]]
        assert psutil.wait_procs(losers, timeout=PATIENCE_S)[1] == []
        for app in apps:
            assert app.ask("ping") == {}
            app.end()


def test_requests_that_come_meanwhile_are_served(tmp_path: Path) -> None:
    """Between the question whether it is idle and its end: answered by the old one or the new one, never lost."""
    over = False

    def ask() -> int:
        asked = 0
        with daemon.client() as client:
            while not over:
                assert client.process("hello").text == "hello"
                asked += 1
        return asked

    with Relay(bad_child="worker") as daemon, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            served = {daemon.newest().pid}
            for number in range(12):  # most find it idle, between two requests
                App(daemon, newer(tmp_path, f"9.9.{number}")).end()
                served.add(daemon.newest().pid)
                if len(served) == 3:
                    break
            assert len(served) == 3, "none has taken over"
        finally:
            over = True
        assert all(count.result(PATIENCE_S) for count in asking)


def test_a_service_is_not_asked_to_make_room() -> None:
    """Its manager would start the same again."""
    from support.activator import Activator

    with Activator() as activator:
        activator.start()
        with activator.client() as client, pytest.raises(errors.Unsupported):
            client.shutdown(if_idle=True)


def test_the_greeting_says_which_protocols(tmp_path: Path) -> None:
    with Relay(bad_child="worker") as daemon, daemon.client() as client:
        assert client.connect().protocols == (1, 1)
    assert not os.path.exists(daemon.socket)
