"""Daemons killed at steps of theirs on disk: what they leave is old or new, and the next one goes on from there."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd_client import errors
from support.daemon import Daemon
from support.failpoints import Failpoints, check_files
from support.hub import Hub
from support.tmpfs import Tmpfs

KILLS = 3


@pytest.mark.slow
def test_killed_before_any_step_on_disk() -> None:
    """tools/faults.py does it for every step."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}; python3 tools/dev.py faults failpoints")  # shown where it fails
    with Hub() as hub:
        points = Failpoints(hub)
        assert not points.kill_at(1_000_000)
        assert points.steps > 20
        # Towards the end there may be a step fewer than the first time.
        steps = random.Random(seed).sample(range(2, points.steps - 5), KILLS)
        assert all(points.kill_at(step) for step in steps), steps


@pytest.fixture
def small_home() -> Iterator[tuple[Daemon, Tmpfs]]:
    """A daemon, not started yet, whose folder is a file system of two megabytes."""
    daemon = Daemon(bad_child="worker", drain_s=1)
    try:
        with Tmpfs(2 * 1024 * 1024, daemon.home) as disk:
            yield daemon, disk
    finally:
        daemon.remove()


def states(home: Path) -> dict[str, bytes]:
    files = [home / "config.toml", home / "downloads.json"]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def test_a_home_without_room(small_home: tuple[Daemon, Tmpfs]) -> None:
    """What cannot be kept is refused, and named; all else is served, and what was kept stays as it was."""
    daemon, disk = small_home
    home = daemon.home
    model = daemon.model("m")
    with daemon:
        with daemon.client() as client:
            client.call("config.set", {"values": {"keep_alive_s": 120.0}})
            client.load(model)
            before = states(home)
            disk.leave(0)
            with pytest.raises(errors.InsufficientDisk):
                client.call("config.set", {"values": {"keep_alive_s": 240.0}})
            items = [{"method": "process", "params": {"prompt": "x" * 100_000}}]
            with pytest.raises(errors.InsufficientDisk):
                client.call("batch.submit", {"items": items, "model": model})
            assert client.process("all is well", model=model).text == "all is well"
            assert client.process("on another worker").text == "on another worker"
        assert states(home) == before
        daemon.restart(crash=True)
        with daemon.client() as client:
            assert states(home) == before
            assert client.process("all is well", model=model).text == "all is well"
            disk.relax()
            client.call("config.set", {"values": {"keep_alive_s": 240.0}})
        assert b"240" in states(home)["config.toml"]
        check_files(home)
