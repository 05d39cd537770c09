"""What every service manager can do for mlxd, and which one this platform has."""

from __future__ import annotations

import sys
from typing import Protocol

import msgspec

from .spec import ServiceSpec

__all__ = ["Manager", "ServiceState", "manager_for"]


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    current: what is installed is what would be installed now.
    listening: the manager holds the socket: the first client is served.
    pid: of the daemon, where one runs.
    text: what the daemon said of itself last.
    failed: how it ended, where that was no good end.
    """

    manager: str
    installed: bool
    current: bool
    listening: bool
    pid: int | None
    text: str
    failed: str | None
    files: list[str]


class Manager(Protocol):
    """All of it is idempotent, and raises ServiceError where the manager refuses."""

    name: str
    spec: ServiceSpec

    def install(self) -> bool:
        """Have the manager hold the socket, now and after each login. Returns whether anything had to be done."""

    def update(self) -> bool:
        """Have the manager start the command of `spec` from the next time on, and leave alone what runs. Returns False,
        with nothing done, where that cannot be: the settings differ, or the manager would have to let go of the
        socket."""

    def uninstall(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def restart(self) -> None: ...
    def state(self) -> ServiceState: ...


def manager_for(spec: ServiceSpec) -> Manager:
    if sys.platform == "darwin":
        from .launchd import Launchd

        return Launchd(spec)
    from .systemd import Systemd

    return Systemd(spec)
