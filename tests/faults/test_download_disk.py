"""Disks without room: told before, survived meanwhile, gone on with afterwards.

Each test runs on a file system of its own of a few megabytes, where this machine lets us mount one, and everywhere with
fetchers to whom the disk only seems so small.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from mlxd.store.layout import RESERVE_BYTES
from mlxd_client.sync import EventStream
from mlxd_client.types import Job
from support import fake_model
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub
from support.tmpfs import Tmpfs
from support.wholeness import Eye, digests

MODEL = "org/model"
MIB = 1024 * 1024
SIZE = 24 * MIB
TIGHT_FETCHER = Path(__file__).parents[1] / "support" / "tight_fetcher.py"
# A full disk is told once the first write fails; on a machine that is busy with other tests.
SOON_S = 5.0


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


class Disk(Protocol):
    """Where a cache lies. `leave` makes it have so many bytes free, whatever was free before; `relax` many."""

    cache: Path

    def daemon(self, hub: Hub) -> Daemon: ...
    def leave(self, count: int) -> None: ...
    def relax(self) -> None: ...


class Mounted(Tmpfs):
    """A small file system in memory."""

    @property
    def cache(self) -> Path:
        return self.folder / "hub"

    def daemon(self, hub: Hub) -> Daemon:
        return Daemon(bad_child="worker", env=hub.env(self.cache), download_connections=1)


class Seeming:
    """An ordinary file system of which fetchers believe what the test says."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "hub"
        self._told = folder / "free"

    def daemon(self, hub: Hub) -> Daemon:
        command = f"{sys.executable} {TIGHT_FETCHER} {self._told}"
        environment = hub.env(self.cache)
        return Daemon(bad_child="worker", env=environment, download_connections=1, fetcher_command=command)

    def leave(self, count: int) -> None:
        aside = self._told.with_suffix(".new")
        aside.write_text(str(count))
        os.replace(aside, self._told)

    def relax(self) -> None:
        self._told.unlink(missing_ok=True)


