"""A service manager as small as one can be: holds the socket, hands it over, and hears what the daemon tells of itself.

Does what systemd does: the socket is descriptor 3 of the daemon, LISTEN_PID and LISTEN_FDS say so, and a datagram
socket takes its notifications.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from mlxd_client import Client
from support.daemon import kernels

PATIENCE_S = 60.0
# Takes over the descriptors that are named, from number 3 on, and becomes the daemon.
_LAUNCH = """
import fcntl, os, sys
numbers = [int(text) for text in sys.argv[1].split(",") if text]
for place, number in enumerate([fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 64) for number in numbers], 3):
    os.dup2(number, place)
os.environ |= {"LISTEN_PID": str(os.getpid() + int(sys.argv[2])), "LISTEN_FDS": str(len(numbers))}
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class Activator:
    """`with Activator(idle_exit_s=0.2) as activator:` listens; `start` starts a daemon, as `on_demand` does for each
    first connection.

    Args:
        program: what the interpreter is to run.

    Attributes:
        process: the daemon that was started last.
        starts: how many were started.
        ended: their exit statuses.
    """

    def __init__(self, *, program: Sequence[str] = ("-m", "mlxd"), **settings: Any) -> None:
        self.program = program
        self.home = Path(tempfile.mkdtemp(prefix="mlxd-"))
        self.path = self.home / "mlxd.sock"
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(self.path))
        os.chmod(self.path, 0o600)
        self.sock.listen(64)
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(str(self.home / "notify"))
        self._heard.settimeout(PATIENCE_S)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MLXD_")}
        self.env |= {"MLXD_HOME": str(self.home), "HF_HUB_CACHE": str(self.home / "hub"), "HF_HUB_OFFLINE": "1"}
        self.env |= {f"MLXD_{name.upper()}": str(value) for name, value in settings.items()}
        self.env["NOTIFY_SOCKET"] = str(self.home / "notify")
        (self.home / "run").mkdir(mode=0o700)
        (self.home / "run" / "tmp").symlink_to(kernels())
        self.process: subprocess.Popen[str] | None = None
        self.starts = 0
        self.ended: list[int] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, *arguments: str, sockets: int = 1, pid_off_by: int = 0) -> subprocess.Popen[str]:
        numbers = [self.sock.fileno()] * sockets
        command = [sys.executable, "-c", _LAUNCH, ",".join(map(str, numbers)), str(pid_off_by)]
        command += [*self.program, "serve", "--managed", *arguments]
        self.process = subprocess.Popen(
            command, env=self.env, pass_fds=numbers, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.starts += 1
        return self.process

    def end(self) -> tuple[int, str]:
        """Wait for the daemon's end. Returns its exit status and what it said on stderr."""
        assert self.process is not None
        _, told = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, told

    def hear(self) -> str:
        """The next notification."""
        return self._heard.recv(4096).decode()

    def hear_until(self, message: str) -> list[str]:
        heard = [self.hear()]
        while heard[-1] != message:
            heard.append(self.hear())
        return heard

    def falls_silent(self, seconds: float) -> bool:
        """Whether a pause of that length comes within the next hundred notifications."""
        self._heard.settimeout(seconds)
        try:
            for _ in range(100):
                self.hear()
        except TimeoutError:
            return True
        finally:
            self._heard.settimeout(PATIENCE_S)
        return False

    def client(self, **options: Any) -> Client:
        return Client(self.path, **{"name": "tests", "timeout_s": PATIENCE_S, "start": False} | options)

    def on_demand(self) -> None:
        """From now on, start a daemon whenever somebody connects while none runs."""
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self.sock], [], [], 0.02)[0]:
                self.ended.append(self.start().wait(PATIENCE_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
        if self._thread is not None:
            self._thread.join()
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()
        self.sock.close()
        self._heard.close()
        shutil.rmtree(self.home, ignore_errors=True)
