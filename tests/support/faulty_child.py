"""A real worker or fetcher that does itself harm when it is told to. A process of its own.

    python faulty_child.py worker|fetch --fd N [...]

Between two turns of its loop, where it beats, it looks for a file named by FAULTY_CHILD, `-` and its pid. If it is
there, it removes it and does what it says: see FAULTS. Everything else is the real child's.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MIB = 1024 * 1024
PATIENCE_S = 60.0


def segfault(_pulse: Any) -> None:
    ctypes.string_at(0)


def abort(_pulse: Any) -> None:
    os.abort()


def leave(_pulse: Any) -> NoReturn:
    print("it had enough", file=sys.stderr, flush=True)
    os._exit(3)


def hold(_pulse: Any) -> None:
    """A call into C that never returns, and never lets go of the interpreter: no handler runs, no thread has a turn."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        ctypes.PyDLL(None).pause()


def freeze(_pulse: Any) -> None:
    """As if its processor were taken away."""
    os.kill(os.getpid(), signal.SIGSTOP)


def limit(_pulse: Any) -> None:
    """All the memory that it may have, and then more."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MIB, used + 64 * MIB))
    eat(_pulse)


def eat(_pulse: Any) -> None:
    """More and more memory, until somebody ends that."""
    held = []
    while True:
        held.append(b"x" * (4 * MIB))


def garbage(pulse: Any) -> None:
    pulse._pipe._socket.sendall(b"\xff" * 64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(3600)


def tell(prefix: Path, pid: int, fault: str) -> None:
    """Have one of them do itself harm, and wait until it does."""
    path, aside = Path(f"{prefix}-{pid}"), Path(f"{prefix}-{pid}.new")
    aside.write_text(fault)
    os.replace(aside, path)
    give_up_at = time.monotonic() + PATIENCE_S
    while path.exists():
        assert time.monotonic() < give_up_at, "it does not look"
        time.sleep(0.001)


FAULTS: dict[str, Callable[[Any], object]] = {
    "segfault": segfault, "abort": abort, "exit": leave, "hold": hold, "freeze": freeze, "limit": limit, "eat": eat,
    "garbage": garbage,
}  # fmt: skip


def main() -> None:
    signal.alarm(300)  # no test leaves one behind for longer
    from mlxd.childside import Pulse

    told, beat = f"{os.environ['FAULTY_CHILD']}-{os.getpid()}", Pulse.beat

    def act_and_beat(self: Pulse) -> bool:
        try:
            with open(told) as file:
                fault = file.read()
            os.unlink(told)
        except FileNotFoundError:
            return beat(self)
        FAULTS[fault](self)
        return beat(self)

    Pulse.beat = act_and_beat  # type: ignore[method-assign]
    module = importlib.import_module(f"mlxd.{sys.argv.pop(1)}.__main__")
    code = module.main()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
