"""Which form the file has, found out without SQLite: for the start of the daemon, and for `mlxd doctor`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["APPLICATION_ID", "FILE", "VERSION", "version_of"]

FILE = "batch.sqlite3"
APPLICATION_ID = 0x6D6C7864  # "mlxd"
VERSION = 2


def version_of(path: Path) -> int | None:
    """The version of the file; None where it is not there, cannot be read, or is none of ours. See SQLite's file
    format, section 1.3."""
    try:
        with open(path, "rb") as file:
            first = file.read(100)
    except OSError:
        return None
    if len(first) < 100 or not first.startswith(b"SQLite format 3\0"):
        return None
    return int.from_bytes(first[60:64], "big") if int.from_bytes(first[68:72], "big") == APPLICATION_ID else None
