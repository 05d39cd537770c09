"""The hub's process: an HTTP/1.1 server on loopback, a thread for each connection, that errs where it is told to.

    python -m support.hub_server        says "PORT SECRET" on stdout; ends when its stdin does

`POST /SECRET` is how the test speaks to it; everything else is what a client of the hub sees. An answer is made as a
whole (status, headers, which bytes), then faults change it, then it is sent.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from typing import BinaryIO

import msgspec

from support import hub_answers, hub_control
from support.hub_send import Gone
from support.hub_state import State
from support.hub_wire import Call, Reply

MAX_LINE_BYTES = 65_536
MAX_HEADERS = 100


class Head(msgspec.Struct):
    """A request's line and headers, names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


def read_head(reader: BinaryIO) -> Head | None:
    """The next request of a connection; None at its end, or where it is not HTTP."""
    line = reader.readline(MAX_LINE_BYTES)
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADERS):
        line = reader.readline(MAX_LINE_BYTES)
        if line in (b"\r\n", b"\n"):
            return Head(words[0], words[1], headers)
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon:
            return None
        headers[name.strip().lower()] = value.strip()
    return None


class Server:
    def __init__(self) -> None:
        self.state = State()
        self.secret = secrets.token_hex(16)
        self.listeners = listeners()
        self.port: int = self.listeners[0].getsockname()[1]
        self.control = hub_control.Control(self.state)
        self.hub = hub_answers.Answers(self.state, self.port)

    def start(self) -> None:
        for listener in self.listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """All requests of one connection, in order."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, sock.makefile("rb") as reader:
            try:
                while (head := read_head(reader)) is not None:
                    body = reader.read(int(head.headers.get("content-length", "0")))
                    if head.target == f"/{self.secret}":
                        self._command(sock, body)
                    elif not self.hub.answer(sock, head.method, head.target, head.headers):
                        return
            except (Gone, OSError, ValueError):
                return

    def _command(self, sock: socket.socket, body: bytes) -> None:
        try:
            reply = self.control.call(msgspec.msgpack.decode(body, type=Call))
        except Exception as error:  # the test's mistake is the test's to read
            reply = Reply(error=f"{type(error).__name__}: {error}")
        data = msgspec.msgpack.encode(reply)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


def listeners() -> list[socket.socket]:
    """One on 127.0.0.1 and, where the machine has it, one on ::1 with the same port: `localhost` may be either."""
    first = socket.create_server(("127.0.0.1", 0), backlog=512)
    try:
        port = first.getsockname()[1]
        return [first, socket.create_server(("::1", port), family=socket.AF_INET6, backlog=512)]
    except OSError:
        return [first]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the tests, who then let go of stdin
    server = Server()
    server.start()
    print(server.port, server.secret, flush=True)
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)  # threads that hold an answer have nothing to finish


if __name__ == "__main__":
    main()
