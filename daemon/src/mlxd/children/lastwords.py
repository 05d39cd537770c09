"""A child's stderr: a bounded tail for its last words, and each line to the debug log."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from .death import clean_last_words

__all__ = ["LastWords"]

_READ_BYTES = 65_536
_TAIL_BYTES = 16_384
_LINE_BYTES = 1_024
# A child that writes lines as fast as it can must not turn the daemon into a logger: past this many per read they
# are counted only.
_LINES_PER_READ = 64


class LastWords:
    """Reads `fd`, a pipe's read end, and owns it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, on_line: Callable[[str], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._on_line = on_line
        self._tail = bytearray()
        self._line = bytearray()
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._read)

    def text(self) -> str:
        """The last words, at most 2 KiB, printable."""
        return clean_last_words(bytes(self._tail))

    def close(self) -> None:
        """Read what is still there, without waiting for more, and let go."""
        if self._fd < 0:
            return
        # The writer is gone, or not worth waiting for; a pipe holds 64 KiB, so that two reads see its end.
        if self._read():
            self._read()
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            if self._line:
                self._on_line(_text(self._line))
                self._line.clear()

    def _read(self) -> bool:
        """Whether anything came."""
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, _READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._let_go()
            return False
        self._tail += data
        del self._tail[:-_TAIL_BYTES]
        self._split(data)
        return True

    def _split(self, data: bytes) -> None:
        lines = data.split(b"\n")
        for line in lines[: min(len(lines) - 1, _LINES_PER_READ)]:
            self._on_line(_text(self._line + line))
            self._line.clear()
        if len(lines) - 1 > _LINES_PER_READ:
            self._line.clear()
            self._on_line(f"({len(lines) - 1 - _LINES_PER_READ} more lines at once)")
        self._line += lines[-1][:_LINE_BYTES]
        del self._line[_LINE_BYTES:]


def _text(line: bytes | bytearray) -> str:
    return clean_last_words(bytes(line[:_LINE_BYTES]), _LINE_BYTES)
