"""A terminal with a person at it: what a command shows there, what is typed, ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import psutil

from support.scripted_daemon import PATIENCE_S

MLXD = [sys.executable, "-m", "mlxd"]


class Terminal:
    """A command whose three standard streams are a terminal. `environment` is added to this process's."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.shown = ""
        self._seen = 0
        self.process = subprocess.Popen(
            [*MLXD, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
        )  # fmt: skip
        os.close(slave)

    def until(self, text: str) -> str:
        """Read until `text` is shown after what was waited for before; returns what came up to its end."""
        give_up_at = time.monotonic() + PATIENCE_S
        while (found := self.shown.find(text, self._seen)) < 0:
            came = time.monotonic() < give_up_at and self._read()  # a screen that is drawn anew never falls silent
            assert came, f"{text!r} never came: {self.shown[-8000:]!r}"
        began, self._seen = self._seen, found + len(text)
        return self.shown[began : self._seen]

    def _read(self) -> bool:
        if not select.select([self._master], [], [], PATIENCE_S)[0]:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # Linux says EIO once nobody has the other end open
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, columns: int, lines: int) -> None:
        """As a person does with a window."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def modes(self) -> list[Any]:
        """How it treats what is typed."""
        return termios.tcgetattr(self._master)

    def interrupt(self) -> None:
        """Ctrl-C, once the command waits for a key."""
        interrupt(self.process)

    def end(self) -> int:
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


def interrupt(process: subprocess.Popen[Any]) -> None:
    """Ctrl-C, once a command waits.

    What waits for a line, or for an answer, has said so a moment before; a signal in between is acted on only at the
    next line, or ends the command before it can take its request back. A person is never that quick. Only Linux tells
    of one process that it sleeps.
    """
    give_up_at = time.monotonic() + PATIENCE_S
    while sys.platform == "linux" and psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
        assert process.poll() is None, "it has ended by itself"
        assert time.monotonic() < give_up_at, "it never waits"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
