"""A daemon, or the way to one, on standard input and output: for apps that start mlxd and talk through pipes.

The bytes are those of the socket, unchanged: msgpack frames or JSON lines. Threads carry them, since what an app gives
its child may be a pipe, a file or a terminal, and an event loop cannot wait for all of these.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable

__all__ = ["Bridge", "join"]

_CHUNK = 256 * 1024


class Bridge:
    """Carries bytes between standard input and output and a socket.

    From then on the process's own descriptors 0 and 1 lead elsewhere, so that nothing that is printed, and no child,
    can get in between.

    Args:
        sock: blocking; the bridge closes it.
        on_end: called once, on a thread, when all that the app asked before it closed its end is answered, or when it
            is gone.
    """

    def __init__(self, sock: socket.socket, on_end: Callable[[], object]) -> None:
        self._sock = sock
        self._on_end = on_end
        self._once = threading.Lock()
        self._in, self._out = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._writer = threading.Thread(target=self._carry_out, name="stdout", daemon=True)
        self._reader = threading.Thread(target=self._carry_in, name="stdin", daemon=True)
        self._writer.start()
        self._reader.start()

    def finish(self, timeout_s: float) -> None:
        """Wait until everything that was answered is written out, or the app takes nothing any more."""
        self._writer.join(timeout_s)

    def _carry_in(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(self._in, _CHUNK):
                self._sock.sendall(chunk)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)  # what was asked is answered yet
        if self._listener_gone():
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._ended()

    def _listener_gone(self) -> bool:
        """Wait until nobody can read the answers any more. Where they are all written first, the wait has no end, and
        needs none."""
        watch = select.poll()
        watch.register(self._out, 0)
        return bool(watch.poll())

    def _carry_out(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := self._sock.recv(_CHUNK):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(self._out, rest) :]
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            os.close(self._out)  # the app sees the end of it
        self._ended()

    def _ended(self) -> None:
        if self._once.acquire(blocking=False):
            self._on_end()


def join(sock: socket.socket) -> None:
    """Carry bytes to and from a daemon that runs already, until either side ends."""
    over = threading.Event()
    sock.setblocking(True)
    bridge = Bridge(sock, over.set)
    over.wait()
    bridge.finish(60.0)  # the answers to what was asked last
