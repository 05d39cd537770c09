"""A listening socket that a service manager made before this process began: launchd's, or systemd's.

systemd hands descriptors over from number 3 on and says so in the environment (sd_listen_fds(3)); launchd is asked by
name (launch_activate_socket, launch.h). Both keep the socket for themselves as well: who connects while no daemon runs
waits in its queue, and is served by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import MutableMapping

from .listen import SocketPathError

__all__ = ["LAUNCHD_SOCKET", "handed_over"]

# The key under `Sockets` in the property list.
LAUNCHD_SOCKET = "Listeners"
_FIRST_FD = 3


def handed_over(env: MutableMapping[str, str] | None = None) -> socket.socket | None:
    """The socket that was handed over, or None where this process listens for itself.

    The variables that told of it are removed, so that no child takes them for its own.

    Raises:
        SocketPathError: something else was handed over, or more than one socket.
    """
    env = os.environ if env is None else env
    found = _from_launchd() if sys.platform == "darwin" else _from_systemd(env)
    if not found:
        return None
    for number in found:
        os.set_inheritable(number, False)
    if len(found) > 1:
        raise SocketPathError(f"{len(found)} sockets were handed over; one is needed")
    try:
        return socket.socket(fileno=found[0])
    except OSError as error:
        raise SocketPathError(f"what was handed over is no socket: {error.strerror}") from None


def _from_systemd(env: MutableMapping[str, str]) -> list[int]:
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "")
    env.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []  # not for this process: a variable that came down from a parent
    return list(range(_FIRST_FD, _FIRST_FD + min(int(count), 1024)))


def _from_launchd() -> list[int]:
    """Asks launchd. ESRCH: this process is not its child; ENOENT: its job has no such socket. EALREADY would be a bug
    here: a process may ask once."""
    try:
        libc = ctypes.CDLL(None)
        activate = libc.launch_activate_socket
    except (OSError, AttributeError):  # before macOS 10.10
        return []
    activate.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_int)), ctypes.POINTER(ctypes.c_size_t)]
    activate.restype = ctypes.c_int
    descriptors, count = ctypes.POINTER(ctypes.c_int)(), ctypes.c_size_t()
    failed = activate(LAUNCHD_SOCKET.encode(), ctypes.byref(descriptors), ctypes.byref(count))
    if failed in (errno.ESRCH, errno.ENOENT):
        return []
    if failed:
        raise SocketPathError(f"launchd did not hand over the socket {LAUNCHD_SOCKET}: {os.strerror(failed)}")
    numbers = [descriptors[index] for index in range(count.value)]
    libc.free(descriptors)
    return numbers
