"""Creating the listening socket safely, and knowing who is at the other end.

The law: one daemon per home and per socket, held by locks that die with their process. A live socket is never stolen, a
stale one never blocks. The home folder is 0700 and the socket 0600 before any peer can reach them. Runs once, before
the event loop; it may block for some milliseconds.

    ListenError            a sentence that tells the user what to do
    ├── HomeError          the folder cannot be used
    ├── SocketPathError    the socket's path cannot be used
    ├── Removed            a daemon's folder is gone under it, and with it the lock that made it the only one
    └── AlreadyRunning     another daemon holds this home or this socket; `pid` if known
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import socket
import stat
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "AlreadyRunning",
    "HomeError",
    "ListenError",
    "Listener",
    "Peer",
    "Removed",
    "SocketPathError",
    "adopt",
    "first_byte",
    "listen",
    "lock_of",
    "peer_gone",
    "peer_of",
    "prepare_home",
]

_DARWIN = sys.platform == "darwin"
# sockaddr_un.sun_path holds 104 bytes on macOS and 108 on Linux, the last of them zero.
_MAX_PATH_BYTES = 103 if _DARWIN else 107
_LOCK_NAME, _SOCKET_NAME = "mlxd.lock", "mlxd.sock"
_BACKLOG = 1024


class ListenError(Exception):
    """Why the daemon cannot listen, as a sentence for people."""


class HomeError(ListenError):
    """The folder is not ours, no folder, or cannot be written."""


class SocketPathError(ListenError):
    """The socket's path is too long, taken by something else, or lies where others may write."""


class Removed(ListenError):
    """The lock beside the socket is gone, or another's: the next daemon may be there already."""


class AlreadyRunning(ListenError):
    """Another daemon holds this home or socket.

    Attributes:
        pid: its process id, where it could be found out.
    """

    def __init__(self, where: Path, pid: int | None) -> None:
        super().__init__(f"mlxd is already running for {where}" + (f" (pid {pid})" if pid else ""))
        self.pid = pid


# --- folders and locks --------------------------------------------------------------------------------------------


def prepare_home(home: Path) -> None:
    """Make sure that `home` is a folder of this user with mode 0700; creates it and its parents, and mends the mode.

    Raises: HomeError.
    """
    try:
        _make_parents(home.parent)
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise HomeError(f"{home} is not a folder; set MLXD_HOME to one that can be used") from None
    except OSError as error:
        raise HomeError(f"the folder {home} cannot be used: {error.strerror}; set MLXD_HOME to another one") from None
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid():
            raise HomeError(f"{home} belongs to user {found.st_uid}, not to you ({os.geteuid()})")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(folder, 0o700)
    except OSError as error:
        raise HomeError(f"the mode of {home} cannot be set to 0700: {error.strerror}") from None
    finally:
        os.close(folder)


def _make_parents(folder: Path) -> None:
    """Folders that are missing on the way, private ones: who may write there could put another home in its place."""
    mask = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(mask)


def _check_socket_folder(folder: Path) -> None:
    """A socket outside of home: the folder must be one where nobody else can put a socket in our place.

    It is created where only it is missing, since the place for homes with too long a path is in the system's /tmp.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = os.stat(folder)
    except OSError as error:
        raise SocketPathError(f"the socket's folder {folder} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise SocketPathError(f"the socket's folder {folder} is not a folder")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SocketPathError(f"the socket's folder {folder} must belong to you and be writable by nobody else")


def _lock(path: Path, guarded: Path) -> int:
    """Take the lock file for as long as this process lives. Returns its descriptor, which must stay open.

    Raises: AlreadyRunning, HomeError.
    """
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HomeError(f"the lock file {path} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(lock)
            os.close(lock)
            raise AlreadyRunning(guarded, pid) from None
        except OSError as error:
            os.close(lock)
            raise HomeError(f"the lock file {path} cannot be locked: {error.strerror}") from None
        if _same_file(lock, path):
            break
        os.close(lock)  # somebody removed the file meanwhile: a lock on it would keep nobody out
    try:
        _sign(lock)
    except OSError as error:
        os.close(lock)
        raise HomeError(f"the lock file {path} cannot be written: {error.strerror}") from None
    return lock


def _sign(lock: int) -> None:
    """Write down who holds it. Raises OSError."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def lock_of(path: Path) -> Path:
    """The lock of a socket, for daemons of whichever homes. That of a home's own socket is the home's."""
    return path.with_name(_LOCK_NAME if path.name == _SOCKET_NAME else f"{path.name}.lock")


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        named = os.lstat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)


