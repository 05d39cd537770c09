"""`mlxd serve --stdio --join`: an app's way to the daemon that all apps share, of the newest version that may be.

1. None runs: the one that this mlxd would be is started.
2. An older one runs, and nobody needs it at the moment: it makes room, and this one is started.
3. Any other is joined as it is: older apps speak to newer daemons, and a daemon that is in use is left alone.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from .common import program

if TYPE_CHECKING:
    from mlxd_client.types import HelloResult

__all__ = ["reached"]

# How long a daemon that agreed to end, with nothing to do, may take for it.
_END_S = 15.0


def reached(path: str | None) -> socket.socket:
    """A connection to the daemon that is to be used. Raises ConnectFailed."""
    from mlxd import __version__
    from mlxd.versions import is_older
    from mlxd_client.connect import reach

    running = _hello(path)
    if running is not None and is_older(running.server.version, than=__version__):
        _make_room(path, running.server.pid)
    return reach(path, [*program(), "serve"])


def _hello(path: str | None) -> HelloResult | None:
    """Who listens there; None where nobody does, or not in a way that could be asked to make room."""
    from mlxd_client import Client
    from mlxd_client.errors import MlxdError

    try:
        with Client(path, name="mlxd-join", start=False, reconnect=False, timeout_s=10.0) as client:
            return client.connect()
    except MlxdError:
        return None


def _make_room(path: str | None, pid: int) -> None:
    """Ask it to end if it is idle, and wait until it has. Where it stays, whatever the reason, it is joined."""
    from mlxd_client import Client
    from mlxd_client.errors import ConnectionLost, MlxdError, ShuttingDown

    from .daemon import runs

    try:
        with Client(path, name="mlxd-join", start=False, reconnect=False, timeout_s=10.0) as client:
            client.shutdown(if_idle=True)
    except (ConnectionLost, ShuttingDown):
        pass  # it ends already: another app was quicker
    except MlxdError:
        return  # in use, run by a service manager, or too old to know the question
    deadline = time.monotonic() + _END_S
    while runs(pid) and time.monotonic() < deadline:  # it is no child of ours
        time.sleep(0.02)
