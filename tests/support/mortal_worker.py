"""`python mortal_worker.py WHO DEED --fd N`: a real worker that dies, or its daemon, as it writes prompts to disk.

WHO is `worker` or `daemon`; DEED `create` or `rename` for the moment before a third file is made or put in its place,
`write` for the middle of its bytes. With MORTAL_WORKER there is a file that says so once it has happened.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

THIRD = 3


def die(who: str, deed: str) -> None:
    Path(os.environ["MORTAL_WORKER"]).touch()
    pid = os.getpid() if who == "worker" else os.getppid()
    os.kill(pid, signal.SIGKILL)
    while True:  # the kernel ends it with its daemon, or the pipe's end does
        signal.pause()


def watch(who: str, deed: str) -> None:
    from mlxd import promptfiles

    seen = {"create": 0, "rename": 0}

    def look(event: str, arguments: tuple[object, ...]) -> None:
        name = {"open": "create", "os.rename": "rename"}.get(event)
        if name is None or not str(arguments[0]).endswith(promptfiles.SUFFIX + promptfiles.NEW):
            return
        seen[name] += 1
        if name == deed and seen[name] == THIRD:
            die(who, deed)

    sys.addaudithook(look)
    if deed == "write":
        whole = os.write

        def part(fd: int, data: bytes) -> int:
            if seen["create"] != THIRD:
                return whole(fd, data)
            whole(fd, memoryview(data)[: len(data) // 2])
            return die(who, deed)  # type: ignore[func-returns-value]

        os.write = part  # type: ignore[assignment]


def main() -> None:
    signal.alarm(120)
    who, deed = sys.argv.pop(1), sys.argv.pop(1)
    if not os.path.exists(os.environ["MORTAL_WORKER"]):
        watch(who, deed)
    code = importlib.import_module("mlxd.worker.__main__").main()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
