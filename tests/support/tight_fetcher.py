"""A real fetcher whose disk has as little room as the test says: `python tight_fetcher.py FILE --fd N`.

While FILE is there, so many bytes as it says (a number in text) are free, and writing to a part fails once it says 0.
For machines where a test cannot have a small file system of its own.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

statvfs, pwrite, pwritev = os.statvfs, os.pwrite, os.pwritev


def room() -> int | None:
    try:
        with open(FILE) as file:
            return int(file.read())
    except FileNotFoundError:
        return None


class Tight:
    """Of statvfs, what the fetcher reads."""

    def __init__(self, free: int) -> None:
        self.f_frsize = self.f_bsize = 1
        self.f_bavail = self.f_bfree = free


def tight_statvfs(path: Any) -> Any:
    free = room()
    return statvfs(path) if free is None else Tight(free)


def tight_pwrite(fd: int, data: Any, at: int) -> int:
    require_room()
    return pwrite(fd, data, at)


def tight_pwritev(fd: int, pieces: Any, at: int, *flags: int) -> int:
    require_room()
    return pwritev(fd, pieces, at, *flags)


def require_room() -> None:
    if room() == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    FILE = sys.argv.pop(1)
    os.statvfs, os.pwrite, os.pwritev = tight_statvfs, tight_pwrite, tight_pwritev  # type: ignore[assignment]
    from mlxd.fetch.__main__ import main

    code = main()
    sys.stderr.flush()
    os._exit(code)
