"""The hub's memory: repositories, faults in force, records of requests, and the waits for all of these. No sockets.

Everything is guarded by one lock; `changed` is notified where something happened that a test may wait for.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatchcase

import msgspec

from support.hub_wire import Content, Fault, Request, git_oid, sha256

CATCH_UP_S = 0.05


class File(msgspec.Struct, frozen=True):
    """A committed file. `sha256` is set for LFS files, and `oid` is that of the pointer file then."""

    content: Content
    oid: str
    sha256: str | None = None
    pointer_bytes: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


class Gate(msgspec.Struct, frozen=True):
    """Who may read: those with this token. A private repository is unknown to others; of a gated one they see the
    metadata, unless `closed`."""

    token: str
    private: bool = False
    closed: bool = False


class Repo:
    def __init__(self, name: str) -> None:
        self.name = name
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.gate: Gate | None = None

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a commit or the beginning of one (as the hub has it) names."""
        named = self.branches.get(revision) or self.tags.get(revision)
        if named is None and len(revision) >= 7:
            named = next((commit for commit in self.commits if commit.startswith(revision)), None)
        return named


def make_file(content: Content, lfs: bool) -> File:
    if not lfs:
        return File(content, git_oid(content))
    digest = sha256(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {content.size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0%b" % (len(pointer), pointer)).hexdigest()
    return File(content, oid, digest, len(pointer))


class Rate:
    """At most so many bytes a second, for all who ask together. Who wakes late makes up for it, a little."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def set(self, bytes_per_s: float) -> None:
        with self._lock:
            self.bytes_per_s = bytes_per_s
            self._free_at = 0.0

    def reserve(self, count: int) -> float:
        """Seconds to wait before `count` bytes may be sent."""
        with self._lock:
            if not self.bytes_per_s:
                return 0.0
            now = time.monotonic()
            wait = max(0.0, self._free_at - now)
            self._free_at = max(now - CATCH_UP_S, self._free_at) + count / self.bytes_per_s
            return wait


class State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.records: list[Request] = []
        self.sent: dict[tuple[str, str], int] = {}
        self.rate = Rate()
        self.paused = False
        self.relative_redirects = False
        self.releases = 0
        self._waiters = 0
        self._fault_ids = 0

    # --- repositories ---

    def commit(self, repo: str, files: dict[str, Content], branch: str, lfs: list[str], tag: str | None) -> str:
        made = {name: make_file(content, any(fnmatchcase(name, p) for p in lfs)) for name, content in files.items()}
        digest = hashlib.sha1(repo.encode())
        for name in sorted(made):
            digest.update(f"\0{name!r}\0{made[name].etag}\0{made[name].content.size}".encode())
        commit = digest.hexdigest()
        with self.changed:
            target = self.repos.setdefault(repo, Repo(repo))
            target.commits[commit] = made
            target.branches[branch] = commit
            if tag is not None:
                target.tags[tag] = commit
            self.changed.notify_all()
        return commit

    # --- faults ---

    def add_fault(self, fault: Fault) -> int:
        with self.lock:
            self._fault_ids += 1
            fault.id = self._fault_ids
            self.faults.append(fault)
            return fault.id

    def fire(self, record: Request, applies: Callable[[Fault], bool]) -> list[Fault]:
        """The faults that befall this request, each counted as fired."""
        fired: list[Fault] = []
        with self.changed:
            for fault in self.faults:
                if not self._matches(fault, record) or not applies(fault):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.fired += 1
                fired.append(fault)
        return fired

    def _matches(self, fault: Fault, record: Request) -> bool:
        return (
            (fault.times is None or fault.fired < fault.times)
            and fault.repo in ("*", record.repo)
            and self._names(fault, record)
            and (fault.method is None or fault.method == record.method)
            and any(where in record.where for where in fault.where)
        )

    @staticmethod
    def _names(fault: Fault, record: Request) -> bool:
        if record.file is None and fault.about_siblings:
            return True  # the file is one of those that the answer lists
        return fault.file is None or (record.file is not None and fnmatchcase(record.file, fault.file))

    def in_force(self, fault: Fault) -> bool:
        with self.lock:
            return any(other is fault for other in self.faults)

    # --- records ---

    def begin(self, record: Request) -> None:
        with self.changed:
            record.number = len(self.records)
            self.records.append(record)
            self.changed.notify_all()

    def advance(self, record: Request, count: int) -> None:
        with self.changed:
            record.bytes_sent += count
            if record.repo is not None and record.file is not None:
                key = (record.repo, record.file)
                self.sent[key] = self.sent.get(key, 0) + count
            if self._waiters:
                self.changed.notify_all()

    def note(self, record: Request, *, held: bool | None = None, status: int = 0, ended: str = "") -> None:
        with self.changed:
            record.held = record.held if held is None else held
            record.status = status or record.status
            record.ended = record.ended or ended
            self.changed.notify_all()

    def sent_of(self, file: str, repo: str | None) -> int:
        with self.lock:
            return sum(
                count
                for (of, name), count in self.sent.items()
                if fnmatchcase(name, file) and (repo is None or repo == of)
            )

    def wait(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        with self.changed:
            self._waiters += 1
            try:
                return self.changed.wait_for(holds, timeout_s)
            finally:
                self._waiters -= 1
