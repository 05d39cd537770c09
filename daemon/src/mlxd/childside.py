"""What every child process does besides its work: dies with its parent, keeps stdout clean, talks frames, beats.

Imports nothing heavy: this runs before the child's heavy imports do.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from mlxd_client.codec import Decoder, Encoding, Invalid, encode
from mlxd_client.errors import ProtocolError, RpcError

from .childwire import HEARTBEAT_S, MAX_DEPTH, MAX_FRAME_BYTES, Heartbeat

PR_SET_PDEATHSIG = 1
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_RECEIVE_BYTES = 262_144


class PipeClosed(Exception):
    """The parent's end is gone, or what it sends is no stream of frames any more; the child has nobody to work for."""


class Stopped(BaseException):
    """SIGTERM came, or `stop`: unwind from wherever the child is. No Exception, so that no handler swallows it."""


def settle(fd: int) -> socket.socket:
    """The first thing a child does: tie its life to its parent's and take over the pipe.

    Args:
        fd: the inherited end of the socketpair.

    Raises:
        PipeClosed: the parent died already.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C at the terminal is the parent's to interpret
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Libraries print. What they print is log text, and there may be no one who reads stdout.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in SECRETS:
        os.environ.pop(name, None)
    os.set_inheritable(fd, False)  # compilers that MLX starts must not keep the pipe open
    return socket.socket(fileno=fd)


def die_with_parent(parent: int | None = None) -> None:
    """On Linux, have the kernel end this process when its parent dies; elsewhere the pipe's end tells.

    Args:
        parent: its pid, where that is known; one that has no pipe could not tell otherwise that it is gone already.

    Raises:
        PipeClosed: the parent died before the kernel was asked.
    """
    parent = os.getppid() if parent is None else parent
    if sys.platform != "linux":
        if os.getppid() != parent:
            raise PipeClosed("the parent died while this child started")
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise PipeClosed("the parent died while this child started")


def _on_sigterm(_number: int, _frame: Any) -> None:
    raise Stopped


class Pipe:
    """Frames to and from the parent over a blocking socket.

    Outgoing frames collect until `flush`, so that one turn of the working loop costs one system call.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder = Decoder(Encoding.MSGPACK, max_bytes=MAX_FRAME_BYTES, max_depth=MAX_DEPTH)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._out = bytearray()

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Messages that arrived, waiting at most `timeout_s` seconds for the first. Raises PipeClosed."""
        if not self._poll.poll(timeout_s * 1000):
            return []
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise PipeClosed(f"the pipe broke: {error}") from None
        if not data:
            raise PipeClosed("the parent closed the pipe")
        self._decoder.feed(data)
        try:
            messages = list(self._decoder)
        except ProtocolError as error:
            raise PipeClosed(f"the parent sent no frame: {error}") from None
        for message in messages:
            if isinstance(message, Invalid):
                raise PipeClosed(f"the parent sent no message: {message.reason}")
        return messages  # type: ignore[return-value]

    def notify(self, method: str, params: Any) -> None:
        self._out += encode({"jsonrpc": "2.0", "method": method, "params": params})

    def reply(self, request_id: int, result: Any) -> None:
        self._out += encode({"jsonrpc": "2.0", "id": request_id, "result": result})

    def fail(self, request_id: int, error: RpcError) -> None:
        self._out += encode({"jsonrpc": "2.0", "id": request_id, "error": error.to_wire()})

    def flush(self) -> None:
        """Send what collected. Blocks while the parent does not read. Raises PipeClosed."""
        if not self._out:
            return
        try:
            self._socket.sendall(self._out)
        except OSError as error:
            raise PipeClosed(f"the pipe broke: {error}") from None
        self._out = bytearray()


class Pulse:
    """Sends heartbeats when they are due; `beat` belongs into the loop that does the work, nowhere else."""

    def __init__(self, pipe: Pipe, vitals: Callable[[], Heartbeat], interval_s: float = 0.8 * HEARTBEAT_S) -> None:
        self._pipe = pipe
        self._vitals = vitals
        self._interval_s = interval_s
        self._due = time.monotonic()

    @property
    def rest_s(self) -> float:
        """Seconds until the next heartbeat is due; 0 where it is overdue."""
        return max(0.0, self._due - time.monotonic())

    def beat(self) -> bool:
        """Queue a heartbeat if one is due. Returns whether it was."""
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + self._interval_s
        self._pipe.notify("heartbeat", self._vitals())
        return True
