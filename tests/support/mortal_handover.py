"""`python mortal_handover.py serve`: a daemon, or the one that takes over from it, that meets with something.

MORTAL_HANDOVER names a folder. The file `fault` in it says what happens once, as JSON: at which step, of the old one or
the new one, which deed. Whoever gets there makes it `fault.done`, says so to the socket `told`, and does it. Each step
that is reached is written to `trace`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# In the order in which they come: a name, the function, and what it has to have been given (`say` says several things).
# A step is reached once its function has returned; those in BEFORE, as it is called.
OLD = {
    "asked": ("mlxd.handover", "_spawn", None),
    "started": ("mlxd.handover", "_spawn", None),
    "heard ready": ("mlxd.handover", "Successor.ready", None),
    "let go": ("mlxd.runtime", "Runtime.let_go", None),
    "paused": ("mlxd.server.server", "Server.pause", None),
    "said go": ("mlxd.handover", "_Link.say", "Go"),
    "heard serving": ("mlxd.handover", "Successor.take_over", None),
    "told the manager": ("mlxd.notify", "Notifier.main_pid", None),
    "given away": ("mlxd.server.listen", "Listener.give_away", None),
    "left": ("mlxd.server.server", "Server.leave", None),
    "answered": ("mlxd.server.server", "Server.close", None),
    "closed": ("mlxd.server.listen", "Listener.close", None),
}
NEW = {
    "born": ("", "", None),
    "inherited": ("mlxd.handover", "inherited", None),
    "met": ("mlxd.handover", "Predecessor.meet", None),
    "said ready": ("mlxd.handover", "_Link.say", "Ready"),
    "heard go": ("mlxd.handover", "Predecessor.go", None),
    "swept": ("mlxd.children.supervisor", "Supervisor.sweep", None),
    "begun": ("mlxd.runtime", "Runtime.begin", None),
    "accepting": ("mlxd.server.server", "Server.start", None),
    "said serving": ("mlxd.handover", "_Link.say", "Serving"),
    "claimed": ("mlxd.server.listen", "Listener.claim", None),
    "alone": ("mlxd.succession", "Forerunner.follow", None),
}
BEFORE = {"asked", "answered", "closed"}
# From these on there is no way back: the new one serves.
SERVING = {"heard serving", "told the manager", "given away", "left", "answered", "closed"}
SERVING |= {"said serving", "claimed", "alone"}
DEEDS = ("the old is killed", "the new is killed", "the new fails", "the new hangs", "the new is told to end")
# How long the old one waits for one that hangs, in seconds.
IMPATIENCE_S = 0.2


class Fate:
    """What this process meets with.

    Attributes:
        role: `old` or `new`; one that has taken over is the old one for the next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.role = "new" if "MLXD_HANDOVER" in os.environ else "old"
        self.pids = {"old": os.getppid(), "new": os.getpid()} if self.role == "new" else {"old": os.getpid()}

    def spawned(self, pid: int) -> None:
        self.pids = {"old": os.getpid(), "new": pid}

    def reached(self, role: str, step: str) -> None:
        if role == "old" and step == "asked":
            self.role, self.pids = "old", {"old": os.getpid()}
        if role != self.role:
            return
        with open(self.folder / "trace", "a") as file:
            file.write(f"{role} {step}\n")
        try:
            fault = json.loads((self.folder / "fault").read_text())
            if [fault["role"], fault["step"]] != [role, step]:
                return
            os.rename(self.folder / "fault", self.folder / "fault.done")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(json.dumps(self.pids).encode(), str(self.folder / "told"))
        self._do(fault["deed"])

    def _do(self, deed: str) -> None:
        if deed == "nothing happens":
            return
        if deed == "the new fails":
            raise RuntimeError("this one is to fail")
        whom, what = {
            "the old is killed": ("old", signal.SIGKILL),
            "the new is killed": ("new", signal.SIGKILL),
            "the new hangs": ("new", signal.SIGSTOP),
            "the new is told to end": ("new", signal.SIGTERM),
        }[deed]
        os.kill(self.pids[whom], what)

    def hangs(self) -> bool:
        """Whether the new one was stopped."""
        try:
            return bool(json.loads((self.folder / "fault.done").read_text())["deed"] == "the new hangs")
        except FileNotFoundError:
            return False


def watch(fate: Fate, role: str, step: str, module: str, name: str, said: str | None) -> None:
    """Have a function tell that its step is reached."""
    place: Any = import_module(module)
    *owner, last = name.split(".")
    for one in owner:
        place = getattr(place, one)
    real: Callable[..., Any] = getattr(place, last)
    bound = inspect.getattr_static(place, last)

    def due(arguments: tuple[Any, ...]) -> bool:
        return said is None or any(type(one).__name__ == said for one in arguments)

    if inspect.iscoroutinefunction(real):

        @functools.wraps(real)
        async def watched(*arguments: Any, **named: Any) -> Any:
            if step in BEFORE:
                fate.reached(role, step)
            result = await real(*arguments, **named)
            if step not in BEFORE and due(arguments):
                fate.reached(role, step)
            return result

    else:

        @functools.wraps(real)
        def watched(*arguments: Any, **named: Any) -> Any:
            if step in BEFORE:
                fate.reached(role, step)
            result = real(*arguments, **named)
            if step == "started":
                fate.spawned(result[0].pid)
            if step not in BEFORE and due(arguments):
                fate.reached(role, step)
            return result

    setattr(place, last, staticmethod(watched) if isinstance(bound, classmethod) else watched)


class Hasty:
    """asyncio, for the old one: whoever hangs is not waited for as long as the product does."""

    def __init__(self, fate: Fate) -> None:
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @contextlib.asynccontextmanager
    async def timeout(self, delay_s: float) -> AsyncIterator[None]:
        async with asyncio.timeout(delay_s) as limit:
            watch = asyncio.create_task(self._cut_short(limit))
            try:
                yield
            finally:
                watch.cancel()

    async def _cut_short(self, limit: asyncio.Timeout) -> None:
        while not self._fate.hangs():  # it cannot tell
            await asyncio.sleep(0.05)
        limit.reschedule(asyncio.get_running_loop().time() + IMPATIENCE_S)


def main() -> int:
    fate = Fate(Path(os.environ["MORTAL_HANDOVER"]))
    if fate.role == "new":
        fate.reached("new", "born")
    from mlxd import handover
    from mlxd.cli.main import main as command

    handover.asyncio = Hasty(fate)  # type: ignore[assignment, attr-defined]
    for role, steps in (("old", OLD), ("new", NEW)):
        for step, (module, name, said) in steps.items():
            if module:
                watch(fate, role, step, module, name, said)
    return command()


if __name__ == "__main__":
    sys.exit(main())
