"""Downloads and deletes that are killed again and again, and what has to be true after each kill and at the end.

One loop, for the suite (a few kills) and for tools/soak.py (as many as one likes). What is killed and at which byte is
drawn from one seed; the moments themselves are the machine's.

How bytes are counted: those of weights that the hub's kernel took, over all answers, so that what was in sockets when a
process died counts as lost. Not counted are the small files and the metadata, which each new fetcher asks for again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

from mlxd_client import errors
from mlxd_client.types import Job
from support import hubcache
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub
from support.wholeness import MIB, Eye, digests, sharded

REPO = "org/killed"
WEIGHTS = "*.safetensors"
# What the docs promise that a kill can cost.
LOST_BYTES = 8 * MIB
# What may come twice for other reasons than kills.
SLACK_BYTES = MIB
RATE_BYTES_S = 32 * MIB
SHARDS = [12 * MIB, 16 * MIB + 12_345, 10 * MIB + 1]
# Files that make a delete take long enough to be killed in.
MANY = 1500
WHO = ("fetcher", "daemon", "fetcher, then daemon", "daemon, then fetcher")
# A daemon gives a download up whose fetchers die one after the other without having brought anything.
IN_A_ROW = 2


@dataclass
class Tally:
    """What happened; `lost` and `recovered_s` hold one figure a kill, `overshoot` one a download."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    deletes: int = 0
    size_bytes: int = 0
    sent_bytes: int = 0
    overshoot: list[tuple[int, int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    left_behind: int = 0

    @property
    def count(self) -> int:
        return self.kills.total()


class KillLoop:
    """
    Args:
        daemon: a running one, with an empty cache of its own; it is killed and started again.
        say: told of each download and delete, in a line.
    """

    def __init__(self, hub: Hub, daemon: Daemon, seed: int, say: Callable[[str], None] = print) -> None:
        self.hub, self.daemon, self.say = hub, daemon, say
        self.tally = Tally()
        self._draw = random.Random(seed)
        old, new = sharded(SHARDS, seed=0), sharded(SHARDS, seed=1)
        kept = next(iter(sorted(name for name in old if name.endswith(".safetensors"))))
        self._files = [old, new | {kept: old[kept]}]  # an update shares a file with what it updates
        self._commits = [hub.commit(REPO, files) for files in self._files]
        versions = {commit: digests(files) for commit, files in zip(self._commits, self._files, strict=True)}
        self.eye = Eye(daemon.home / "hub", REPO, versions)
        self._here: str | None = None  # the commit that is on disk, whole
        self._allowed: tuple[str | None, ...] = ()  # what a look may find meanwhile
        self._sessions: set[int] = {daemon.pid}
        self._in_a_row = 0
        hub.throttle(RATE_BYTES_S)

    def run(self, kills: int) -> Tally:
        """Download, update and delete until so many kills were done; ends with nothing on disk, and checks that."""
        while self.tally.count < kills:
            self._download(self._draw.randrange(2), kills)
            if self._draw.random() < 0.4:
                self._download(1 - self._commits.index(str(self._here)), kills)
            self._delete(kills)
        return self.tally

    # --- a download -----------------------------------------------------------------------------------------------

    def _download(self, version: int, kills: int) -> None:
        commit, before = self._commits[version], self._here
        self._allowed = (before, commit)
        self.hub.move(REPO, commit)
        self.hub.forget()
        size = self._missing(version)
        planned = min(self._draw.randint(1, 6), kills - self.tally.count)
        with self.daemon.client() as client:
            job = client.download(REPO)
        killed, ended = 0, False
        while killed < planned and not ended:
            done = self._kill_once(job, size, killed)
            killed += done
            ended = not done or self._job(job) is None
            assert self.eye.look(quiet=False) in self._allowed
        self._finish(job, commit)
        sent = self.hub.sent(WEIGHTS, repo=REPO)
        kind = "update" if before else "download"
        self.say(f"{kind} of {size / MIB:.1f} MiB: {killed} kills, {sent / MIB:.1f} MiB sent")
        assert size <= sent <= size + killed * LOST_BYTES + SLACK_BYTES, f"{sent} bytes were sent for {size}"
        self._here = commit
        self.tally.downloads[kind] += 1
        self.tally.size_bytes += size
        self.tally.sent_bytes += sent
        self.tally.overshoot.append((killed, sent - size))

    def _missing(self, version: int) -> int:
        """Bytes of weights that the disk does not hold."""
        had = set(self.eye.versions[self._here].values()) if self._here is not None else set()
        wanted = self.eye.versions[self._commits[version]]
        return sum(
            len(data)
            for name, data in self._files[version].items()
            if name.endswith(".safetensors") and wanted[name] not in had
        )

    def _finish(self, job: str, commit: str) -> None:
        """It ends as the job that it began as, and all is as if nobody had killed anything."""
        with self.daemon.client() as client:
            with contextlib.suppress(errors.NotFound):  # it ended before the last daemon was killed, or its job did
                ended = client.wait_job(job, wait_s=PATIENCE_S)
                assert (ended.state, ended.revision) == ("done", commit), ended
            model = client.model(REPO)
            assert (model.state, model.revision) == ("Downloaded", commit), model
            assert client.verify(REPO).ok
            assert [one for one in client.jobs() if one.ended_at is None] == []
        self._in_a_row = 0
        self._nobody_left()
        assert self.eye.look() == commit
        assert self.eye.warnings() == [], self.eye.warnings()
        assert self.eye.litter() == [], self.eye.litter()
        self.tally.left_behind += len(list((self.eye.cache / "models--org--killed" / "snapshots").iterdir())) - 1

    # --- one kill -------------------------------------------------------------------------------------------------

    def _kill_once(self, job: str, size: int, killed: int) -> bool:
        """Wait for a moment, kill, and see to it that it goes on. Returns False where the job ended before."""
        who = self._draw.choice(WHO)
        if who == "fetcher" and self._in_a_row >= IN_A_ROW:
            who = "daemon"
        moment, share = self._draw.choices(("bytes", "start", "blobs"), (8, 1, 1))[0], self._draw.random()
        if not self._await_moment(job, moment, share, size):
            return False
        while not (fetchers := self._fetchers()) and who == "fetcher":
            if self._job(job) is None:
                return False
        before = self._job(job)
        began, requests = time.monotonic(), len(self.hub.requests(repo=REPO))
        self._strike(who, fetchers)
        self.tally.kills[who] += 1
        self.tally.moments[moment] += 1
        self._in_a_row = self._in_a_row + 1 if who == "fetcher" else 0
        if who != "fetcher":
            assert self.eye.look(quiet=False) in self._allowed
            assert self.eye.warnings() == [], self.eye.warnings()
            self._restart()
        self._recover(job, who, began, requests, before)
        return True

    def _await_moment(self, job: str, moment: str, share: float, size: int) -> bool:
        """False if the job ended before."""
        sent = self.hub.sent(WEIGHTS, repo=REPO)
        asked = len(self.hub.requests(repo=REPO))
        blobs = self.eye.cache / "models--org--killed" / "blobs"

        def whole() -> int:
            return sum("." not in name for name in os.listdir(blobs)) if blobs.is_dir() else 0

        there = whole()
        left = size - ((known.done_bytes or 0) if (known := self._job(job)) is not None else 0)
        while True:
            with contextlib.suppress(TimeoutError):
                if moment == "bytes":
                    self.hub.wait_bytes(WEIGHTS, sent + int(share * max(0, left)), repo=REPO, timeout_s=0.1)
                    return True
                if moment == "start":
                    self.hub.wait_requests(asked + 1 + int(share * 4), repo=REPO, timeout_s=0.1)
                    return True
                if whole() > there + int(share * 4):
                    return True
                time.sleep(0.002)
            if self._job(job) is None:
                return False

    def _job(self, job: str) -> Job | None:
        """The job while it is open."""
        with self.daemon.client() as client:
            try:
                found = client.job(job)
            except errors.NotFound:
                return None
        assert found.state in ("queued", "running", "done"), found
        return None if found.ended_at is not None else found

    def _fetchers(self) -> list[psutil.Process]:
        found = []
        for child in self.daemon.children():
            with contextlib.suppress(psutil.Error):
                if "mlxd.fetch" in child.cmdline():
                    found.append(child)
        return found

    def _strike(self, who: str, fetchers: list[psutil.Process]) -> None:
        """SIGKILL, with nothing between the two where it is two."""
        targets = {"fetcher": [p.pid for p in fetchers], "daemon": [self.daemon.pid]}
        for name in who.split(", then "):
            for pid in targets[name]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if "daemon" in who:
            self.daemon.kill()

    def _restart(self) -> None:
        self.daemon.restart(crash=True)
        self._sessions.add(self.daemon.pid)

    def _recover(self, job: str, who: str, began: float, requests: int, before: Job | None) -> None:
        """Somebody asks the hub again, or there was nothing left to ask for."""
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            with contextlib.suppress(TimeoutError):
                self.hub.wait_requests(requests + 1, repo=REPO, timeout_s=0.1)
                self.tally.recovered_s.setdefault(who, []).append(time.monotonic() - began)
                break
            if self._job(job) is None:
                return
        else:
            raise AssertionError("nobody goes on with the download")
        while (now := self._job(job)) is not None and now.phase not in ("downloading", "verifying"):
            assert time.monotonic() < give_up_at, now
            time.sleep(0.005)
        if before is not None and now is not None and before.done_bytes and now.done_bytes is not None:
            self.tally.lost.append(max(0, before.done_bytes - now.done_bytes))

    def _nobody_left(self) -> None:
        """Of all daemons so far, no child lives."""
        give_up_at = time.monotonic() + 10
        while left := [pid for pid in psutil.pids() if pid != self.daemon.pid and _session(pid) in self._sessions]:
            assert time.monotonic() < give_up_at, f"processes are left: {left}"
            time.sleep(0.01)

    # --- a delete -------------------------------------------------------------------------------------------------

    def _delete(self, kills: int) -> None:
        """Delete the model, killing the daemon meanwhile, and again the ones that complete it."""
        folder = self.eye.cache / "models--org--killed"
        self._bulk(MANY)
        blobs = len(os.listdir(folder / "blobs"))
        planned = min(self._draw.randint(0, 3), kills - self.tally.count)
        deleted = threading.Event()
        for number in range(planned):
            threshold = int(self._draw.random() * min(blobs, len(_names(folder / "blobs"))))
            at_start = number > 0 and self._draw.random() < 0.5
            if at_start:
                self.daemon.kill()
                waiting = self._serve()
            else:
                deleted = threading.Event()
                threading.Thread(target=self._ask_to_delete, args=(deleted,), daemon=True).start()
            while len(_names(folder / "blobs")) > threshold and not deleted.is_set():
                if at_start and self.daemon.socket.exists() and not _names(folder / ".mlxd-trash"):
                    break  # it serves: all that had to be completed is
            if at_start:
                waiting.kill()
                waiting.communicate()
            else:
                self.daemon.kill()
            self.tally.kills["daemon"] += 1
            self.tally.moments["completing a delete" if at_start else "delete"] += 1
            assert self.eye.look() in (self._here, None)
            self._restart()
            assert self.eye.look() in (self._here, None)
        with self.daemon.client() as client, contextlib.suppress(errors.ModelNotFound):
            client.delete(REPO)
        self._nobody_left()
        assert self.eye.look() is None
        assert self.eye.files() == [], self.eye.files()
        assert not folder.exists()
        self._here = None
        self.tally.deletes += 1
        self.say(f"delete of {blobs} blobs: {planned} kills")

    def _ask_to_delete(self, deleted: threading.Event) -> None:
        killed = (errors.ConnectionLost, errors.ConnectFailed)
        with contextlib.suppress(*killed, errors.ModelNotFound), self.daemon.client(reconnect=False) as client:
            client.delete(REPO)
        deleted.set()

    def _serve(self) -> subprocess.Popen[bytes]:
        """A daemon that nobody waits for."""
        process = subprocess.Popen(
            [sys.executable, "-m", "mlxd", "serve"], env=self.daemon.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._sessions.add(process.pid)
        return process

    def _bulk(self, count: int) -> None:
        """A further snapshot that no ref names, of many small files, so that a delete takes a while."""
        files: Mapping[str, bytes] = {f"{number}.json": b"%d" % number for number in range(count)}
        at = hubcache.RepoCache(self.eye.cache, REPO)
        oids = hubcache.oids(files)
        for name, data in files.items():
            at.blob(oids[name]).write_bytes(data)
        snapshot = at.snapshot("b" * 40)
        snapshot.mkdir()
        for name, oid in oids.items():
            (snapshot / name).symlink_to(f"../../blobs/{oid}")


def _session(pid: int) -> int:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else 0
    except (ProcessLookupError, PermissionError, psutil.Error):
        return 0


def _names(folder: os.PathLike[str]) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
