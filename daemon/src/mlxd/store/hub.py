"""The Hugging Face cache on disk, read only: which repositories it holds, and which snapshot of each is current.

    <cache>/models--<org>--<name>/refs/<branch>            a commit
                                  snapshots/<commit>/...   links into blobs/, or plain files
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["cache_folder", "current_snapshot", "is_repo_id", "repo_folder", "repositories"]

# As the hub allows: one or two parts of letters, digits, "-", "_", "."; "--" separates the parts of folder names.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}\Z")
_COMMIT = re.compile(r"[0-9a-f]{7,64}\Z")
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


def is_repo_id(ref: str) -> bool:
    """Whether this could be a repository: then it also is a safe folder name."""
    return len(ref) <= 96 and _REPO.match(ref) is not None and "--" not in ref and ".." not in ref


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


def current_snapshot(folder: Path) -> Path | None:
    """The snapshot that `main` names, else the newest that is there; None where there is none."""
    snapshots = folder / "snapshots"
    try:
        with open(folder / "refs" / "main", encoding="ascii") as file:
            commit = file.read(100).strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if _COMMIT.match(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    try:
        with os.scandir(snapshots) as entries:
            found = [(entry.stat().st_mtime, entry.name) for entry in entries if _COMMIT.match(entry.name)]
    except OSError:
        return None
    return snapshots / max(found)[1] if found else None
