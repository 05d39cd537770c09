"""What leaves the Hugging Face cache: models, replaced revisions, downloads that were cut short.

Each step can be the last one: what is deleted stops claiming to be a model first, and `finish` completes the rest.
1. snapshots/<commit> is renamed to .mlxd-trash/<commit>, at the same depth, so that its links still lead to its blobs;
2. refs that now lead nowhere go; 3. then the blobs that only the trash links; 4. then the trash itself.

Only what lies in the repository's folder is removed, and what only it linked in the store that huggingface_hub shares
between repositories. Links are unlinked, never followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from mlxd_client.errors import ModelBusy, ModelNotFound, RpcError

from . import hub, shared
from .files import fsync_folder, is_held, lstat, make_folder, readlink, remove_tree, require_folder, try_lock, walk
from .layout import BUILDING, MAP, NEW, OLD, PART, RepoCache, disk_free

__all__ = ["delete", "discard", "disk_free", "finish", "prune", "prune_replaced"]

TRASH = ".mlxd-trash"
# In the trash: `<name><SHARED>` says that a blob was a link to this file of the shared store.
SHARED = ".shared"
# What file managers leave in folders that they show.
LITTER = ".DS_Store"


def delete(cache: Path, repo: str, revision: str = hub.MAIN) -> int:
    """Remove a model, and what downloads of its repository that nobody goes on with have left.

    `main` is also every snapshot that no ref names: else the repository's id would go on to mean the newest of those.
    What another ref names stays, and so do the blobs that another snapshot links.

    Returns: the sizes of the files that are gone, in bytes; of parts, what they took on the disk.

    Raises:
        ModelNotFound: these can be no repository and revision.
        ModelBusy: another program downloads into the repository, or the revision is a commit that another model is.
        UnsafeFolder: one of the folders is a link.
        OSError: something may not be removed; what was done stands, and the next call goes on.
    """
    at = RepoCache(cache, repo)
    if not hub.is_revision(revision):
        raise ModelNotFound(f"{revision[:120]!r} is no name that a revision can have")

    def work() -> int:
        _refuse_if_hub_writes(at)
        freed = _finish(at)
        commits, ref = _meant(at, revision)
        for commit in commits:
            _to_trash(at, commit)
        if ref:
            _remove_ref(at, revision)
        freed += _finish(at)
        freed += _discard(at, None)
        return freed + _remove_rest(at)

    return _under_lock(at, work)


def prune(cache: Path, repo: str, commits: Collection[str]) -> int:
    """Remove the snapshots of these commits, but for those that a ref names. Returns and raises as `delete`."""
    at = RepoCache(cache, repo)

    def work() -> int:
        _refuse_if_hub_writes(at)
        return _finish(at) + _prune(at, commits)

    return _under_lock(at, work)


def _prune(at: RepoCache, commits: Collection[str]) -> int:
    named = set(hub.refs(at.folder, strict=True).values())
    for commit in sorted(set(commits) & set(hub.snapshots(at.folder)) - named):
        _to_trash(at, commit)
    freed = _finish(at)
    for commit in commits:
        (at.folder / f"{OLD}{commit}").unlink(missing_ok=True)
    return freed


def discard(cache: Path, repo: str, oids: Collection[str] | None = None) -> int:
    """Remove what unfinished downloads of a repository have brought, but for what somebody works on.

    Args:
        oids: only these files; None is all of them.

    Returns and raises as `delete`.
    """
    at = RepoCache(cache, repo)

    def work() -> int:
        freed = _discard(at, oids)
        if not _hub_writes(at):
            _remove_empty(at)
        return freed

    return _under_lock(at, work)


def finish(cache: Path) -> int:
    """Complete what was cut short in any repository of the cache. Returns the bytes that were freed.

    What cannot be done now, because the folder is in use or may not be changed, is left for the next time.
    """
    freed = 0
    for repo in hub.repositories(cache):
        at = RepoCache(cache, repo)

        def work(at: RepoCache = at) -> int:
            freed = _finish(at)
            if not _hub_writes(at):
                _remove_empty(at)
            return freed

        try:
            names = os.listdir(at.folder)
            if not names or any(name.startswith((TRASH, BUILDING)) for name in names):
                freed += _under_lock(at, work, 0)
        except (OSError, RpcError):
            continue
    return freed


def prune_replaced(cache: Path) -> int:
    """`prune` what updates have replaced in any repository, for whoever begins and knows that nobody uses it.

    What cannot be done now is left for the next time.
    """
    freed = 0
    for repo in hub.repositories(cache):
        at = RepoCache(cache, repo)
        try:
            old = [name.removeprefix(OLD) for name in os.listdir(at.folder) if name.startswith(OLD)]
            freed += prune(cache, repo, old) if old else 0
        except (OSError, RpcError):
            continue
    return freed


def _under_lock(at: RepoCache, work: Callable[[], int], wait_s: float | None = None) -> int:
    """`work` while the folder is locked; 0 where there is no folder."""
    began = False
    try:
        with at.locked() if wait_s is None else at.locked(wait_s):
            began = True
            return work()
    except (FileNotFoundError, NotADirectoryError):
        if began and lstat(at.folder) is not None:
            raise
        return 0  # where it is there again by now, it was made after this was asked


# --- what is meant --------------------------------------------------------------------------------------------------


def _meant(at: RepoCache, revision: str) -> tuple[list[str], bool]:
    """(the commits whose snapshots are to go, in this order; whether the ref of this name is)."""
    named = hub.refs(at.folder, strict=True)
    there = hub.snapshots(at.folder)
    commit = named.pop(revision, None)
    if revision == hub.MAIN:
        # The one that `main` names goes last: until then, it is what the repository's id means.
        commits = sorted(there.keys() - set(named.values()), key=lambda each: (each == commit, each))
        return commits, lstat(at.refs / revision) is not None
    if commit is None and revision in there:
        other = next((ref for ref, each in named.items() if each == revision), None)
        if other is not None:
            model = hub.join_ref(at.repo, other)
            raise ModelBusy(f"{hub.join_ref(at.repo, revision)} is what {model} is; delete that", model=model)
        return [revision], False
    return [commit] if commit in there and commit not in named.values() else [], commit is not None


def _hub_locks(at: RepoCache) -> Path:
    return at.cache / ".locks" / at.folder.name


def _hub_writes(at: RepoCache, oid: str | None = None) -> bool:
    """Whether huggingface_hub, in whatever program, writes a blob (or this one) of the repository at the moment."""
    folder = _hub_locks(at)
    try:
        names = os.listdir(folder) if oid is None else [f"{oid}.lock"]
    except OSError:
        return False
    return any(is_held(folder / name) for name in names)


def _refuse_if_hub_writes(at: RepoCache) -> None:
    if _hub_writes(at):
        raise ModelBusy(f"another program is downloading {at.repo}", model=at.repo)


# --- snapshots and refs ---------------------------------------------------------------------------------------------


def _to_trash(at: RepoCache, commit: str) -> None:
    trash = at.folder / TRASH
    make_folder(trash)
    target, number = trash / commit, 0
    while lstat(target) is not None:
        number += 1
        target = trash / f"{commit}.{number}"
    os.rename(at.snapshots / commit, target)
    fsync_folder(trash)
    fsync_folder(at.snapshots)


def _remove_ref(at: RepoCache, ref: str) -> None:
    """Remove one ref, and the folders that it leaves empty. Raises UnsafeFolder where a folder on the way is a link."""
    folders = [at.refs]
    for part in ref.split("/")[:-1]:
        folders.append(folders[-1] / part)
    for folder in folders:
        if lstat(folder) is None:
            return
        require_folder(folder)
    (at.refs / ref).unlink(missing_ok=True)
    fsync_folder(folders[-1])
    for folder in reversed(folders[1:]):
        if not _rmdir(folder):
            return


def _finish(at: RepoCache) -> int:
    """Complete what the trash says was begun, and remove what was being built. The lock is held. Returns freed bytes.

    While huggingface_hub writes into the repository, nothing is done: it names a commit before it has it.
    """
    for name in os.listdir(at.folder):
        replaced = name.removeprefix(OLD) if name.startswith(OLD) else None
        if name.startswith(BUILDING) or (replaced is not None and lstat(at.snapshots / replaced) is None):
            remove_tree(at.folder / name)
    trash = at.folder / TRASH
    status = lstat(trash)
    if status is None or _hub_writes(at):
        return 0
    if not stat.S_ISDIR(status.st_mode):
        trash.unlink()
        return 0
    there = hub.snapshots(at.folder)
    gone = {name.partition(".")[0] for name in os.listdir(trash)} - there.keys()
    for ref, commit in hub.refs(at.folder, strict=True).items():
        if commit in gone:
            _remove_ref(at, ref)
    freed = _remove_blobs(at, _links(trash) - _links(at.snapshots), trash) + _plain_bytes(trash)
    for commit in gone:
        remove_tree(at.folder / "trees" / f"{commit}.json")
        remove_tree(at.folder / ".no_exist" / commit)
    remove_tree(trash)
    return freed


def _links(folder: Path) -> set[str]:
    """The names of all blobs that links in a folder of snapshots lead to: wherever they are, rather too many."""
    found = set()
    for path in walk(folder):
        place, name = os.path.split(readlink(path) or "")
        if os.path.basename(place) == "blobs" and name not in ("", ".", ".."):
            found.add(name)
    return found


def _plain_bytes(folder: Path) -> int:
    return sum(_bytes(path.lstat()) for path in walk(folder) if not path.is_symlink())


# --- blobs ----------------------------------------------------------------------------------------------------------


def _remove_blobs(at: RepoCache, names: Collection[str], trash: Path) -> int:
    """Remove blobs that nothing links any more. Returns the freed bytes."""
    freed = 0
    for name in sorted(names):
        path = at.blobs / name
        status = lstat(path)
        if status is None or stat.S_ISDIR(status.st_mode):
            continue
        stored = shared.target(at.cache, path)
        if stored is not None:
            (trash / f"{stored.name}{SHARED}").touch()  # or nobody would know of it once the link is gone
        path.unlink(missing_ok=True)
        (at.blobs / f"{name}{NEW}").unlink(missing_ok=True)
        freed += _bytes(status)
    for entry in os.listdir(trash):
        if entry.endswith(SHARED):
            freed += shared.sweep(at.cache, entry.removesuffix(SHARED))
    return freed


def _discard(at: RepoCache, oids: Collection[str] | None) -> int:
    """Remove parts that nobody holds; and, unless somebody holds one, blobs that no snapshot was made of. Freed bytes.

    A download that goes on counts on its finished blobs, and which of them are its own cannot be seen.
    """
    try:
        names = os.listdir(at.blobs)
    except FileNotFoundError:
        return 0
    freed, held = 0, False
    for name in names:
        oid, dot, suffix = name.rpartition(".")
        if dot + suffix not in (PART, MAP, NEW):
            continue
        if dot + suffix == PART and is_held(at.blobs / name):
            held = True
            continue
        if oids is not None and oid not in oids:
            continue
        if dot + suffix == PART:
            freed += _remove_part(at, oid)
        elif dot + suffix == MAP and lstat(at.blobs / f"{oid}{PART}") is None:
            (at.blobs / name).unlink(missing_ok=True)
    if held:
        return freed
    fresh = {name.removesuffix(NEW) for name in names if name.endswith(NEW)}
    if oids is not None:
        fresh &= set(oids)
    linked = _links(at.snapshots) if fresh else set()
    for oid in fresh:
        status = lstat(at.blobs / oid)
        if status is not None and stat.S_ISREG(status.st_mode) and oid not in linked:
            (at.blobs / oid).unlink(missing_ok=True)
            freed += _bytes(status)
        (at.blobs / f"{oid}{NEW}").unlink(missing_ok=True)
    return freed


def _remove_part(at: RepoCache, oid: str) -> int:
    """Remove a part and its map, unless somebody takes it in this very moment. Returns the freed bytes."""
    path = at.blobs / f"{oid}{PART}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError:  # a link, or nothing that can be locked: nobody writes there
        path.unlink(missing_ok=True)
        return 0
    try:
        if not try_lock(fd):
            return 0
        status = os.fstat(fd)
        (at.blobs / f"{oid}{MAP}").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return min(status.st_size, status.st_blocks * 512)  # a part may have holes
    finally:
        os.close(fd)


def _bytes(status: os.stat_result) -> int:
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


# --- the repository's folder ------------------------------------------------------------------------------------------


def _remove_rest(at: RepoCache) -> int:
    """Remove the repository's folder with what lies around in it, once no snapshot, ref or held part is left."""
    if _entries(at.snapshots) or hub.refs(at.folder, strict=True) or lstat(at.folder / TRASH) is not None:
        return 0
    names = _entries(at.blobs)
    if any(name.endswith(PART) for name in names):
        return 0
    freed = 0
    for name in names:
        status = lstat(at.blobs / name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            (at.blobs / name).unlink(missing_ok=True)
            freed += _bytes(status)
    _remove_empty(at)
    return freed


def _remove_empty(at: RepoCache) -> None:
    """Remove the repository's folder where it holds neither files nor anything that is not understood.

    `snapshots` goes last: without it, huggingface_hub calls a repository corrupt.
    """
    if _entries(at.snapshots) or _entries(at.blobs) or next(walk(at.refs), None) is not None:
        return
    own = {"snapshots", "blobs", "refs", "trees", ".no_exist", LITTER}
    if not own.issuperset(os.listdir(at.folder)):
        return
    for name in ("trees", ".no_exist", "refs", LITTER):
        remove_tree(at.folder / name)
    if _rmdir(at.blobs) and _rmdir(at.snapshots) and _rmdir(at.folder):
        locks = _hub_locks(at)
        if (status := lstat(locks)) is not None and stat.S_ISDIR(status.st_mode):
            remove_tree(locks)


def _entries(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name != LITTER]
    except FileNotFoundError:
        return []


def _rmdir(folder: Path) -> bool:
    """Whether an empty folder is gone now; one that is in use stays."""
    try:
        (folder / LITTER).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
