"""A file descriptor that becomes readable when a process exits: pidfd on Linux, kqueue on macOS.

Chosen over SIGCHLD: libuv and asyncio each install their own handler for it, in different ways per Python version,
and a signal says neither who died nor, when several do at once, how many. Reaping stays with the caller.
"""

from __future__ import annotations

import os
import select
import sys

__all__ = ["ExitWatch"]


class ExitWatch:
    """Watches one process that the caller has not reaped. `close` when done."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where the system has no such means; the caller then asks `waitpid` now and then."""
        if sys.platform == "darwin":
            self._kqueue = select.kqueue()
            exit_of = select.kevent(
                pid,
                filter=select.KQ_FILTER_PROC,
                flags=select.KQ_EV_ADD | select.KQ_EV_ONESHOT,
                fflags=select.KQ_NOTE_EXIT,
            )
            try:
                self._kqueue.control([exit_of], 0, 0)
            except OSError:  # ESRCH: it is a zombie already
                self._kqueue.close()
                raise
            self.fileno = self._kqueue.fileno()
        elif sys.platform == "linux":
            self.fileno = os.pidfd_open(pid)
        else:
            raise OSError("no exit watch on this platform")

    def close(self) -> None:
        if sys.platform == "darwin":
            self._kqueue.close()
        else:
            os.close(self.fileno)
