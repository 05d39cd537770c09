"""What the system has of memory, and what processes hold of it. Reads; decides nothing, and keeps nothing.

    linux   from the files of /proc and of control groups
    macos   by system calls

What cannot be read is None; nothing here raises for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

from ..core.pressure import Reading

__all__ = ["System", "this_system"]


class System(Protocol):
    """One machine. Each call takes well below a millisecond and may come from any thread."""

    def read(self) -> Reading: ...

    def footprint(self, pid: int) -> int | None:
        """Bytes of memory that would be free if the process were not there; what it shares with files does not
        count."""


def this_system(root: str = "/") -> System:
    """The machine that this runs on; with another `root`, the Linux one whose files lie below that folder."""
    if sys.platform == "darwin" and root == "/":
        from .macos import MacSystem

        return MacSystem()
    from .linux import LinuxSystem

    return LinuxSystem(Path(root))
