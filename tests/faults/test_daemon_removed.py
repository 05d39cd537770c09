"""What becomes of a daemon whose files are removed under it: it is found again, or ends; it never stands in the way."""

from __future__ import annotations

import shutil

import psutil
import pytest

from mlxd_client import errors
from support.daemon import PATIENCE_S, Daemon


def test_a_removed_socket_is_there_again_soon() -> None:
    with Daemon(bad_child="worker", steps=True) as daemon, daemon.client() as before:
        stream = before.stream_process("!slow 2")
        daemon.step(0)
        next(iter(stream))
        for _ in range(2):
            daemon.socket.unlink()
            with daemon.client(start=lambda: None) as client:  # it tries again, for some seconds
                assert client.status().pid == daemon.pid
        daemon.step(1)
        assert stream.wait().finish_reason == "stop"  # whoever was connected noticed nothing


def test_with_its_folder_removed_it_ends_and_the_next_one_serves() -> None:
    """Nobody finds it any more, and the lock that made it the only one is gone."""
    with Daemon(bad_child="worker") as daemon, daemon.client(reconnect=False) as client:
        client.load("mlxd/cleanup", keep_alive=-1)
        worker, process = daemon.worker(), daemon.process
        shutil.rmtree(daemon.home)
        assert process is not None
        assert process.wait(PATIENCE_S) == 0
        psutil.wait_procs([worker], timeout=PATIENCE_S)
        assert not worker.is_running()
        with pytest.raises(errors.ConnectionLost):
            client.ping()
        daemon.start()
        with daemon.client() as after:
            assert after.process("all is well").text == "all is well"
