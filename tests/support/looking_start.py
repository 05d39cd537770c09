"""`python looking_start.py FILE serve`: a daemon that looks at the modes of its home and sockets all along its start.

It does so before each line of mlxd/server/listen.py and at each of the interpreter's audit events, with a umask that
restricts nothing, and writes to FILE what it found: a line for each look, that begins with `WRONG` where others could
have come in.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


class Look:
    def __init__(self, file: int) -> None:
        self._file = file
        self._home, self._socket = Path(os.environ["MLXD_HOME"]), Path(os.environ["MLXD_SOCKET"])
        self._folders = [self._home] if self._socket.parent == self._home else [self._home, self._socket.parent]
        self._made = [folder for folder in self._folders if not folder.exists()]
        self._looking = False

    def __call__(self, where: str) -> None:
        if self._looking:  # looking raises events, too
            return
        self._looking = True
        try:
            wrong = self._wrong()
            os.write(self._file, f"{'WRONG' if wrong else 'right'} {where}: {', '.join(wrong)}\n".encode())
        finally:
            self._looking = False

    def _wrong(self) -> list[str]:
        """Folders that it made are private from the first; all are before there is a socket, which always is."""
        found = []
        for folder in self._folders:
            try:
                mode, names = stat.S_IMODE(os.stat(folder).st_mode), os.listdir(folder)
            except FileNotFoundError:
                continue
            sockets = []
            for name in names:
                try:
                    status = os.lstat(folder / name)
                except FileNotFoundError:
                    continue
                if stat.S_ISSOCK(status.st_mode):
                    sockets.append(name)
                    if stat.S_IMODE(status.st_mode) != 0o600:
                        found.append(f"{name} is {stat.S_IMODE(status.st_mode):o}")
            if mode != 0o700 and (sockets or folder in self._made):
                found.append(f"{folder} is {mode:o}")
        return found


def tracer(look: Look) -> Callable[[FrameType, str, Any], Any]:
    def line(frame: FrameType, event: str, _: Any) -> Any:
        look(f"{frame.f_code.co_name}:{frame.f_lineno}")
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.endswith("server/listen.py") else None

    return call


def main(arguments: list[str]) -> int:
    from mlxd.cli.main import main as command

    os.umask(0)
    look = Look(os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    sys.addaudithook(lambda event, _: look(event))
    sys.settrace(tracer(look))
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
