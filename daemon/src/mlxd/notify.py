"""What a daemon tells the service manager that started it, as sd_notify(3) has it: ready, status, alive, stopping.

Without NOTIFY_SOCKET in the environment all of it does nothing. A manager that does not listen costs a message, never
the daemon.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

__all__ = ["PATIENCE_S", "Notifier"]

# How much longer than a drain a service manager waits before it kills.
PATIENCE_S = 10


class Notifier:
    """Speaks to the manager's datagram socket.

    Args:
        env: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are; they are removed, so that no child uses them.

    Attributes:
        environment: what another process needs to speak to the same manager, once that was told of it.
        watchdog_s: a sign of life is expected at least this often, in seconds; None where nobody waits for one.
    """

    def __init__(self, env: MutableMapping[str, str] | None = None) -> None:
        env = os.environ if env is None else env
        address = env.pop("NOTIFY_SOCKET", "")
        usec, pid = env.pop("WATCHDOG_USEC", ""), env.pop("WATCHDOG_PID", "")
        self._address: str | bytes | None = None
        if address.startswith("@"):
            self._address = b"\0" + os.fsencode(address[1:])
        elif address.startswith("/"):
            self._address = address
        mine = pid in ("", str(os.getpid()))
        self.watchdog_s = int(usec) / 1e6 if self._address and mine and usec.isdigit() and int(usec) > 0 else None
        self._told = ""
        given = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": usec}
        self.environment = {name: value for name, value in given.items() if value}

    def ready(self) -> None:
        self._send("READY=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def stopping(self, within_s: float = 0.0) -> None:
        """It ends, and may take so long, in seconds, also where the manager was once told of less."""
        self._send("STOPPING=1")
        if within_s:
            self._send(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    @property
    def heard(self) -> bool:
        """Whether a manager wants to be told."""
        return self._address is not None

    def main_pid(self, pid: int) -> None:
        """Another process is the service from now on. What it tells counts after this."""
        self._send(f"MAINPID={pid}")

    def status(self, text: str) -> None:
        """A line for people, as `systemctl status` shows it. Said again only where it changed."""
        line = " ".join(text.split())
        if line != self._told:
            self._told = line
            self._send(f"STATUS={line}")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), self._address)
