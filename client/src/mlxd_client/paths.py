"""Where the daemon's folder and socket are: one answer for the daemon and every client, computed from the environment.

Functions of the mapping, platform and uid that they are given; nothing here touches the disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from .errors import SocketPathTooLong

__all__ = ["check_socket_path", "home", "socket_limit", "socket_path"]


def socket_limit(platform: str = sys.platform) -> int:
    """How many bytes a Unix socket's path may take: the size of `sun_path` (unix(7), sys/un.h) less the final NUL."""
    return 107 if platform.startswith("linux") else 103


def home(env: Mapping[str, str] | None = None, platform: str = sys.platform) -> str:
    """The folder that holds everything the daemon keeps, as an absolute path; it need not exist yet.

    `MLXD_HOME`, else `~/Library/Application Support/mlxd` on macOS, else `$XDG_DATA_HOME/mlxd`, else
    `~/.local/share/mlxd`. Empty variables count as unset; so does a relative XDG_DATA_HOME, as its specification asks.
    """
    env = os.environ if env is None else env
    user = env.get("HOME") or os.path.expanduser("~")
    chosen = env.get("MLXD_HOME")
    if chosen:
        return os.path.abspath(user + chosen[1:] if chosen == "~" or chosen.startswith("~/") else chosen)
    if platform == "darwin":
        return os.path.join(user, "Library", "Application Support", "mlxd")
    data = env.get("XDG_DATA_HOME")
    return os.path.join(data if data and os.path.isabs(data) else os.path.join(user, ".local", "share"), "mlxd")


def socket_path(env: Mapping[str, str] | None = None, platform: str = sys.platform, uid: int | None = None) -> str:
    """The daemon's socket: `MLXD_SOCKET`, else `mlxd.sock` in the home folder.

    Where the home folder's path leaves no room for a socket, it is `/tmp/mlxd-<uid>/<hash of the home>.sock`: the same
    for every process of the user, whatever its TMPDIR or XDG_RUNTIME_DIR (cron and ssh sessions often lack them). The
    daemon makes that folder 0700 and refuses one that is not the user's own; clients check who listens.

    Raises:
        SocketPathTooLong: `MLXD_SOCKET` itself does not fit; what was asked for by name is not moved elsewhere.
    """
    env = os.environ if env is None else env
    chosen = env.get("MLXD_SOCKET")
    if chosen:
        return check_socket_path(os.path.abspath(chosen), platform)
    folder = home(env, platform)
    path = os.path.join(folder, "mlxd.sock")
    if len(os.fsencode(path)) <= socket_limit(platform):
        return path
    import hashlib  # costs milliseconds, and only long paths need it

    short = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return f"/tmp/mlxd-{os.getuid() if uid is None else uid}/{short}.sock"


def check_socket_path(path: str, platform: str = sys.platform) -> str:
    """`path` itself, if a socket can have it. Raises SocketPathTooLong."""
    size, limit = len(os.fsencode(path)), socket_limit(platform)
    if size > limit:
        raise SocketPathTooLong(f"the socket's path takes {size} bytes, {limit} is the limit here: {path}")
    return path
