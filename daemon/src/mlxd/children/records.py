"""A file per running child, so that the next daemon can find and end what a killed one left behind.

A record names a process by pid and start time, never by pid alone: pids are used again. What is read back is not
trusted: a record that is odd in any way is removed, and nothing is killed for it.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..stateversion import json_version, refuse_newer
from ..wholefiles import write_whole

__all__ = ["ChildRecord", "Records", "command_line", "kill", "matches", "start_token"]

VERSION = 1
_MAX_BYTES = 65_536


class ChildRecord(msgspec.Struct, frozen=True):
    """`started` is the process's start as `start_token` gives it; `argv` its command line."""

    pid: int
    started: str
    kind: str
    name: str
    daemon_pid: int
    argv: list[str]
    version: int = VERSION


class Records:
    """The folder of records. Raises OSError where it cannot be made or written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, pid: int, kind: str, name: str, argv: Sequence[str]) -> None:
        """Record a child of this process. Atomic; not durable, since no child outlives the machine."""
        record = ChildRecord(pid, start_token(pid) or "", kind, name, os.getpid(), list(argv))
        write_whole(self.folder / f"{pid}.json", msgspec.json.encode(record), durable=False)

    def remove(self, pid: int) -> None:
        (self.folder / f"{pid}.json").unlink(missing_ok=True)

    def refuse_newer(self) -> None:
        """Raises StateTooNew where a newer daemon left a record. To be called before anything is written."""
        for path in self.entries():
            refuse_newer(path, json_version(path), VERSION)

    def entries(self) -> list[Path]:
        """Whatever lies in the folder, records or not; nothing where it is no folder or cannot be read."""
        try:
            return sorted(self.folder.iterdir())
        except OSError:
            return []

    def read(self, path: Path) -> ChildRecord | None:
        """The record in `path`; None where it is no sound one."""
        try:
            # A FIFO must not block the start, nor a link lead out of the folder.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size > _MAX_BYTES:
                return None
            record = msgspec.json.decode(os.read(fd, _MAX_BYTES), type=ChildRecord)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            return None
        finally:
            os.close(fd)
        return record if path.name == f"{record.pid}.json" and 1 < record.pid < 2**31 else None


def matches(record: ChildRecord) -> bool:
    """Whether the recorded process still lives: same pid, same start, same command, and not this process."""
    if record.pid == os.getpid() or not record.started or start_token(record.pid) != record.started:
        return False
    # The interpreter may show itself under another path than it was called by; its arguments are as they were given.
    live = command_line(record.pid)
    return len(live) > 1 and live[1:] == list(record.argv[1:])


def kill(record: ChildRecord) -> bool:
    """SIGKILL, if the process is still the recorded one. Returns: whether it was."""
    if sys.platform == "linux":
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return False
        else:  # what the descriptor means cannot change between the check and the kill
            try:
                if not matches(record):
                    return False
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
            except ProcessLookupError:
                return False
            finally:
                os.close(pidfd)
    if not matches(record):
        return False
    try:
        os.kill(record.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def start_token(pid: int) -> str | None:
    """When the process started, as text that no other process with the same pid ever has; None where none lives.

    On Linux the kernel's ticks since boot and the boot's id, because a wall-clock time computed from them moves when
    the clock is set. Elsewhere the start time that the kernel keeps.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
            with open("/proc/sys/kernel/random/boot_id", "rb") as file:
                boot = file.read().strip().decode("ascii")
        except (OSError, UnicodeDecodeError):
            return None
        if len(fields) < 20 or fields[0] in (b"Z", b"X", b"x"):
            return None
        return f"{boot}:{fields[19].decode('ascii', 'replace')}"
    seen = _seen_by_psutil(pid)
    return None if seen is None else f"{seen[0]:.6f}"


def command_line(pid: int) -> list[str]:
    """The process's arguments; empty where it is gone or not ours to look at."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                data = file.read()
        except OSError:
            return []
        return [os.fsdecode(part) for part in data.split(b"\0")[:-1]]
    seen = _seen_by_psutil(pid)
    return [] if seen is None else seen[1]


def _seen_by_psutil(pid: int) -> tuple[float, list[str]] | None:
    """Start time and arguments; None where it is gone, a zombie, or not ours to look at."""
    import psutil  # only here: the daemon counts its megabytes

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time()), [str(part) for part in process.cmdline()]
    except psutil.Error:
        return None
