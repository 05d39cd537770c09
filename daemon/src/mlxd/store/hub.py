"""The Hugging Face cache on disk, read only: which repositories it holds, and which snapshot each revision means.

    <cache>/models--<org>--<name>/refs/<branch or tag>     a commit
                                  snapshots/<commit>/...   links into blobs/, or plain files
                                  blobs/<oid>              the bytes, named by their hash
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from .files import require_folder

__all__ = [
    "MAIN", "cache_folder", "find_snapshot", "is_commit", "is_file_name", "is_oid", "is_repo_id", "is_revision",
    "join_ref", "read_ref", "refs", "repo_folder", "repositories", "snapshots", "split_ref",
]  # fmt: skip

MAIN = "main"

# As the hub allows: one or two parts of letters, digits, "-", "_", "."; "--" separates the parts of folder names.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}\Z")
_REVISION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*\Z")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\Z")
_SNAPSHOT = re.compile(r"[0-9a-f]{7,64}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_OID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_PREFIX = "models--"


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps models for this environment; the folder may not exist."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(os.path.abspath(_expand(env[name], env)))
    home = env.get("HF_HOME")
    if not home:
        cache = env.get("XDG_CACHE_HOME") or os.path.join(_expand("~", env), ".cache")
        home = os.path.join(cache, "huggingface")
    return Path(os.path.abspath(_expand(home, env))) / "hub"


def _expand(path: str, env: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        return (env.get("HOME") or os.path.expanduser("~")) + path[1:]
    return path


# --- names --------------------------------------------------------------------------------------------------------


def is_repo_id(ref: str) -> bool:
    """Whether this could be a repository: then it also is a safe folder name."""
    return len(ref) <= 96 and _REPO.match(ref) is not None and "--" not in ref and ".." not in ref


def is_revision(text: str) -> bool:
    """Whether this could be a branch, tag or commit: then it also is a safe path below refs/.

    Another spelling of `main` is none: where upper and lower case are the same to the file system, it would be `main`.
    """
    return (
        0 < len(text) <= 200
        and _REVISION.match(text) is not None
        and ".." not in text
        and (text == MAIN or text.lower() != MAIN)
    )


def is_commit(text: str) -> bool:
    """Whether this is a commit in full."""
    return _COMMIT.match(text) is not None


def is_oid(text: str) -> bool:
    """Whether this is a hash that a blob is named by: 40 digits of a git blob's SHA-1, or 64 of a SHA-256."""
    return _OID.match(text) is not None


def is_file_name(text: str) -> bool:
    """Whether this is a name that a repository's file may have here: then it also is a safe path below a snapshot."""
    return len(text) <= 400 and all(_FILE_PART.match(part) and ".." not in part for part in text.split("/"))


def split_ref(name: str) -> tuple[str, str | None]:
    """`org/name@revision` as (repo, revision); the revision is None where there is no "@". Neither is validated."""
    repo, at, revision = name.partition("@")
    return repo, revision if at else None


def join_ref(repo: str, revision: str | None) -> str:
    """The id of the model that a repository's revision is; None and `main` are the same."""
    return repo if revision in (None, MAIN) else f"{repo}@{revision}"


# --- what is there ------------------------------------------------------------------------------------------------


def repo_folder(cache: Path, repo: str) -> Path:
    """The folder of a repository that passed `is_repo_id`."""
    return cache / (_PREFIX + repo.replace("/", "--"))


def repositories(cache: Path) -> Iterator[str]:
    """The ids of all repositories in the cache, whole or not; none where the cache cannot be read."""
    try:
        names = sorted(os.listdir(cache))
    except OSError:
        return
    for name in names:
        repo = name.removeprefix(_PREFIX).replace("--", "/")
        if name.startswith(_PREFIX) and is_repo_id(repo):
            yield repo


def read_ref(folder: Path, ref: str) -> str | None:
    """The commit that a ref of the repository in `folder` names, or None. `ref` passed `is_revision`."""
    try:
        return _read_commit(folder / "refs" / ref)
    except OSError:
        return None


def refs(folder: Path, *, strict: bool = False) -> dict[str, str]:
    """All refs of the repository in `folder` with the commits they name, also such that no revision can be named like.

    What names no commit is left out, and so is what lies behind linked folders.

    Args:
        strict: raise OSError for what cannot be read, and UnsafeFolder for linked folders, instead.
    """
    found: dict[str, str] = {}
    root = folder / "refs"
    for place, folders, names in os.walk(root, onerror=_raise if strict else None):
        if strict:
            for name in folders:
                require_folder(Path(place, name))
        for name in names:
            path = Path(place, name)
            try:
                commit = _read_commit(path)
            except OSError:
                if strict:
                    raise
                continue
            if commit is not None:
                found[str(path.relative_to(root))] = commit
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _read_commit(path: Path) -> str | None:
    try:
        # Not to wait, should something have put a pipe there.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        commit = file.read(100).decode("ascii", "replace").strip()
    return commit if _SNAPSHOT.match(commit) else None


def snapshots(folder: Path) -> dict[str, int]:
    """The commits that the repository in `folder` has a snapshot of, and when each was last changed, in ns."""
    try:
        with os.scandir(folder / "snapshots") as entries:
            return {entry.name: entry.stat().st_mtime_ns for entry in entries if _is_snapshot(entry)}
    except OSError:
        return {}


def _is_snapshot(entry: os.DirEntry[str]) -> bool:
    return _SNAPSHOT.match(entry.name) is not None and entry.is_dir()


def find_snapshot(folder: Path, revision: str | None = None) -> Path | None:
    """The snapshot of a revision that passed `is_revision`, or None where there is none. The revision None is `main`.

    It is the one that the ref of this name names, else that of the commit of this name. Where `main` names none that
    is there, it is the newest of those that no other ref names.
    """
    revision = revision or MAIN
    commit = read_ref(folder, revision)
    if commit is not None and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    if revision != MAIN:
        exact = folder / "snapshots" / revision
        return exact if commit is None and is_commit(revision) and exact.is_dir() else None
    named = {commit for ref, commit in refs(folder).items() if ref != MAIN}
    found = [(at, commit) for commit, at in snapshots(folder).items() if commit not in named]
    return folder / "snapshots" / max(found)[1] if found else None
