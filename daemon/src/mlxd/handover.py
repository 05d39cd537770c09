"""One daemon in place of another, with the listening socket and the locks handed over, so that both are never without.

    the old one                               the new one
    starts it                   ───────────→  reads the settings and which versions its state has; changes nothing
                                ←── ready ──
    lets go of downloads, accepts no more
                                ─── go ────→  takes up downloads, accepts
                                ← serving ──
    answers what it had accepted
                                ─── held ──→  counts with the memory that the old one still holds
                                ←── stop ───  is told to end itself, and waits for the old one to do so
    ends                        end of file   all memory is its own

Until `serving` the old one can go on as if nothing had happened, and does so where the new one fails, dies or takes
too long. Each notices the other's death by the end of the file, for they speak over a socket pair.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mlxd_client.errors import RestartFailed

from .server.listen import Listener
from .wholefiles import write_whole

__all__ = ["Go", "Inherited", "Predecessor", "Successor", "choose_program", "expected", "inherited", "own_program"]

_VARIABLE = "MLXD_HANDOVER"
_PROGRAM_FILE = "successor.json"
_MAX_LINE = 65_536
# How long a process has to end once it is of no use.
_REAP_S = 5.0


# --- what they say --------------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, tag="ready", tag_field="say"):
    """The settings can be used and the state can be read."""

    version: str
    pid: int


class Go(msgspec.Struct, tag="go", tag_field="say"):
    """The socket and the files are yours; `held_bytes` of the memory are not yet. `loaded` are the models that people
    would miss, most recently used first."""

    pid: int
    held_bytes: int
    loaded: list[str] = []


class Serving(msgspec.Struct, tag="serving", tag_field="say"):
    pass


class Held(msgspec.Struct, tag="held", tag_field="say"):
    held_bytes: int


class Stop(msgspec.Struct, tag="stop", tag_field="say"):
    pass


_Said = Ready | Go | Serving | Held | Stop
_decoder = msgspec.json.Decoder(_Said)


class _Link:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, sock: socket.socket) -> _Link:
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_LINE)
        writer.transport.set_write_buffer_limits(high=0)  # uvloop then writes at once, and not after this turn
        return cls(reader, writer)

    def say(self, what: _Said) -> None:
        """Said when this returns, whatever becomes of this process; whether it is heard shows in what comes back."""
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(what) + b"\n")

    async def hear(self) -> _Said | None:
        """What is said next; None once the other end is gone, or says what cannot be understood."""
        try:
            line = await self._reader.readline()
            return _decoder.decode(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, msgspec.MsgspecError):
            return None

    def close(self) -> None:
        self._writer.close()


# --- which program --------------------------------------------------------------------------------------------------


class _Program(msgspec.Struct):
    """Written by the `mlxd` command that wants its own version to serve, where the daemon was started from elsewhere.

    A file, because whoever can write in the home folder could change the daemon's settings as well; what comes over
    the socket never says what is to be run.
    """

    program: list[str]
    managed: bool = False
    version: int = 1


def own_program() -> list[str]:
    """How this process was started, without the arguments of `mlxd` itself."""
    arguments = len(sys.argv) - 1
    program = list(sys.orig_argv[: len(sys.orig_argv) - arguments])
    program[0] = sys.executable or program[0]
    return program


def choose_program(home: Path, program: Sequence[str], *, managed: bool = False) -> None:
    """Have the next handover of this home start another program than the daemon's own.

    Args:
        managed: a service manager starts the same program from now on. Else a daemon that is managed does not take it.

    Raises: OSError.
    """
    folder = home / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    said = msgspec.json.encode(_Program(list(program), managed))
    write_whole(folder / _PROGRAM_FILE, said, durable=False, shared=True)


def _chosen_program(home: Path, managed: bool) -> list[str]:
    """What was chosen for this handover, and for this one only; else this daemon's own."""
    path = home / "run" / _PROGRAM_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            said = msgspec.json.decode(file.read(_MAX_LINE), type=_Program)
            mine = os.fstat(fd).st_uid == os.geteuid()
        path.unlink()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return own_program()
    return said.program if mine and said.program and said.managed >= managed else own_program()


