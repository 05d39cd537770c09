"""Reaching a daemon: open its socket, check whose it is, start it where asked, and how long to wait between attempts.

Shared by both shells, so that they differ in how they wait and in nothing else.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import IO, Any, Protocol

from .errors import ConnectFailed
from .paths import check_socket_path, socket_path

__all__ = [
    "RECONNECT_S",
    "START_DEADLINE_S",
    "Backoff",
    "NobodyListens",
    "Start",
    "dial",
    "open_socket",
    "peer_uid",
    "reach",
]

# How a client may start the daemon: False never, True by finding `mlxd`, a command line, or a function that does it.
Start = bool | Sequence[str] | Callable[[], Awaitable[object] | object]

# A daemon that was just started has this long to listen. One that ended may have lost the race against another just
# starting, which then gets the second limit. One that found another holding its folder is started again now and then
# until the first limit: the other may be about to end.
START_DEADLINE_S = 10.0
_AFTER_EXIT_S = 3.0
_ALREADY_RUNNING = 8
_START_AGAIN_S = 0.5
# A client that was connected before gives a restarting daemon this long; a busy daemon has it in any case.
RECONNECT_S = 5.0

_NOBODY = {errno.ENOENT, errno.ECONNREFUSED}
_BUSY = {errno.EAGAIN, errno.EINPROGRESS, errno.ECONNRESET, errno.EPIPE}


class NobodyListens(ConnectFailed):
    """No socket, or nobody behind it, or its queue is full: worth starting the daemon or trying again.

    Attributes:
        busy: there is a daemon, which has more connections to accept than it got to.
    """

    def __init__(self, message: str, busy: bool = False) -> None:
        super().__init__(message)
        self.busy = busy


class Backoff:
    """Delays between attempts: exponential with full jitter, so that many clients do not return in step.

    Args:
        first_s: upper bound of the first delay.
        most_s: upper bound of every delay.
    """

    def __init__(self, first_s: float = 0.02, most_s: float = 2.0, draw: Callable[[], float] = random.random) -> None:
        self._first_s, self._most_s, self._draw = first_s, most_s, draw
        self._bound_s = first_s

    def next_s(self) -> float:
        delay = self._draw() * self._bound_s
        self._bound_s = min(self._most_s, self._bound_s * 2)
        return delay

    def reset(self) -> None:
        self._bound_s = self._first_s


def resolve(path: str | os.PathLike[str] | None) -> str:
    """The socket to connect to: the caller's, else the environment's. Raises SocketPathTooLong."""
    return socket_path() if path is None else check_socket_path(os.path.abspath(path))


def open_socket(path: str) -> socket.socket:
    """A connected, non-blocking Unix socket whose listener is this user (or root: a service manager may have made it).

    Connecting to a Unix socket never waits for the peer's reply, so that an event loop may call this directly.

    Raises:
        NobodyListens: trying again later, or starting the daemon, can help.
        ConnectFailed: it cannot: no permission, no socket, another user's.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        try:
            made.connect(path)
        except OSError as error:
            if error.errno in _NOBODY:
                raise NobodyListens(f"no mlxd listens at {path}") from None
            if error.errno in _BUSY:
                raise NobodyListens(f"mlxd is too busy to take a connection at {path}", busy=True) from None
            raise ConnectFailed(f"cannot connect to {path}: {error.strerror or error}") from None
        owner = peer_uid(made)
        if owner is not None and owner not in (os.getuid(), 0):
            raise ConnectFailed(f"the process that listens at {path} belongs to another user (uid {owner})")
    except BaseException:
        made.close()
        raise
    return made


def peer_uid(connected: socket.socket) -> int | None:
    """The user id of the process at the other end, or None where the platform does not tell."""
    try:
        if sys.platform == "darwin":  # struct xucred of sys/ucred.h: version, uid, group count, 16 groups
            raw = connected.getsockopt(0, 1, 76)  # SOL_LOCAL, LOCAL_PEERCRED
            return int(struct.unpack_from("=II", raw)[1])
        raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
        return int(struct.unpack("=iII", raw)[1])
    except (OSError, AttributeError, struct.error):
        return None


