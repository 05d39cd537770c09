"""Daemons killed at steps of theirs on disk: what they leave is old or new, and the next one goes on from there."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd_client import errors
from support.daemon import Daemon
from support.failpoints import Failpoints, check_files
from support.hub import Hub

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
def small_home() -> Iterator[Daemon]:
    """A daemon, not started yet, whose folder is a file system of two megabytes."""
    daemon = Daemon(bad_child="worker", drain_s=1)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "mlxd-test", str(daemon.home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        daemon.remove()
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield daemon
    subprocess.run(["umount", str(daemon.home)], check=True)
    daemon.remove()


def states(home: Path) -> dict[str, bytes]:
    files = [home / "config.toml", home / "downloads.json"]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def test_a_home_without_room(small_home: Daemon) -> None:
    """What cannot be kept is refused, and named; all else is served, and what was kept stays as it was."""
    home = small_home.home
    model = small_home.model("m")
    with small_home as daemon:
        with daemon.client() as client:
            client.call("config.set", {"values": {"keep_alive_s": 120.0}})
            client.load(model)
            before = states(home)
            filler = fill(home)
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
            filler.unlink()
            client.call("config.set", {"values": {"keep_alive_s": 240.0}})
        assert b"240" in states(home)["config.toml"]
        check_files(home)


def fill(folder: Path) -> Path:
    """Take all the room that there is. Returns what has to be removed to have it back."""
    filler = folder / "models" / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler
