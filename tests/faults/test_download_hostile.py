"""A hub that lies, loops and dawdles, as the daemon meets it: it serves on, says what is wrong, and writes nothing
outside the folder of the model that was asked for. The token goes to the hub alone.

tests/unit/test_fetch_faults.py has the single faults; here they come through the daemon, which is watched as a whole.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from mlxd_client.types import Job
from support.daemon import PATIENCE_S, Daemon, until
from support.hub import EVIL_ETAGS, EVIL_NAMES, Hub, Sparse, synthetic_files
from support.wholeness import Eye

MIB = 1024 * 1024
TOKEN = "hf_secretOfTheTests123"
GOOD = synthetic_files(2, MIB)
INDEX = "model.safetensors.index.json"
# Where names with one to four `..` would lead to from the places that a cache has.
CANARIES = ("x", "b", "x.json", "evil.safetensors", "pwned")


class World:
    """A hub and a daemon, whose cache lies deep in a folder that is watched."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.daemon = Daemon(bad_child="worker", download_stall_s=1, download_floor_bytes_s=16 * 1024)
        self.cache = self.daemon.home / "deep" / "er" / "hub"
        self.daemon.env |= hub.env(self.cache) | {"HF_TOKEN": TOKEN, "HF_HOME": str(self.daemon.home / "deep" / "hf")}
        self.cache.mkdir(parents=True)
        for folder in (self.cache, *list(self.cache.parents)[:3]):
            for name in CANARIES:
                (folder / name).write_text("sings")
        self._repos = 0

    def repo(self, files: Mapping[str, bytes | Path | Sparse] = GOOD) -> str:
        """A new repository with these files."""
        self._repos += 1
        repo = f"org/lies-{self._repos}"
        self.hub.commit(repo, files)
        return repo

    def outside(self, repo: str) -> dict[str, tuple[int, ...] | str]:
        """All that lies below the home and is neither the model's own folder nor what the daemon keeps for itself."""
        own = {"logs", "run", "mlxd.sock", "mlxd.lock", "downloads.json"}
        folder = self.cache / ("models--" + repo.replace("/", "--"))
        found: dict[str, tuple[int, ...] | str] = {}
        for place, folders, names in os.walk(self.daemon.home):
            here = Path(place)
            folders[:] = [
                name for name in folders if here / name != folder and (here != self.daemon.home or name not in own)
            ]
            for name in [*folders, *names]:
                if here == self.daemon.home and name in own:
                    continue
                status = (here / name).lstat()
                about: tuple[int, ...] = (status.st_mode, status.st_ino)
                if stat.S_ISREG(status.st_mode):
                    about = (*about, status.st_size, status.st_mtime_ns)
                found[str((here / name).relative_to(self.daemon.home))] = about
        return found

    def inside(self, repo: str) -> list[str]:
        """What lies in the model's folder and has no place there."""
        folder = self.cache / ("models--" + repo.replace("/", "--"))
        names = "|".join(re.escape(name) for name in GOOD)
        hashed = "[0-9a-f]{40}(?:[0-9a-f]{24})?"
        right = re.compile(
            rf"(?:blobs(?:/{hashed}(?:\.mlxd-(?:part|map|new))?)?|refs(?:/main)?|snapshots(?:/[0-9a-f]{{40}}(?:/(?:{names}))?)?)\Z"
        )
        found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return [path for path in found if not right.match(path)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Hub() as hub:
        world = World(hub)
        with world.daemon:
            yield world


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with world.daemon.client() as client:
        yield client


# --- what a hub may claim -----------------------------------------------------------------------------------------


@dataclass
class Lie:
    """`tell` makes a repository and returns its name; `ends` is the kind of error, or "done".
    `shown`: all that it needs is there and as the hub has it, so that other programs may see it, though it is no model.
    """

    name: str
    tell: Callable[[World], str]
    ends: str
    shown: bool = False


def faulty(kind: str, **how: Any) -> Callable[[World], str]:
    def tell(world: World) -> str:
        repo = world.repo()
        world.hub.fault(repo, kind, **how)
        return repo

    return tell


def index_of(*names: str) -> Callable[[World], str]:
    index = json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}).encode()
    return lambda world: world.repo({**GOOD, **dict.fromkeys(names, b"evil"), INDEX: index})


LIES = [
    Lie("names", lambda world: world.repo({**GOOD, **dict.fromkeys(EVIL_NAMES, b"evil")}), "done"),
    Lie("names-in-the-index", index_of("../../x", "/etc/x.safetensors", "a/../../b.safetensors"), "model_invalid"),
    Lie("pickle-in-the-index", index_of("pytorch_model.bin"), "model_invalid"),
    Lie("code-in-the-index", index_of("model.py"), "model_invalid"),
    Lie("an-index-of-nothing", lambda world: world.repo({**GOOD, INDEX: b"[" * 100_000}), "model_invalid"),
    Lie("a-config-of-nothing", lambda world: world.repo({**GOOD, "config.json": b"[" * 100_000}), "model_invalid"),
    Lie(
        "a-config-of-no-model",
        lambda world: world.repo({**GOOD, "config.json": b'{"a": 1}'}),
        "model_invalid",
        shown=True,
    ),
    Lie("weights-of-nothing", lambda world: world.repo(GOOD | unsound(world)), "verification_failed"),
    Lie("an-etag", faulty("etag", value=EVIL_ETAGS[0]), "done"),
    Lie("a-commit", faulty("commit", value="../../x"), "download_failed"),
    Lie("a-hash", faulty("oid", file="model*", value="../../../x"), "download_failed"),
    Lie("no-hash", faulty("strip", file="model-00001*", value=["lfs.sha256"]), "download_failed"),
    Lie("a-size-beyond-all", faulty("size", file="model-00001*", value=2**60), "download_failed"),
    Lie("more-than-the-disk-has", faulty("size", file="model-00001*", value=2**49), "insufficient_disk"),
    Lie("metadata-too-deep", faulty("raw", value=b"[" * 200_000), "download_failed"),
    Lie("metadata-without-end", faulty("huge", value=64 * MIB), "download_failed"),
    Lie("a-redirect-to-a-file", faulty("redirect", value="file:///etc/passwd"), "download_failed"),
]


def unsound(world: World) -> dict[str, bytes]:
    return {"model-00001-of-00002.safetensors": (2**62).to_bytes(8, "little") + b"{" * 1000}


@pytest.mark.parametrize("lie", LIES, ids=[lie.name for lie in LIES])
def test_a_lie_ends_well_and_leaves_nothing_elsewhere(world: World, client: Client, lie: Lie) -> None:
    repo = lie.tell(world)
    before = world.outside(repo)
    ended = client.wait_job(client.download(repo), wait_s=PATIENCE_S)
    assert outcome(ended) == lie.ends, ended
    assert world.outside(repo) == before
    assert world.inside(repo) == []
    shown = Eye(world.cache, repo, {}).genuine_path()
    assert (shown is not None) == (ended.state == "done" or lie.shown)
    told = "" if ended.error is None else json.dumps([ended.error.message, dict(ended.error.details)])
    assert len(told) < 1000
    assert all(character.isprintable() for character in (ended.error.message if ended.error else ""))
    if not lie.shown:
        assert client.model(repo).state == ("Downloaded" if ended.state == "done" else "NotDownloaded")
    else:  # every byte is the hub's own, and still it is no model
        with pytest.raises(errors.ModelInvalid):
            client.model(repo)
    client.ping()


def outcome(job: Job) -> str:
    assert job.state in ("done", "failed"), job
    return "done" if job.error is None else job.error.kind


def test_a_model_that_turned_out_to_be_none_can_be_deleted(world: World, client: Client) -> None:
    repo = world.repo({**GOOD, "config.json": b'{"a": 1}'})
    assert outcome(client.wait_job(client.download(repo))) == "model_invalid"
    client.delete(repo)
    assert not (world.cache / ("models--" + repo.replace("/", "--"))).exists()


def test_plans_and_updates_believe_no_more_than_downloads(world: World, client: Client) -> None:
    repo = world.repo()
    assert client.wait_job(client.download(repo)).state == "done"
    before = world.outside(repo)
    world.hub.fault(repo, "commit", value="../../x")
    assert [one.latest_revision for one in client.models(updates=True) if one.id == repo] == [None]
    for kind, value in (("raw", b"\xff\xfe"), ("huge", 64 * MIB), ("commit", "../../x")):
        other = world.repo()
        world.hub.fault(other, kind, value=value)
        with pytest.raises(errors.DownloadFailed):
            client.plan(other)
    assert world.outside(repo) == before
    client.ping()


# --- a hub that dawdles -------------------------------------------------------------------------------------------


def test_redirects_that_go_in_circles_end(world: World, client: Client) -> None:
    repo = world.repo()
    before = world.outside(repo)
    world.hub.fault(repo, "redirect")
    ended = client.wait_job(client.download(repo))
    assert outcome(ended) == "download_failed"
    assert ended.error is not None
    assert "redirects" in ended.error.message
    assert len(world.hub.requests(repo=repo)) < 60
    assert world.outside(repo) == before


def test_what_comes_too_slowly_is_given_up(world: World, client: Client) -> None:
    stalled, trickling = world.repo(), world.repo()
    world.hub.fault(stalled, "stall", file="model-00001*", after=1000)
    world.hub.fault(trickling, "trickle", file="model-00001*", after=1000, bytes_per_s=2048)
    jobs = [client.download(stalled), client.download(trickling)]
    for job in jobs:
        ended = client.wait_job(job, wait_s=PATIENCE_S)
        assert outcome(ended) == "download_failed"
        assert ended.error is not None
        assert ended.error.details["attempts"] == 3
        assert ended.error.details["file"] == "model-00001-of-00002.safetensors"


def test_what_only_stumbles_gets_there(world: World, client: Client) -> None:
    repo = world.repo()
    for kind in ("drop", "reset", "stall"):
        world.hub.fault(repo, kind, file="model-0000[12]*", after=700_000, times=1)
    world.hub.fault(repo, "status", where=["info"], status=503, times=1)
    world.hub.fault(repo, "status", where=["lfs"], status=429, retry_after="1", times=1)
    ended = client.wait_job(client.download(repo), wait_s=PATIENCE_S)
    assert outcome(ended) == "done", ended
    assert client.verify(repo).ok


def test_a_wait_that_the_hub_asks_for_does_not_hold_up_a_cancel(world: World, client: Client) -> None:
    repo = world.repo()
    world.hub.fault(repo, "status", where=["lfs"], status=429, retry_after="600")
    with client.events() as events:
        job = client.download(repo)
        until(events, "download_progress", id=repo, phase="retrying")
        began = time.monotonic()
        assert client.cancel_job(job).state == "cancelled"
        until(events, "download_cancelled", id=repo)
        assert time.monotonic() - began < 1.0


def test_a_branch_that_moves_meanwhile_is_not_mixed(world: World, client: Client) -> None:
    repo = world.repo()
    old = client.plan(repo).revision
    new = world.hub.commit(repo, synthetic_files(2, MIB + 8))
    world.hub.move(repo, str(old))
    world.hub.fault(repo, "moves", value=new, times=1)
    ended = client.wait_job(client.download(repo))
    assert (ended.state, ended.revision) == ("done", old)
    assert client.verify(repo).ok
    ended = client.wait_job(client.download(repo))
    assert (ended.state, ended.revision) == ("done", new)
    assert client.verify(repo).ok


# --- the token ----------------------------------------------------------------------------------------------------


class Listener:
    """A server that is not the hub: keeps what it is sent, and knows nothing."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.heard: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            with connection:
                self.heard.append(connection.recv(65_536))
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._sock.close()


@pytest.mark.parametrize("where", ["resolve", "info"])
def test_no_redirect_takes_the_token_along(world: World, client: Client, where: str) -> None:
    listener = Listener()
    try:
        repo = world.repo()
        world.hub.fault(repo, "redirect", where=[where], value=f"http://127.0.0.1:{listener.port}/x")
        ended = client.wait_job(client.download(repo))
        assert outcome(ended) in ("download_failed", "model_not_found")
        assert listener.heard
        assert not any(TOKEN.encode() in heard or b"authorization" in heard.lower() for heard in listener.heard)
    finally:
        listener.close()


def test_the_token_is_nowhere_but_with_the_hub(world: World, client: Client) -> None:
    """After all that happened in this file."""
    repo = world.repo()
    world.hub.gate(repo, token="hf_another")
    ended = client.wait_job(client.download(repo))
    assert outcome(ended) == "permission_denied"
    assert any(request.had_authorization for request in world.hub.requests())
    assert not any(request.had_authorization for request in world.hub.requests() if "/lfs/" in request.path)
    assert TOKEN not in world.daemon.log()
    assert TOKEN not in str(client.jobs()) + str(client.models())
    secret = TOKEN.encode()
    for path in world.daemon.home.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 8 * MIB:
            assert secret not in path.read_bytes(), path
