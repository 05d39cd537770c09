"""Sends one answer on one connection, as fast as it goes or as badly as it was told to."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from support.hub_state import Rate, State
from support.hub_wire import Fault, Request

SEND_BYTES = 256 * 1024
LOOK_S = 0.02  # how often a held answer looks whether its client is still there
PACED_S = 0.02  # how long one piece takes where there is a rate


class Gone(Exception):
    """This connection is over."""


class Body(Protocol):
    @property
    def size(self) -> int: ...

    def pieces(self, start: int, stop: int) -> Any: ...


class Answer(msgspec.Struct):
    """What shall be sent: bytes `start` to `stop` of the body, and the headers besides those that follow from them."""

    status: int
    headers: dict[str, str]
    body: Any
    start: int = 0
    stop: int = 0
    chunked: bool = False


class Sender:
    """One answer's way to the client. `points` are the places in the body where something happens."""

    def __init__(self, state: State, sock: socket.socket, record: Request) -> None:
        self.state = state
        self.sock = sock
        self.record = record
        self.pace: Rate | None = None
        self.flips: dict[int, int] = {}

    def head(self, answer: Answer) -> None:
        headers = dict(answer.headers)
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers.setdefault("Content-Length", str(answer.stop - answer.start))
        try:
            phrase = HTTPStatus(answer.status).phrase
        except ValueError:
            phrase = "Strange"
        lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self.state.note(self.record, status=answer.status)
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())

    def body(self, answer: Answer, faults: list[Fault]) -> None:
        points = sorted(((place(fault, answer), fault) for fault in faults), key=lambda point: point[0])
        self.flips = {at: fault.by for at, fault in points if fault.kind == "flip"}
        position = answer.start
        for at, fault in points:
            self._send(answer, position, at)
            position = at
            self.act(fault)
        self._send(answer, position, answer.stop)
        if answer.chunked:
            self.sock.sendall(b"0\r\n\r\n")

    def _send(self, answer: Answer, start: int, stop: int) -> None:
        for piece in answer.body.pieces(start, stop):
            sent = 0
            while sent < len(piece):
                self.wait_while(lambda: self.state.paused)
                part = piece[sent : sent + self._piece_bytes()]
                self._wait_for_pace(len(part))
                sent += len(part)
                data = self._flipped(start, part)
                start += len(part)
                if answer.chunked:
                    data = b"%x\r\n%b\r\n" % (len(part), bytes(data))
                self.sock.sendall(data)
                self.state.advance(self.record, len(part))

    def _flipped(self, position: int, part: memoryview) -> memoryview | bytes:
        inside = [at for at in self.flips if position <= at < position + len(part)]
        if not inside:
            return part
        changed = bytearray(part)
        for at in inside:
            changed[at - position] ^= self.flips[at]
        return bytes(changed)

    def _rates(self) -> list[Rate]:
        return [rate for rate in (self.pace, self.state.rate) if rate is not None and rate.bytes_per_s]

    def _piece_bytes(self) -> int:
        slowest = min((rate.bytes_per_s for rate in self._rates()), default=0.0)
        return min(SEND_BYTES, max(1, int(slowest * PACED_S))) if slowest else SEND_BYTES

    def _wait_for_pace(self, count: int) -> None:
        wait_s = max((rate.reserve(count) for rate in self._rates()), default=0.0)
        until = time.monotonic() + wait_s
        if wait_s:
            self.wait_while(lambda: time.monotonic() < until, until)

    # --- misbehaviour ---

    def act(self, fault: Fault) -> None:
        if fault.kind == "hold":
            self._hold(fault)
        elif fault.kind == "stall":
            self.wait_while(lambda: True)
        elif fault.kind in ("drop", "short"):
            raise Gone("cut")
        elif fault.kind == "reset":
            self._reset()
        elif fault.kind == "trickle":
            self.pace = Rate()
            self.pace.set(fault.bytes_per_s)

    def _hold(self, fault: Fault) -> None:
        with self.state.lock:
            releases = self.state.releases
        self.state.note(self.record, held=True)
        try:
            self.wait_while(lambda: self.state.in_force(fault) and self.state.releases == releases)
        finally:
            self.state.note(self.record, held=False)

    def _reset(self) -> None:
        """What was sent arrives; then the connection breaks instead of ending."""
        self.wait_while(lambda: unsent(self.sock) > 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone("cut")

    def wait_while(self, holds: Callable[[], bool], until: float | None = None) -> None:
        """Wait as long as `holds()`, which ends at `until` at the latest; raises Gone once the client went away."""
        while holds():
            if departed(self.sock):
                raise Gone("client")
            with self.state.changed:
                self.state.changed.wait(LOOK_S if until is None else max(0.0, min(LOOK_S, until - time.monotonic())))


def place(fault: Fault, answer: Answer) -> int:
    """Where in the body a fault happens, as an offset in the whole file."""
    if fault.kind == "short":
        return max(answer.start, answer.stop - fault.by)
    return fault.at if fault.at is not None else answer.start + (fault.after or 0)


def departed(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def unsent(sock: socket.socket) -> int:
    """Bytes that the other side's kernel has not confirmed."""
    if sys.platform == "darwin":
        return sock.getsockopt(socket.SOL_SOCKET, 0x1024)  # SO_NWRITE
    import fcntl

    answer = fcntl.ioctl(sock, 0x5411, struct.pack("i", 0))  # SIOCOUTQ
    return int(struct.unpack("i", answer)[0])
