"""Downloads and deletes that are killed again and again, and what has to be true after each kill and at the end.

One loop, for the suite (a few kills) and for tools/soak.py (as many as one likes). What is killed and at which byte is
drawn from one seed; the moments themselves are the machine's.

How bytes are counted: those of weights that the hub's kernel took, over all answers. What it took and the disk does not
hold after a kill has to come again; of that, what still lay in sockets (as Linux tells, the moment before) had come to
nobody, and the rest is what the kill has cost. Small files and metadata are not counted.
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
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from mlxd.fetch.parts import held
from mlxd.store.layout import RepoCache
from mlxd_client import errors
from mlxd_client.types import Job
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
    """What happened. `again_bytes` are those that came twice, all in all, of which `in_sockets` had not arrived; `lost`
    is what single kills have cost, `recovered_s` how long it took until the hub was asked again."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    deletes: int = 0
    size_bytes: int = 0
    sent_bytes: int = 0
    again_bytes: int = 0
    in_sockets: int = 0
    lost: list[int] = field(default_factory=list)
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    left_behind: int = 0  # replaced revisions that only the next daemon removed

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
        self._sizes = {
            versions[commit][name]: len(data)
            for commit, files in zip(self._commits, self._files, strict=True)
            for name, data in files.items()
        }
        self._point = 0, 0  # bytes sent, bytes held, the last time that they were compared
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
        self._point = 0, self._held(commit)
        again, in_sockets = self.tally.again_bytes, self.tally.in_sockets
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
        again, in_sockets = self.tally.again_bytes - again, self.tally.in_sockets - in_sockets
        assert abs(sent - size - again) <= SLACK_BYTES, f"{sent} bytes for {size}, but kills account for {again} only"
        assert sent <= size + killed * LOST_BYTES + in_sockets + SLACK_BYTES, f"{sent} bytes were sent for {size}"
        self._here = commit
        self.tally.downloads[kind] += 1
        self.tally.size_bytes += size
        self.tally.sent_bytes += sent

    def _missing(self, version: int) -> int:
        """Bytes of weights that the disk does not hold."""
        had = set(self.eye.versions[self._here].values()) if self._here is not None else set()
        wanted = self.eye.versions[self._commits[version]]
        return sum(
            len(data)
            for name, data in self._files[version].items()
            if name.endswith(".safetensors") and wanted[name] not in had
        )

    def _held(self, commit: str) -> int:
        """Bytes of the commit's weights that the disk holds, in blobs and parts."""
        at, found = RepoCache(self.eye.cache, REPO), 0
        for name, oid in self.eye.versions[commit].items():
            if name.endswith(".safetensors"):
                size = self._sizes[oid]
                found += size if at.has_blob(oid, size) else held(at, oid, size)
        return found

    def _account(self, in_sockets: int) -> None:
        """A fetcher has been killed, and is gone: what has that cost?"""
        # The hub counts a piece once it is sent: not before it has let go of the dead has it counted all of them.
        give_up_at = time.monotonic() + 5.0
        while any(not request.ended for request in self.hub.requests(repo=REPO)) and time.monotonic() < give_up_at:
            time.sleep(0.002)
        sent_before, held_before = self._point
        self._point = sent, now_held = self.hub.sent(WEIGHTS, repo=REPO), self._held(str(self._allowed[1]))
        assert now_held >= held_before, "the disk holds less than before"
        again = max(0, sent - sent_before - (now_held - held_before))
        self.tally.again_bytes += again
        self.tally.in_sockets += min(again, in_sockets)
        self.tally.lost.append(max(0, again - in_sockets))
        assert self.tally.lost[-1] <= LOST_BYTES, f"a kill has cost {self.tally.lost[-1]} bytes"

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
        if not self._alone(commit):  # whoever was to remove the old revision was killed: the next one does
            self.tally.left_behind += 1
            self._restart()
            assert self._alone(commit), "a replaced revision stays"
        assert self.eye.litter() == [], self.eye.litter()

    def _alone(self, commit: str) -> bool:
        """Whether no other revision is there, or soon none will be."""
        snapshots, give_up_at = self.eye.cache / "models--org--killed" / "snapshots", time.monotonic() + 1
        while os.listdir(snapshots) != [commit] and time.monotonic() < give_up_at:
            time.sleep(0.01)
        return os.listdir(snapshots) == [commit]

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
        began = time.monotonic()
        in_sockets = _in_sockets(self.hub.port)
        self._strike(who, fetchers)
        _wait_dead(fetchers)
        self._account(in_sockets)
        requests = len(self.hub.requests(repo=REPO))
        self.tally.kills[who] += 1
        self.tally.moments[moment] += 1
        self._in_a_row = self._in_a_row + 1 if who == "fetcher" else 0
        if who != "fetcher":
            assert self.eye.look(quiet=False) in self._allowed
            assert self.eye.warnings() == [], self.eye.warnings()
            self._restart()
        self._recover(job, who, began, requests)
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

    def _recover(self, job: str, who: str, began: float, requests: int) -> None:
        """Somebody asks the hub again, or there was nothing left to ask for."""
        give_up_at = time.monotonic() + PATIENCE_S
        while self._job(job) is not None:
            assert time.monotonic() < give_up_at, "nobody goes on with the download"
            with contextlib.suppress(TimeoutError):
                self.hub.wait_requests(requests + 1, repo=REPO, timeout_s=0.1)
                self.tally.recovered_s.setdefault(who, []).append(time.monotonic() - began)
                return

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
        """A further snapshot that no ref names, of many files, so that a delete takes a while."""
        at = RepoCache(self.eye.cache, REPO)
        snapshot = at.snapshot("b" * 40)
        snapshot.mkdir()
        for number in range(count):
            at.blob(oid := f"{number:040x}").touch()
            (snapshot / f"{number}.json").symlink_to(f"../../blobs/{oid}")


def _in_sockets(port: int) -> int:
    """Bytes between the hub and its clients, sent and not read yet. 0 where the system does not tell.

    https://www.kernel.org/doc/Documentation/networking/proc_net_tcp.txt
    """
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as file:
            for line in list(file)[1:]:
                _, here, there, _, queues, *_ = line.split()
                waiting_to_go, waiting_to_be_read = (int(part, 16) for part in queues.split(":"))
                found += waiting_to_go if int(here.split(":")[1], 16) == port else 0
                found += waiting_to_be_read if int(there.split(":")[1], 16) == port else 0
    return found


def _wait_dead(processes: list[psutil.Process]) -> None:
    """Until they run no more. Whoever inherits orphans may take its time to bury them."""
    give_up_at = time.monotonic() + 10
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < give_up_at, "a fetcher outlived its daemon"
                time.sleep(0.001)


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
