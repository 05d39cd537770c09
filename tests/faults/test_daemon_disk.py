"""Disks that refuse: a home that cannot be one ends the start with a sentence; all else is served without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxd_client import errors
from support.daemon import PATIENCE_S, Daemon

CLEANUP = "mlxd/cleanup"
FULL = Path("/dev/full")


def refuses(daemon: Daemon, **env: str) -> str:
    """Try to start it. Returns what it said of why it does not."""
    command = [sys.executable, "-m", "mlxd", "serve"]
    done = subprocess.run(command, env=daemon.env | env, capture_output=True, text=True, timeout=PATIENCE_S)
    daemon.remove()
    assert done.returncode not in (0, 8)
    assert "Traceback" not in done.stderr
    return done.stderr


def file_in_place(path: Path) -> None:
    path.write_text("")


def dangling_link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize("block", [file_in_place, dangling_link])
def test_a_home_that_is_no_folder(block: Callable[[Path], None]) -> None:
    daemon = Daemon()
    home = daemon.home / "home"
    block(home)
    assert str(home) in refuses(daemon, MLXD_HOME=str(home))


def test_a_home_below_a_file() -> None:
    daemon = Daemon()
    file_in_place(daemon.home / "file")
    assert str(daemon.home / "file") in refuses(daemon, MLXD_HOME=str(daemon.home / "file" / "home"))


def test_a_socket_that_cannot_be_made() -> None:
    daemon = Daemon()
    file_in_place(daemon.socket)
    assert str(daemon.socket) in refuses(daemon)
    daemon = Daemon()
    assert "the socket's path" in refuses(daemon, MLXD_SOCKET=str(daemon.home / ("x" * 200)))


def test_a_lock_that_is_no_file() -> None:
    daemon = Daemon()
    (daemon.home / "mlxd.lock").mkdir()
    assert str(daemon.home) in refuses(daemon)


def test_a_setting_that_makes_no_sense() -> None:
    said = refuses(Daemon(keep_alive_s="soon"))
    assert "keep_alive_s" in said
    assert "soon" in said


def log_is_full(home: Path) -> None:
    (home / "logs").mkdir()
    (home / "logs" / "mlxd.log").symlink_to(FULL)


def log_is_a_folder(home: Path) -> None:
    (home / "logs" / "mlxd.log").mkdir(parents=True)


def logs_is_a_file(home: Path) -> None:
    file_in_place(home / "logs")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(log_is_full, marks=pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")),
        log_is_a_folder,
        logs_is_a_file,
    ],
)
def test_a_log_that_cannot_be_written_stops_nothing(block: Callable[[Path], None]) -> None:
    daemon = Daemon(bad_child="worker", log_level="debug")
    block(daemon.home)
    with daemon, daemon.client() as client:
        assert client.process("all is well").text == "all is well"
        client.unload(CLEANUP)
        daemon.log = lambda: ""  # type: ignore[method-assign]


def test_a_log_that_is_deleted_under_it_stops_nothing() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        (daemon.home / "logs" / "mlxd.log").unlink()
        (daemon.home / "logs").rmdir()
        assert client.process("all is well").text == "all is well"


def test_a_run_folder_that_cannot_be_used_is_told_to_who_asks() -> None:
    """No worker can be started there; whoever asks for one hears why, and the daemon lives on."""
    daemon = Daemon(bad_child="worker")
    (daemon.home / "run").mkdir(mode=0o700)
    file_in_place(daemon.home / "run" / "children")
    with daemon, daemon.client() as client:
        with pytest.raises(errors.WorkerDied) as caught:
            client.process("x")
        assert caught.value.details["cause"] == "spawn_failed"
        assert client.model(CLEANUP).state == "Downloaded"
        (daemon.home / "run" / "children").unlink()
        assert client.process("all is well").text == "all is well"


def test_a_home_that_vanishes_is_no_reason_to_fail_those_who_are_connected() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        client.load(CLEANUP)
        os.rename(daemon.home, f"{daemon.home}-gone")
        try:
            assert client.process("all is well").text == "all is well"
            assert client.unload(CLEANUP).state == "Downloaded"
        finally:
            os.rename(f"{daemon.home}-gone", daemon.home)
