"""`python stopping_start.py STEP serve`: a daemon that stops itself (SIGSTOP) before the STEPth step of its start.

A step is a call that creates, locks, opens, binds or renames something of its home or socket, as the interpreter's
audit events tell. Its name is written to standard output first. 0 never stops; `reused` finds a socket that an earlier
process of its number left; `uid:N` becomes that user first.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

STEPS = {
    "open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.truncate", "os.scandir", "os.listdir",
    "fcntl.flock", "socket.bind", "socket.connect",
}  # fmt: skip
NAMELESS = {"os.truncate", "fcntl.flock"}  # they are told a descriptor only


class Stop:
    def __init__(self, step: int) -> None:
        self._left = step
        self._places = tuple(os.fsencode(os.environ[name]) for name in ("MLXD_HOME", "MLXD_SOCKET"))

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or self._left == 0 or not (event in NAMELESS or self._ours(arguments)):
            return
        self._left -= 1
        if self._left == 0:
            os.write(1, event.encode() + b"\n")
            os.kill(os.getpid(), signal.SIGSTOP)

    def _ours(self, arguments: tuple[Any, ...]) -> bool:
        texts = [os.fsencode(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)]
        return any(text.startswith(place) for text in texts for place in self._places)


def leave_a_socket() -> None:
    """What an earlier process of the same number was killed over."""
    path = os.environ["MLXD_SOCKET"]
    folder, name = os.path.split(path)
    if os.path.isdir(folder):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.path.join(folder, f".{name}.{os.getpid()}"))


def main(arguments: list[str]) -> int:
    from mlxd.cli.main import main as command

    how, *rest = arguments
    if how == "reused":
        leave_a_socket()
    elif how.startswith("uid:"):
        import tomllib  # noqa: F401  # that user may have no way to these files

        import mlxd.app  # noqa: F401

        os.setgroups([])
        os.setgid(int(how[4:]))
        os.setuid(int(how[4:]))
    elif how != "0":
        sys.addaudithook(Stop(int(how)))
    return command(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