def _holder(lock: int) -> int | None:
    """The pid in a lock file that another process holds. That process may be about to write it: wait up to 0.2 s."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError):
            pid = int(os.pread(lock, 32, 0))
            os.kill(pid, 0)
            return pid
        time.sleep(0.01)
    return None


# --- the socket ---------------------------------------------------------------------------------------------------


class Listener:
    """A listening socket together with the locks that make it ours.

    Attributes:
        sock: non-blocking and listening.
        path: where it is; None where it was handed over by a service manager, which then owns the path.
        locks: their descriptors.

    Args:
        mine: whether socket and locks are this process's to remove. They may be shared with another daemon, from which
            this one takes over, or which takes over from this one.
    """

    def __init__(self, sock: socket.socket, path: Path | None, locks: list[int], *, mine: bool = True) -> None:
        self.sock = sock
        self.path = path
        self.locks = locks
        self._mine = mine
        self._inode = _inode(path) if path is not None else None

    def claim(self) -> None:
        """From now on it is this process's, as far as others can tell."""
        self._mine = True
        for lock in self.locks:
            with contextlib.suppress(OSError):  # a full disk: the number is for people, the lock itself is held
                _sign(lock)

    def renew(self) -> bool:
        """Listen anew where the socket's file was removed: nobody else could, while the lock is held. Returns whether
        that was so; `sock` is another one then.

        Raises: Removed or AlreadyRunning, where nobody could find this daemon any more; SocketPathError.
        """
        if self.path is None or not self._mine or self._inode is None or _inode(self.path) == self._inode:
            return False
        if not any(_same_file(lock, lock_of(self.path)) for lock in self.locks):
            raise Removed(f"{self.path} and the lock beside it were removed")
        _clear(self.path)
        sock = _bind(self.path, _aside(self.path), _BACKLOG)
        self.sock.close()
        self.sock, self._inode = sock, _inode(self.path)
        return True

    def give_away(self) -> None:
        """It is another daemon's. Socket and locks stay open until this process closes them, too: should that one die,
        nobody starts a third before this one has ended, and who connects meanwhile waits in the socket."""
        self._mine = False

    def hide(self) -> None:
        """Remove the socket's file if it is still this one: nobody else can connect. Idempotent."""
        if self._mine and self.path is not None and self._inode is not None and _inode(self.path) == self._inode:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._inode = None

    def close(self) -> None:
        """Close the socket, remove its file if it is still this one, and let go of the locks. Idempotent."""
        self.sock.close()
        self.hide()
        for lock in self.locks:
            if self._mine:
                with contextlib.suppress(OSError):
                    os.ftruncate(lock, 0)
            os.close(lock)
        self.locks = []


