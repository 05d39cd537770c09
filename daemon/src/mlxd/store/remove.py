"""What leaves the Hugging Face cache: models, replaced revisions, unfinished downloads. Safe to interrupt anywhere."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

__all__ = ["delete", "discard", "finish", "prune"]


def delete(cache: Path, repo: str, revision: str = "main") -> int:
    """Returns freed bytes."""
    raise NotImplementedError


def prune(cache: Path, repo: str, commits: Collection[str]) -> int:
    raise NotImplementedError


def discard(cache: Path, repo: str, oids: Collection[str] | None = None) -> int:
    raise NotImplementedError


def finish(cache: Path) -> int:
    raise NotImplementedError
