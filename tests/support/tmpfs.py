"""A small file system in memory: a disk that is as full as a test says."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import pytest

PAGE = 4096


class Tmpfs:
    """`with Tmpfs(size) as disk:` mounts it, or skips the test where nothing can be mounted; leaving unmounts it.

    Args:
        size: in bytes.
        folder: where it is mounted; by itself a new folder, which goes with it.
    """

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mlxd-disk-"))
        self._filler = self.folder / "filler"
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "mlxd-test", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if self._own:
                self.folder.rmdir()
            pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")

    def free(self) -> int:
        """In bytes."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def leave(self, count: int) -> None:
        """Have so many bytes free, whatever was free before; none is not a page."""
        self.relax()
        with open(self._filler, "ab", buffering=0) as file:  # a page at a time: others may write meanwhile
            while self.free() > count and takes_a_page(file.fileno()):
                pass
        assert abs(self.free() - count) <= PAGE

    def relax(self) -> None:
        """Have all the room that others do not take."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)
        if self._own:
            self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def takes_a_page(fd: int) -> bool:
    """Whether there was one; it is taken."""
    try:
        os.write(fd, bytes(PAGE))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True
