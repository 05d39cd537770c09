"""Starts children, keeps the list of them, and sees to it that none is left: at close, and after a crash by sweep.

The spawn is `subprocess.Popen`: on Linux it is a vfork in C, on macOS a fork followed by nothing but system calls,
and closes every descriptor but the child's end of the pipe. uvloop's own spawn runs Python callbacks between fork and
exec, makes the pipe inheritable to any process started meanwhile, and reaps by SIGCHLD; see `exitwatch` on that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from . import records
from .child import Child, Spawned
from .environment import child_environment
from .interface import ChildHandler, ChildSettings, ChildSpec, Log
from .pipe import READ_BYTES

__all__ = ["Supervisor"]

_SWEEP_WAIT_S = 2.0
# After SIGKILL a process ends as soon as the kernel lets go of it; one that waits for a broken disk may not.
_KILL_WAIT_S = 5.0


class Supervisor:
    """All children of one daemon. For one event loop; made inside or outside of it.

    Args:
        run_dir: a private folder of this daemon's home; records go to `children/`, and `tmp/` is the children's TMPDIR.
        log: structlog's way of logging: an event and fields.
        settings: limits for every child.
        clock: seconds, never going back; the running loop's by default.
        environment: what children's environments are made from; the daemon's own by default.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        log: Log,
        settings: ChildSettings | None = None,
        clock: Callable[[], float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.settings = settings or ChildSettings()
        self._run_dir = run_dir.absolute()
        self._temp_dir = self._run_dir / "tmp"
        self._records = records.Records(self._run_dir / "children")
        self._log = log
        self._clock = clock
        self._environment = os.environ if environment is None else environment
        self._children: set[Child] = set()
        self._scratch = bytearray(READ_BYTES)
        self._closing = False

    @property
    def children(self) -> tuple[Child, ...]:
        """Those that have not ended yet, oldest first."""
        return tuple(sorted(self._children, key=lambda child: child.started_at))

    def spawn(self, spec: ChildSpec, handler: ChildHandler) -> Child:
        """Start a child. Never raises for what the system refuses: that comes to `on_exit` as `spawn_failed`.

        Blocks the loop for the time of a spawn, about a millisecond.
        """
        loop = asyncio.get_running_loop()
        child = Child(
            spec,
            handler,
            loop=loop,
            clock=self._clock or loop.time,
            settings=self.settings,
            log=self._log,
            on_gone=self._forget,
        )
        self._children.add(child)
        if self._closing:
            child._fail("the daemon is shutting down")
            return child
        try:
            self._make_folders()
            _keep_exit_statuses()
            spawned, argv = self._open(spec)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            child._fail(str(error))
            return child
        child._start(spawned, self._scratch)
        try:
            self._records.write(child.pid, child.kind, child.name, argv)
        except OSError as error:  # a full disk; the child's own orphan prevention still stands
            self._log.warning("no record of a child", pid=child.pid, reason=str(error))
        self._log.info("child spawned", kind=child.kind, name=child.name, pid=child.pid)
        return child

    def refuse_newer(self) -> None:
        """Raises StateTooNew where the records of children are a newer daemon's."""
        self._records.refuse_newer()

    async def sweep(self, *, spare: int | None = None) -> list[int]:
        """End what an earlier daemon of this folder left behind. To be called at start, with the daemon's lock held.

        Args:
            spare: the pid of a daemon that still runs, and sees to its children itself.

        Returns: the pids that were killed. What does not die within two seconds keeps its record for the next time.
        """
        own = {child.pid for child in self._children}
        killed: list[records.ChildRecord] = []
        for path in self._records.entries():
            record = self._records.read(path)
            if record is not None and (record.pid in own or record.daemon_pid == spare):
                continue
            if record is not None and records.kill(record):
                self._log.warning("killed an orphan", kind=record.kind, name=record.name, pid=record.pid)
                killed.append(record)
                continue
            self._discard(path)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _SWEEP_WAIT_S
        for record in killed:
            while records.matches(record) and loop.time() < deadline:
                await asyncio.sleep(0.005)
            if records.matches(record):
                self._log.error("an orphan does not die", kind=record.kind, name=record.name, pid=record.pid)
            else:
                self._records.remove(record.pid)
        return [record.pid for record in killed]

    async def close(self, grace_s: float | None = None) -> None:
        """Stop all children, with `grace_s` seconds for each to go by itself, all at the same time.

        Afterwards none is left, and spawning fails. Only a process that the kernel itself cannot end may remain;
        that is logged, and its record stays for the next sweep.
        """
        self._closing = True
        for child in self.children:
            child.stop(grace_s)
        grace_s = self.settings.stop_grace_s if grace_s is None else grace_s
        if await self._all_ended(grace_s + self.settings.term_grace_s + _KILL_WAIT_S):
            return
        for child in self.children:
            child.kill()
        if not await self._all_ended(_KILL_WAIT_S):
            self._log.error("children left", pids=[child.pid for child in self.children])

    async def _all_ended(self, timeout_s: float) -> bool:
        waits = [asyncio.ensure_future(child.wait()) for child in self.children]
        if not waits:
            return True
        _, pending = await asyncio.wait(waits, timeout=timeout_s)
        for wait in pending:
            wait.cancel()
        return not pending

    def _forget(self, child: Child) -> None:
        self._children.discard(child)
        if child.pid:
            try:
                self._records.remove(child.pid)
            except OSError as error:
                self._log.warning("a child's record stays", pid=child.pid, reason=str(error))

    def _discard(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a folder, or not ours
            self._log.warning("what is no record stays", path=str(path), reason=str(error))

    def _make_folders(self) -> None:
        for folder in (self._temp_dir, self._records.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _open(self, spec: ChildSpec) -> tuple[Spawned, list[str]]:
        """Start the process. Raises OSError, ValueError or SubprocessError; nothing is left open then."""
        ours, theirs = socket.socketpair()
        try:
            stderr_read, stderr_write = os.pipe()
            try:
                argv = [*spec.argv, "--fd", str(theirs.fileno())]
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr_write,
                    stderr=stderr_write,
                    pass_fds=(theirs.fileno(),),
                    env=child_environment(self._environment, self._temp_dir, spec.env),
                )
            except BaseException:
                os.close(stderr_read)
                raise
            finally:
                os.close(stderr_write)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Spawned(process, ours, stderr_read), argv


def _keep_exit_statuses() -> None:
    """Undo an ignored SIGCHLD, which whoever started the daemon may have left it: the kernel would then drop exit
    statuses, and give a dead child's pid away before the daemon knows."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