# --- the old one's side ---------------------------------------------------------------------------------------------


class Successor:
    """The process that is to take over.

    Attributes:
        pid: its process id.
        version: which mlxd it is, once it is ready.
        gone: it has died, or stopped talking, after it had taken over.
    """

    def __init__(self, process: subprocess.Popen[bytes], link: _Link, told: BinaryIO) -> None:
        self.pid = process.pid
        self.version = ""
        self.gone = False
        self._process = process
        self._link = link
        self._told = told
        self._held_bytes = 0

    @classmethod
    async def start(cls, listener: Listener, home: Path, env: Mapping[str, str], *, managed: bool = False) -> Successor:
        """Start it, with its ends of all that it inherits. Raises RestartFailed."""
        program = [*_chosen_program(home, managed), *sys.argv[1:]]
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                link = await _Link.open(ours)  # first, for there is nobody to end yet if this is cancelled
                try:
                    process, told = _spawn(program, listener, theirs, env)
                except BaseException:
                    link.close()
                    raise
        except (OSError, ValueError) as error:
            raise RestartFailed(f"`{' '.join(program)}` cannot be started: {error}") from None
        return cls(process, link, told)

    async def ready(self, timeout_s: float) -> None:
        """Wait until it could take over. Raises RestartFailed, with its own words where it said any."""
        said = await self._expect(Ready, timeout_s, "it was not ready")
        self.version = said.version

    async def take_over(self, held_bytes: int, loaded: list[str], timeout_s: float) -> None:
        """Let it, and wait until it serves. Raises RestartFailed."""
        self._held_bytes = held_bytes
        self._link.say(Go(os.getpid(), held_bytes, loaded))
        await self._expect(Serving, timeout_s, "it did not serve")

    async def _expect(self, kind: type[Any], timeout_s: float, otherwise: str) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                said = await self._link.hear()
        except TimeoutError:
            raise RestartFailed(f"the new daemon failed: {otherwise} within {timeout_s:g} s{self._words()}") from None
        if not isinstance(said, kind):
            raise RestartFailed(f"the new daemon failed: {await self._end()}{self._words()}")
        return said

    async def _end(self) -> str:
        """How the process ended, which may be a moment after its socket did."""
        for _ in range(50):
            status = self._process.poll()
            if status is not None:
                return f"it ended with exit code {status}" if status >= 0 else f"it died of signal {-status}"
            await asyncio.sleep(0.02)
        return "it stopped talking"

    def _words(self) -> str:
        """The last line of what it said on standard error."""
        with contextlib.suppress(OSError, ValueError):
            size = self._told.seek(0, os.SEEK_END)
            self._told.seek(max(0, size - 4096))
            lines = [line.strip() for line in self._told.read().decode(errors="replace").splitlines()]
            last = next((line for line in reversed(lines) if line), "")
            return f": {last[:1000]}" if last else ""
        return ""

    def held(self, held_bytes: int) -> None:
        """Tell it how much memory is not its own yet, where that is news."""
        if held_bytes != self._held_bytes:
            self._held_bytes = held_bytes
            self._link.say(Held(held_bytes))

    async def wished_away(self, hurry: asyncio.Event, drain_s: float) -> None:
        """Wait until this daemon has to end: at once in a hurry, or `drain_s` after the other one wants it to, or is
        gone itself."""
        hurried = asyncio.ensure_future(hurry.wait())
        heard = asyncio.ensure_future(self._wishes_end())
        try:
            await asyncio.wait({hurried, heard}, return_when=asyncio.FIRST_COMPLETED)
            if not hurried.done():
                await asyncio.wait({hurried}, timeout=drain_s)
        finally:
            hurried.cancel()
            heard.cancel()

    async def _wishes_end(self) -> None:
        while (said := await self._link.hear()) is not None:
            if isinstance(said, Stop):
                return
        self.gone = True

    async def discard(self) -> None:
        """It is of no use: end it, if it has not ended, and wait for that."""
        self._link.close()
        self._told.close()
        if self._process.poll() is None:
            self._process.kill()
        for _ in range(int(_REAP_S / 0.02)):
            if self._process.poll() is not None:
                return
            await asyncio.sleep(0.02)