def listen(home: Path, path: Path | None = None, *, backlog: int = _BACKLOG) -> Listener:
    """Lock `home` and listen on `path` (default: `mlxd.sock` in home).

    Raises: AlreadyRunning, HomeError, SocketPathError.
    """
    path = path if path is not None else home / _SOCKET_NAME
    aside = _aside(path)
    _check_length(path, aside)
    prepare_home(home)
    locks = [_lock(home / _LOCK_NAME, home)]
    try:
        if path.parent.resolve() != home.resolve():
            _check_socket_folder(path.parent)
        beside = lock_of(path)
        if not _same_file(locks[0], beside):
            locks.append(_lock(beside, path))
        _clear(path)
        return Listener(_bind(path, aside, backlog), path, locks)
    except BaseException:
        for lock in locks:
            os.close(lock)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def adopt(sock: socket.socket, home: Path) -> Listener:
    """Take over a socket that a service manager made and listens on; only `home` is locked.

    Raises: AlreadyRunning, HomeError, SocketPathError (where it is no listening Unix stream socket).
    """
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise SocketPathError("the socket handed over is no listening Unix stream socket")
    prepare_home(home)
    lock = _lock(home / _LOCK_NAME, home)
    sock.setblocking(False)
    return Listener(sock, None, [lock])


def _check_length(path: Path, aside: Path) -> None:
    size = max(len(os.fsencode(path)), len(os.fsencode(aside)))
    if size > _MAX_PATH_BYTES:
        spare = _MAX_PATH_BYTES - (size - len(os.fsencode(path)))
        raise SocketPathError(
            f"the socket's path {path} is too long: at most {spare} bytes work here; set MLXD_SOCKET or MLXD_HOME"
        )


def _clear(path: Path) -> None:
    """Under the lock: make sure that nothing alive is at `path`, and remove what earlier daemons left beside it."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(found.st_mode):
            raise SocketPathError(f"{path} exists and is no socket; remove it or set MLXD_SOCKET")
        _refuse_if_alive(path)
    left = re.compile(re.escape(f".{path.name}.") + r"\d+")
    for entry in os.scandir(path.parent):
        if left.fullmatch(entry.name) and stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _refuse_if_alive(path: Path) -> None:
    """Whoever answers on the socket without our lock (a service manager, an older build) keeps it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:  # its backlog is full: slow, but alive
            raise AlreadyRunning(path, None) from None
        except OSError as error:
            raise SocketPathError(f"the socket {path} cannot be probed: {error.strerror}") from None
        raise AlreadyRunning(path, peer_of(probe).pid)


def _bind(path: Path, aside: Path, backlog: int) -> socket.socket:
    """Bind aside, restrict, listen, then rename over: nobody ever sees a socket that is open to others or deaf."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        mask = os.umask(0o177)
        try:
            sock.bind(os.fspath(aside))
        finally:
            os.umask(mask)
        os.chmod(aside, 0o600)
        sock.listen(backlog)
        os.rename(aside, path)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise SocketPathError(f"cannot listen on {path}: {error.strerror}") from None
    return sock


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# --- the peer -----------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """Who connected, as the kernel recorded it when they did."""

    uid: int
    pid: int | None


def peer_of(sock: socket.socket) -> Peer:
    """Credentials of the process at the other end: SO_PEERCRED (unix(7)), LOCAL_PEERCRED and LOCAL_PEERPID (unix(4)).

    Raises: OSError where the kernel has none, as for a peer that is gone already.
    """
    if _DARWIN:
        sol_local, local_peercred, local_peerpid = 0, 0x001, 0x002
        version, uid = struct.unpack_from("=II", sock.getsockopt(sol_local, local_peercred, 76))  # struct xucred
        if version != 0:
            raise OSError(errno.EPROTO, "unknown version of the peer's credentials")
        pid = sock.getsockopt(sol_local, local_peerpid)
        return Peer(uid, pid or None)
    pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, pid or None)


def first_byte(descriptor: int) -> bytes:
    """What a connection begins with, left where it is; empty where nothing has come yet."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        try:
            return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return b""


def peer_gone(sock: socket.socket) -> bool:
    """After end-of-file: whether the peer closed for good, or only finished writing and still reads."""
    if _DARWIN:  # its poll reports a hang-up for both, but only a closed peer has no name any more
        try:
            sock.getpeername()
        except OSError:
            return True
        return False
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(happened & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, happened in poll.poll(0))
