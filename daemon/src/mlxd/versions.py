"""Which of two versions of mlxd is the older one."""

from __future__ import annotations

import re

__all__ = ["is_older"]

# As PEP 440 writes the public ones that we use: 1.2.0, 1.2.0rc1, 1.2.0.dev3.
_VERSION = re.compile(r"(\d{1,9}(?:\.\d{1,9}){0,5})(?:\.?(dev|a|b|rc)(\d{1,9}))?(?:\+[\w.]+)?")
_BEFORE = ("dev", "a", "b", "rc")


def is_older(version: str, than: str) -> bool:
    """Whether `version` is older than the other one. False where either cannot be understood: nobody makes room for
    what may be older."""
    mine, theirs = _key(version), _key(than)
    return mine is not None and theirs is not None and mine < theirs


def _key(version: str) -> tuple[list[int], int, int] | None:
    found = _VERSION.fullmatch(version)
    if found is None:
        return None
    release = [int(part) for part in found[1].split(".")]
    while release and release[-1] == 0:  # 1.2 is 1.2.0
        release.pop()
    return release, _BEFORE.index(found[2]) if found[2] else len(_BEFORE), int(found[3] or 0)
