"""Daemons that take over from each other: a daemon whose process is the newest of them, and a newer mlxd to be it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from support.daemon import PATIENCE_S, Daemon

# A program that is mlxd but for what it says of its version, and for what `before` does first.
_NEWER = """
import sys
import mlxd
mlxd.__version__ = {version!r}
{before}
from mlxd.cli.main import main
sys.exit(main())
"""


def newer(folder: Path, version: str = "9.9.9", before: str = "") -> list[str]:
    """The program of another mlxd."""
    path = folder / f"mlxd-{version}-{abs(hash(before)) % 10**6}.py"
    path.write_text(_NEWER.format(version=version, before=before))
    return [sys.executable, str(path)]


class Relay(Daemon):
    """`Daemon`, whose process may be another one with each restart. Leaving its block ends the newest, and fails if any
    that came before still runs or has ended badly.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[psutil.Process] = []

    def newest(self) -> psutil.Process:
        """The process that accepts connections."""
        with self.client(start=False) as client:
            return self.note(client.status().pid)

    def note(self, pid: int) -> psutil.Process:
        process = psutil.Process(pid)
        if process not in self.seen:
            self.seen.append(process)
        return process

    def gone(self, pid: int) -> None:
        """Wait for the end of one of them."""
        for process in self.seen:
            if process.pid == pid:
                process.wait(PATIENCE_S)

    def processes(self) -> list[psutil.Process]:
        """All that belong to this home: daemons and their children."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("MLXD_HOME") == str(self.home)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def daemons(self) -> list[psutil.Process]:
        """Those of them that serve, or are about to find out that another does."""
        found = []
        for process in self.processes():
            try:
                words = process.cmdline()
            except psutil.Error:  # it has just ended
                continue
            if "serve" in words and "--join" not in words:
                found.append(process)
        return found

    def stop(self) -> int:
        assert self.process is not None
        later = [one for one in self.daemons() if one.pid != self.process.pid]
        for process in later:
            process.send_signal(signal.SIGTERM)
        if later:  # the first one ends by itself, and now soon
            self.process.communicate(timeout=PATIENCE_S)
        status = super().stop()
        _, alive = psutil.wait_procs(self.processes(), timeout=PATIENCE_S)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"
        return status