@pytest.fixture(params=["tmpfs", "seeming"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "seeming":
        yield Seeming(tmp_path)
        return
    with Mounted(256 * MIB) as mounted:
        yield mounted


def weights(hub: Hub) -> int:
    return hub.sent("model.safetensors", repo=MODEL)


def part_way(events: EventStream, job: str, least: int) -> None:
    """Read events up to the first that says that so many bytes are here."""
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None
        if event.job is not None and event.job.job == job:
            assert event.job.ended_at is None, event.job
            if (event.job.done_bytes or 0) >= least:
                return


def refused(ended: Job) -> dict[str, Any]:
    """The details of a job that ended for lack of room."""
    assert ended.state == "failed", ended
    assert ended.error is not None
    assert ended.error.kind == "insufficient_disk", ended.error
    details = dict(ended.error.details)
    assert details["missing_bytes"] == details["needed_bytes"] - details["free_bytes"] > 0
    assert f"{details['missing_bytes'] / 1e9:.2f} GB more" in ended.error.message
    return details


def test_what_is_missing_is_told_before_the_first_byte(hub: Hub, disk: Disk) -> None:
    commit = hub.commit(MODEL, files := fake_model.files(SIZE))
    with disk.daemon(hub) as daemon, daemon.client() as client:
        disk.leave(SIZE + RESERVE_BYTES - 2 * MIB)
        details = refused(client.wait_job(client.download(MODEL)))
        assert abs(details["missing_bytes"] - 2 * MIB) < MIB
        assert SIZE + RESERVE_BYTES <= details["needed_bytes"] < SIZE + RESERVE_BYTES + MIB
        assert weights(hub) == 0
        assert client.model(MODEL).state == "NotDownloaded"
        # The daemon looks for itself; what only seems so does so to fetchers.
        real = isinstance(disk, Mounted)
        assert not real or abs(client.plan(MODEL).disk_missing_bytes - 2 * MIB) < MIB
        disk.leave(SIZE + RESERVE_BYTES + 2 * MIB)
        assert client.plan(MODEL).disk_missing_bytes == 0
        assert client.wait_job(client.download(MODEL)).state == "done"
    assert Eye(disk.cache, MODEL, {commit: digests(files)}).look() == commit


def test_what_is_there_already_needs_no_room(hub: Hub, disk: Disk) -> None:
    commit = hub.commit(MODEL, files := fake_model.files(SIZE))
    hub.fault(MODEL, "hold", file="model.safetensors", at=12 * MIB)
    with disk.daemon(hub) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        part_way(events, job, 11 * MIB)
        fetchers = daemon.children()
        assert client.cancel_job(job).state == "cancelled"
        psutil.wait_procs(fetchers, timeout=10.0)  # what has come is written on the way out
        hub.release()
        disk.leave(SIZE - 12 * MIB + RESERVE_BYTES + 2 * MIB)
        assert client.wait_job(client.download(MODEL)).state == "done"
    assert Eye(disk.cache, MODEL, {commit: digests(files)}).look() == commit


def test_a_disk_that_fills_up_meanwhile_ends_the_job_and_nothing_else(hub: Hub, disk: Disk) -> None:
    commit = hub.commit(MODEL, files := fake_model.files(SIZE))
    eye = Eye(disk.cache, MODEL, {commit: digests(files)})
    hub.throttle(64 * MIB)  # else megabytes that nobody takes any more lie in sockets, and count as sent
    hub.fault(MODEL, "hold", file="model.safetensors", at=12 * MIB)
    with disk.daemon(hub) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        part_way(events, job, 11 * MIB)
        disk.leave(0)
        began = time.monotonic()
        hub.release()
        ended = client.wait_job(job)
        assert time.monotonic() - began < SOON_S
        details = refused(ended)
        whole = sum(map(len, fake_model.files(SIZE).values()))
        assert SIZE - 13 * MIB <= details["needed_bytes"] - RESERVE_BYTES <= whole - 11 * MIB
        assert client.model(MODEL).state == "NotDownloaded"
        assert eye.look() is None
        assert [name for name in eye.files() if name.endswith(".mlxd-part")]
        assert client.process("all is well").text == "all is well"  # the daemon serves on
        refused(client.wait_job(client.download(MODEL)))  # as long as there is no room
        disk.relax()
        assert client.wait_job(client.download(MODEL)).state == "done"
        assert client.verify(MODEL).ok
        assert weights(hub) <= SIZE + 8 * MIB
    assert eye.look() == commit
    assert eye.litter() == []


def test_a_file_that_may_not_grow_is_the_disks_failure(hub: Hub) -> None:
    """As with a quota by ulimit: no lack of room, and no crash."""
    hub.commit(MODEL, fake_model.files(SIZE))
    command = ["/bin/sh", "-c", 'ulimit -f 8192 && exec "$@"', "sh", sys.executable, "-m", "mlxd.fetch"]
    daemon = Daemon(bad_child="worker", env=hub.env(), fetcher_command=json.dumps(command))
    with daemon, daemon.client() as client:
        ended = client.wait_job(client.download(MODEL))
        assert ended.error is not None
        assert (ended.state, ended.error.kind) == ("failed", "download_failed")
        assert os.strerror(errno.EFBIG) in ended.error.message
        assert client.process("all is well").text == "all is well"


# --- the daemon's own folder --------------------------------------------------------------------------------------


def test_a_list_of_downloads_that_cannot_be_written_stops_no_download(hub: Hub) -> None:
    commit = hub.commit(MODEL, files := fake_model.files(SIZE))
    with Daemon(bad_child="worker", env=hub.env()) as daemon, daemon.client() as client:
        (daemon.home / ".downloads.json.new").mkdir()  # where it is written before it is renamed
        assert client.wait_job(client.download(MODEL)).state == "done"
        assert "open downloads could not be written down" in daemon.log()
        assert Eye(daemon.home / "hub", MODEL, {commit: digests(files)}).look() == commit


def test_a_home_on_a_full_disk(hub: Hub) -> None:
    """Who keeps the daemon's folder there, and the models elsewhere, still gets them."""
    commit = hub.commit(MODEL, files := fake_model.files(SIZE))
    hub.commit("org/other", fake_model.files(MIB, seed=1))
    hub.fault(MODEL, "hold", file="model.safetensors", at=12 * MIB)
    with Tmpfs(16 * MIB) as tmpfs:
        daemon = Daemon(bad_child="worker", download_connections=1)
        environment = hub.env(daemon.home / "hub")
        daemon.env |= environment | {"MLXD_HOME": str(tmpfs.folder / "home"), "MLXD_SOCKET": str(daemon.socket)}
        with daemon:
            with daemon.client() as client, client.events() as events:
                job = client.download(MODEL)
                part_way(events, job, 11 * MIB)
                tmpfs.leave(0)
                hub.release()
                assert client.wait_job(job).state == "done"  # it cannot be struck off the list
                assert client.wait_job(client.download("org/other")).state == "done"  # nor put on it
                client.ping()
                tmpfs.relax()
                assert client.process("all is well").text == "all is well"
                assert client.verify(MODEL).ok
            daemon.restart()
            with daemon.client() as client:
                for one in client.jobs():  # what was not struck off is found to be done
                    assert client.wait_job(one.job).state == "done"
                assert client.model(MODEL).state == "Downloaded"
                assert Eye(daemon.home / "hub", MODEL, {commit: digests(files)}).look() == commit