def _spawn(
    program: Sequence[str], listener: Listener, control: socket.socket, env: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """Start a process with its ends of all that it inherits. Raises OSError, ValueError.

    Returns: the process, and what it says before it serves.
    """
    with contextlib.ExitStack() as on_failure:
        told: BinaryIO = on_failure.enter_context(tempfile.TemporaryFile())
        stderr = os.dup(2)
        try:
            inherited = _Told(
                pid=os.getpid(), control=control.fileno(), listener=listener.sock.fileno(), locks=listener.locks,
                stderr=stderr, path=None if listener.path is None else str(listener.path),
            )  # fmt: skip
            process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                stderr=told,
                pass_fds=(inherited.control, inherited.listener, stderr, *inherited.locks),
                env={**env, _VARIABLE: msgspec.json.encode(inherited).decode()},
                start_new_session=True,
            )
        finally:
            os.close(stderr)
        on_failure.pop_all()
    return process, told


# --- the new one's side ---------------------------------------------------------------------------------------------


class _Told(msgspec.Struct):
    """What a successor inherits: numbers of descriptors, and whose they were."""

    pid: int
    control: int
    listener: int
    locks: list[int]
    stderr: int
    path: str | None = None


class Inherited:
    """What this process was started with.

    Attributes:
        listener: accepts nothing yet, and is not this daemon's before `Listener.claim`.
    """

    def __init__(self, told: _Told) -> None:
        for number in (told.control, told.listener, told.stderr, *told.locks):
            os.set_inheritable(number, False)
        sock = socket.socket(fileno=told.listener)
        sock.setblocking(False)
        self.listener = Listener(sock, None if told.path is None else Path(told.path), told.locks, mine=False)
        self.control = socket.socket(fileno=told.control)
        self.stderr = told.stderr


def expected() -> bool:
    """Whether this process was started to take over from another, which goes on if it does not."""
    return _VARIABLE in os.environ


def inherited() -> Inherited | None:
    """What was handed over to this process; None where it starts by itself. The variable that told of it is removed."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    try:
        told = msgspec.json.decode(text, type=_Told)
    except msgspec.MsgspecError:  # somebody else's
        return None
    if told.pid != os.getppid():  # it came down from a parent's, or that one has died
        return None
    return Inherited(told)


class Predecessor:
    """The daemon that this one takes over from.

    Attributes:
        gone: set once it has ended.
    """

    def __init__(self, link: _Link, stderr: int) -> None:
        self.gone = asyncio.Event()
        self._link = link
        self._stderr = stderr

    @classmethod
    async def meet(cls, inherited: Inherited) -> Predecessor:
        return cls(await _Link.open(inherited.control), inherited.stderr)

    async def go(self, version: str) -> Go | None:
        """Say that all is well, and wait until it is time. None where it will not be: the old daemon stays, or died."""
        self._link.say(Ready(version, os.getpid()))
        said = await self._link.hear()
        return said if isinstance(said, Go) else None

    def serving(self) -> None:
        """Say that there is no way back. What goes to standard error from here on goes where the other's went."""
        self._link.say(Serving())
        os.dup2(self._stderr, 2)
        os.close(self._stderr)

    async def held(self) -> int:
        """How much memory it holds next; 0 once it is gone."""
        said = await self._link.hear()
        if isinstance(said, Held):
            return said.held_bytes
        self.gone.set()
        self._link.close()
        return 0

    def stop(self) -> None:
        """Ask it to end soon."""
        self._link.say(Stop())