def dial(
    path: str, start: Start, *, again: bool, until: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Generator[Any, None, socket.socket]:
    """Connect, starting the daemon or trying again where that can help. Returns the socket.

    A generator, so that each shell waits in its own way: it yields seconds to sleep, or what `start` returned where
    that has to be awaited.

    Args:
        again: the client was connected before, so that the daemon may be just restarting.
        until: the caller's own limit, on `clock`.

    Raises ConnectFailed, with the reason.
    """
    try:
        return open_socket(path)
    except NobodyListens as error:
        last = error
        starting = start is not False and not error.busy
        if not (starting or again or error.busy):
            raise
    began, child = clock(), None
    if starting and callable(start):
        made = start()
        if hasattr(made, "__await__"):
            yield made
    elif starting:
        child = spawn(_command(start), path)
    backoff = Backoff(most_s=0.2 if starting else 1.0)
    try:
        while True:
            yield backoff.next_s()
            try:
                return open_socket(path)
            except NobodyListens as error:
                last = error
            now = clock()
            if child is not None and child.refused(now - began):
                child.close()
                child = spawn(child.command, path)
            reason = child.hopeless(now - began) if child else None
            limit = START_DEADLINE_S if starting else RECONNECT_S
            if reason is None and child is None and now - began > limit:
                reason = f"tried for {limit:g} s"
            if reason is None and until is not None and now > until:
                reason = "the caller's time limit has passed"
            if reason is not None:
                raise ConnectFailed(f"{last}: {reason}") from None
    finally:
        if child is not None:
            child.close()


def reach(path: str | os.PathLike[str] | None = None, start: bool | Sequence[str] = True) -> socket.socket:
    """A connected socket, the daemon being started where none runs; blocks meanwhile.

    Raises ConnectFailed, with the reason; SocketPathTooLong.
    """
    steps = dial(resolve(path), start, again=False)
    while True:
        try:
            time.sleep(next(steps))
        except StopIteration as reached:
            made: socket.socket = reached.value
            return made


class _Process(Protocol):
    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class Child:
    """A daemon that this process started. It is on its own from then on; only its early end is of interest."""

    def __init__(self, process: _Process, command: Sequence[str], errors: IO[bytes] | None = None) -> None:
        self.process = process
        self.command = list(command)
        self.errors = errors
        self._ended_after_s: float | None = None

    def refused(self, waited_s: float) -> bool:
        """Whether another daemon kept it from starting, which has not listened for a while since. `waited_s` as below;
        no more once that is beyond the first limit."""
        if self.process.poll() != _ALREADY_RUNNING or waited_s > START_DEADLINE_S:
            return False
        return waited_s - self._ended(waited_s) > _START_AGAIN_S

    def _ended(self, waited_s: float) -> float:
        """After how many seconds it was seen to have ended."""
        if self._ended_after_s is None:
            self._ended_after_s = waited_s
        return self._ended_after_s

    def hopeless(self, waited_s: float) -> str | None:
        """Why waiting longer makes no sense, or None. `waited_s` is the time since the first start."""
        code = self.process.poll()
        if code is None:
            return f"it did not listen within {START_DEADLINE_S:g} s" if waited_s > START_DEADLINE_S else None
        if waited_s - self._ended(waited_s) <= _AFTER_EXIT_S:
            return None
        ended = f"exit code {code}" if code >= 0 else f"signal {-code}"
        why = self._last_words()
        return f"`{' '.join(self.command)}` ended with {ended}" + (f": {why}" if why else "; run it to see why")

    def close(self) -> None:
        """Its end is of no interest any more."""
        if self.errors is not None:
            self.errors.close()

    def _last_words(self) -> str:
        """The last line that it wrote on standard error; it shares the file's position, which must stay where it is."""
        if self.errors is None:
            return ""
        number = self.errors.fileno()
        end = os.pread(number, 4096, max(0, os.fstat(number).st_size - 4096))
        lines = end.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("mlxd: ") if lines else ""


def daemon_command() -> list[str]:
    """The command that serves: `mlxd` beside this interpreter, on PATH, or the package in this environment.

    Raises ConnectFailed where there is none.
    """
    import importlib.util
    import shutil

    beside = os.path.join(os.path.dirname(sys.executable or ""), "mlxd")
    found = beside if os.access(beside, os.X_OK) else shutil.which("mlxd")
    if found:
        return [found, "serve"]
    if importlib.util.find_spec("mlxd") is not None:
        return [sys.executable, "-m", "mlxd", "serve"]
    raise ConnectFailed("mlxd is not installed: no such command beside this Python or on PATH")


def spawn(command: Sequence[str], path: str) -> Child:
    """Start `command` detached: own session, no terminal, no inherited files. It is told to listen at `path`.

    What it says on standard error goes to a file without a name, from which a start that failed is explained.

    Raises ConnectFailed where it cannot be started at all.
    """
    import subprocess
    import tempfile
    import threading

    env = dict(os.environ, MLXD_SOCKET=path)
    if env.get("MLXD_HOME"):
        env["MLXD_HOME"] = os.path.abspath(os.path.expanduser(env["MLXD_HOME"]))
    nothing = subprocess.DEVNULL
    try:
        errors: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115  # Child closes it
    except OSError:
        errors = None
    try:
        process = subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=errors or nothing, env=env, cwd="/", start_new_session=True
        )
    except (OSError, ValueError) as error:
        if errors is not None:
            errors.close()
        raise ConnectFailed(f"cannot start `{' '.join(command)}`: {error}") from None
    # Whoever outlives the daemon must collect its exit status, or it stays in the process table.
    threading.Thread(target=process.wait, name="mlxd-reaper", daemon=True).start()
    return Child(process, command, errors)


def _command(start: Any) -> list[str]:
    return daemon_command() if start is True else list(start)
