"""The Hugging Face cache on disk, the writing side: where a repository's bytes go, and how a snapshot appears at once.

    <repo>/blobs/<oid>               a file's bytes, whole and verified
           blobs/<oid>.mlxd-part     ... as far as they have come; whoever writes there holds a lock (flock) on it
           blobs/<oid>.mlxd-map      ... which of its ranges those are, in the writer's own words
           blobs/<oid>.mlxd-new      says that the blob came with a download whose snapshot is not there yet
           snapshots/<commit>/<name> a link to ../../blobs/<oid>, as huggingface_hub writes it
           refs/<revision>           a commit
           .mlxd-old-<commit>        says that a publishing let `main` name another commit: this one may go
           .mlxd-*                   what is about to be renamed into its place, or has been renamed out of it

Names come from a server: each is checked against a list of what is allowed before it becomes a path, and no link below
a repository's folder is followed when writing. What changes more than one file is done under a lock on the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mlxd_client.errors import DownloadFailed, ModelBusy, ModelNotFound

from . import adapter, hub
from .files import (
    UnsafeFolder,
    fsync_folder,
    is_at,
    lstat,
    make_folder,
    readlink,
    remove_tree,
    replace,
    require_folder,
    touch,
    try_lock,
)

__all__ = ["RESERVE_BYTES", "BlobsMissing", "RepoCache", "UnsafeFolder", "UnsafeName", "disk_free"]

# Left free beside a download: maps, links, the file system's own needs, and whatever else the user is doing.
RESERVE_BYTES = 64 * 1024 * 1024

PART, MAP, NEW = ".mlxd-part", ".mlxd-map", ".mlxd-new"
BUILDING, OLD = ".mlxd-new-", ".mlxd-old-"
LOCK_WAIT_S = 10.0


class UnsafeName(DownloadFailed):
    """A name from a server that may not become a path."""


class BlobsMissing(DownloadFailed):
    """Files that a snapshot was to link are not there (any more); `details.files` names them. Nothing was changed."""


class RepoCache:
    """One repository's part of the cache.

    Args:
        cache: absolute.
        repo: as the hub has it.

    Raises:
        ModelNotFound: `repo` is no repository's id.
    """

    def __init__(self, cache: Path, repo: str) -> None:
        if not hub.is_repo_id(repo):
            raise ModelNotFound(f"{repo[:120]!r} is no repository's id")
        self.cache = cache
        self.repo = repo
        self.folder = hub.repo_folder(cache, repo)
        self.blobs = self.folder / "blobs"
        self.snapshots = self.folder / "snapshots"
        self.refs = self.folder / "refs"

    # --- files ----------------------------------------------------------------------------------------------------

    def blob(self, oid: str) -> Path:
        """Where the bytes with this hash lie. Raises UnsafeName, as do the next three."""
        if not hub.is_oid(oid):
            raise UnsafeName(f"the hub gave a file the hash {oid[:120]!r}, which is none")
        return self.blobs / oid

    def part(self, oid: str) -> Path:
        return self.blob(oid).with_name(oid + PART)

    def part_map(self, oid: str) -> Path:
        return self.blob(oid).with_name(oid + MAP)

    def new(self, oid: str) -> Path:
        return self.blob(oid).with_name(oid + NEW)

    def snapshot(self, commit: str) -> Path:
        """Where the snapshot of this commit lies. Raises UnsafeName."""
        if not hub.is_commit(commit):
            raise UnsafeName(f"the hub gave the commit {commit[:120]!r}, which is none")
        return self.snapshots / commit

    def has_blob(self, oid: str, size: int) -> bool:
        """Whether a file of this name and size lies there; its bytes are not looked at.

        It may be a link into the store that huggingface_hub shares between repositories, but to nowhere else.
        """
        status = self._blob_status(oid)
        return status is not None and status.st_size == size

    def _blob_status(self, oid: str) -> os.stat_result | None:
        path = self.blob(oid)
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                if not os.path.realpath(path).startswith(os.path.realpath(self.cache / "blobs") + os.sep):
                    return None
                status = path.stat()
        except OSError:
            return None
        return status if stat.S_ISREG(status.st_mode) else None

    def has_partial(self) -> bool:
        """Whether there is something that a download was cut short in and can go on from."""
        try:
            return any(name.endswith((PART, NEW)) for name in os.listdir(self.blobs))
        except OSError:
            return False

    def prepare(self) -> None:
        """Make the folders that a download writes into. Raises UnsafeFolder, OSError.

        `snapshots` is made first: huggingface_hub calls a repository without it corrupt.
        """
        for attempt in range(10):
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                for folder in (self.folder, self.snapshots, self.blobs):
                    make_folder(folder)
                return
            except FileNotFoundError:
                if attempt == 9:
                    raise  # else it was deleted meanwhile

    def open_part(self, oid: str) -> int | None:
        """The part of this file, opened for reading and writing, with a lock that lasts until it is closed.

        Returns: a file descriptor, or None while somebody else holds the lock.
        Raises: UnsafeName, UnsafeFolder, OSError.
        """
        path = self.part(oid)
        for _ in range(100):
            self.prepare()
            status = lstat(path)
            if status is not None and not stat.S_ISREG(status.st_mode):
                path.unlink()  # nothing that mlxd has put there
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # the folder was deleted meanwhile
            if not try_lock(fd):
                os.close(fd)
                return None
            if is_at(fd, path):
                return fd
            os.close(fd)  # it was removed before the lock was ours
        raise OSError(errno.EBUSY, f"{path.name} keeps disappearing")

    def complete(self, oid: str) -> Path:
        """The part is whole and verified: make it the blob. Whoever calls holds its lock, and has synced it if need be.

        Until a snapshot links it, it can be told from a blob that another program put there.
        """
        part, blob = self.part(oid), self.blob(oid)
        touch(self.new(oid))
        os.replace(part, blob)
        self.part_map(oid).unlink(missing_ok=True)
        fsync_folder(self.blobs)
        return blob

    # --- snapshots ------------------------------------------------------------------------------------------------

    def publish(self, commit: str, files: Mapping[str, str], *, refs: Iterable[str]) -> None:
        """Let the snapshot of this commit appear, whole, and then let the refs name it.

        Args:
            files: name in the repository to oid; all blobs are there.
            refs: branches, tags or commits; `main` for what the repository's id alone means.

        1. nothing is written unless all names are allowed and all blobs there; 2. a new snapshot is built aside and
        renamed into place; 3. in one that is there already, links are replaced one by one, while without config.json,
        an adapter's without adapter_config.json, it counts as incomplete; 4. the refs are replaced.

        Raises: UnsafeName, UnsafeFolder, BlobsMissing, ModelBusy (another process keeps changing the folder), OSError.
        """
        snapshot = self.snapshot(commit)
        links = {name: self._link(name, oid) for name, oid in _checked(files).items()}
        wanted = list(dict.fromkeys(refs))
        for ref in wanted:
            if not hub.is_revision(ref):
                raise UnsafeName(f"{ref[:120]!r} is no name that a revision can have")
        with self.locked(make=True):
            missing = sorted(name for name, oid in files.items() if self._blob_status(oid) is None)
            if missing:
                raise BlobsMissing(f"{missing[0]} is not there any more", files=missing)
            if lstat(snapshot) is None:
                self._build(snapshot, links)
            else:
                self._mend(snapshot, links)
            for ref in wanted:
                if ref == hub.MAIN:
                    self._mark_old(commit)
                self._write_ref(ref, commit)
            for oid in set(files.values()):
                self.new(oid).unlink(missing_ok=True)
                if lstat(self.part(oid)) is None:  # whoever completed it may have died before the map was gone
                    self.part_map(oid).unlink(missing_ok=True)

    def _link(self, name: str, oid: str) -> str:
        return "../" * (2 + name.count("/")) + f"blobs/{self.blob(oid).name}"

    def _build(self, snapshot: Path, links: Mapping[str, str]) -> None:
        aside = self.folder / (BUILDING + snapshot.name)
        remove_tree(aside)  # from an attempt that was cut short
        aside.mkdir()
        folders = {aside}
        for name, target in links.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            folders.add((aside / name).parent)
            os.symlink(target, aside / name)
        for folder in folders:
            fsync_folder(folder)
        os.rename(aside, snapshot)
        fsync_folder(self.snapshots)

    def _mend(self, snapshot: Path, links: Mapping[str, str]) -> None:
        require_folder(snapshot)
        changed = {name for name, target in links.items() if readlink(snapshot / name) != target}
        if not changed:
            return
        config = next((name for name in ("config.json", adapter.CONFIG) if name in links), None)
        if config is not None:
            changed.add(config)
            if (status := lstat(snapshot / config)) is not None and not stat.S_ISDIR(status.st_mode):
                (snapshot / config).unlink()
                fsync_folder(snapshot)
        for name in sorted(changed, key=lambda name: (name == config, name)):
            place = snapshot
            for part in name.split("/")[:-1]:
                place = place / part
                make_folder(place)
            aside = self.folder / f"{BUILDING}link"
            aside.unlink(missing_ok=True)
            os.symlink(links[name], aside)
            replace(aside, snapshot / name)
            fsync_folder(place)

    def _mark_old(self, commit: str) -> None:
        """Whoever replaces a revision may not live to remove it, or has a worker that uses it until the end."""
        old = hub.read_ref(self.folder, hub.MAIN)
        if old is not None and old != commit and lstat(self.snapshots / old) is not None:
            touch(self.folder / (OLD + old))
        (self.folder / (OLD + commit)).unlink(missing_ok=True)

    def _write_ref(self, ref: str, commit: str) -> None:
        place = self.refs
        make_folder(place)
        for part in ref.split("/")[:-1]:
            place = place / part
            make_folder(place)
        if readlink(self.refs / ref) is None and hub.read_ref(self.folder, ref) == commit:
            return
        aside = self.folder / f"{BUILDING}ref"
        aside.unlink(missing_ok=True)
        with open(aside, "x", encoding="ascii") as file:
            file.write(commit)
            file.flush()
            os.fsync(file.fileno())
        replace(aside, self.refs / ref)
        fsync_folder(place)

    # --- one at a time --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, wait_s: float = LOCK_WAIT_S, *, make: bool = False) -> Iterator[None]:
        """Hold the lock on the repository's folder: for moments, never for a whole download.

        On a file system without locks, as some network mounts are, nobody is kept out.

        Args:
            wait_s: how long another process may hold it.
            make: have the folders be there; nobody else removes them meanwhile.

        Raises:
            UnsafeFolder: the folder, or one below it that is written into, is a link.
            ModelBusy: another process held the lock for `wait_s` seconds.
            FileNotFoundError: there is no folder.
        """
        fd = self._lock(time.monotonic() + wait_s, make)
        try:
            if make:
                self.prepare()
            for folder in (self.blobs, self.snapshots, self.refs):
                if lstat(folder) is not None:
                    require_folder(folder)
            yield
        finally:
            os.close(fd)

    def _lock(self, deadline: float, make: bool) -> int:
        while True:
            if make:
                self.prepare()
            try:
                require_folder(self.folder)
                fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if make and time.monotonic() < deadline:
                    continue  # deleted by whoever had the lock
                raise
            if try_lock(fd):
                if is_at(fd, self.folder):
                    return fd
                os.close(fd)  # deleted, and perhaps made anew, before the lock was ours
                continue
            os.close(fd)
            if time.monotonic() >= deadline:
                raise ModelBusy(f"another process keeps changing {self.repo} in the cache", model=self.repo)
            time.sleep(0.02)  # the kernel offers no lock with a deadline


def disk_free(cache: Path) -> int:
    """Bytes that this user may still write where the cache is, or will be. Raises OSError."""
    place = Path(os.path.abspath(cache))
    while not place.exists() and place != place.parent:
        place = place.parent
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def _checked(files: Mapping[str, str]) -> Mapping[str, str]:
    """`files`, if all names are allowed and can be beside each other, also where upper and lower case are the same."""
    seen: set[str] = set()
    for name in files:
        if not hub.is_file_name(name):
            raise UnsafeName(f"the hub has a file {name[:120]!r}, which is no name that is allowed here")
        if name.lower() in seen:
            raise UnsafeName(f"the hub has two files that are named like {name!r}")
        seen.add(name.lower())
    for name in seen:
        folder, slash, _ = name.rpartition("/")
        while slash:
            if folder in seen:
                raise UnsafeName(f"the hub has both a file and a folder {folder!r}")
            folder, slash, _ = folder.rpartition("/")
    return files
