"""A scripted daemon: a real Unix socket and the real codec, replies as the test programs them. Runs in threads.

Nothing here waits by the clock: a reply that shall be late waits for an event of the test's.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from mlxd_client import types
from mlxd_client.codec import Decoder, Encoding, Invalid, encode
from mlxd_client.errors import MethodNotFound, ProtocolError, RpcError, ShuttingDown

# The most that any wait in a test takes before it is a failure.
PATIENCE_S = 60.0

HELLO = types.HelloResult(
    protocol=1,
    server=types.ServerInfo(name="mlxd", version="0.scripted", pid=1),
    epoch="e1",
    limits=types.Limits(
        frame_bytes=types.MAX_FRAME_BYTES,
        depth=64,
        requests_in_flight=256,
        queue=64,
        subscriber_events=1024,
        subscriber_bytes=4_194_304,
    ),
    capabilities=[],
)


class Connection:
    """One accepted connection: what came on it, and ways to answer, well or badly."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self.received: list[dict[str, Any]] = []
        self.chunks: list[int] = []  # how many messages each read brought
        self.ended = threading.Event()
        self.encoding = Encoding.MSGPACK
        self._cancelled: dict[Any, threading.Event] = {}
        self._sock = sock
        self._lock = threading.Lock()
        self._news = threading.Condition()

    def send(self, *messages: Any) -> None:
        """All of them in one write."""
        self.raw(b"".join(encode(message, self.encoding) for message in messages))

    def raw(self, data: bytes) -> None:
        with self._lock:
            try:
                self._sock.sendall(data)
            except OSError:
                self.ended.set()

    def reply(self, id: Any, result: Any = None) -> None:
        self.send({"jsonrpc": "2.0", "id": id, "result": {} if result is None else result})

    def fail(self, id: Any, error: RpcError) -> None:
        self.send({"jsonrpc": "2.0", "id": id, "error": error.to_wire()})

    def stream(self, id: Any, seq: int, **fields: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": "stream", "params": {"id": id, "seq": seq, **fields}})

    def event(self, rev: int, name: str, *, subscription: int = 1, **fields: Any) -> None:
        params = types.Event(subscription=subscription, rev=rev, name=name, at=1.0, **fields)
        self.send({"jsonrpc": "2.0", "method": "event", "params": params})

    def drop(self) -> None:
        """End the connection as a dead daemon does."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def cancel_of(self, id: Any) -> threading.Event:
        """Set when the client cancels request `id`."""
        with self._news:
            return self._cancelled.setdefault(id, threading.Event())

    def wait_for(self, method: str, count: int = 1) -> list[dict[str, Any]]:
        """The requests for `method`, once there are `count`."""
        with self._news:
            found = self._news.wait_for(lambda: len(self.requests(method)) >= count, PATIENCE_S)
            assert found, f"no {method} came: {self.received}"
            return self.requests(method)

    def requests(self, method: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message.get("method") == method]

    def took(self, message: dict[str, Any]) -> None:
        with self._news:
            self.received.append(message)
            if message.get("method") == "cancel":
                self._cancelled.setdefault(message["params"]["id"], threading.Event()).set()
            self._news.notify_all()


NOTHING = object()
Reply = Callable[[Connection, dict[str, Any]], Any]


class ScriptedDaemon:
    """Listens at `path`. `on(method, reply)` programs it; `reply(connection, request)` runs in the connection's thread.

    A reply that returns something answers with it; one that raises RpcError answers with that; one that returns
    NOTHING has answered by itself, or never will.
    """

    def __init__(self, path: str, hello: types.HelloResult = HELLO) -> None:
        self.path = path
        self.hello = hello
        self.connections: list[Connection] = []
        self.replies: dict[str, Reply] = {
            "hello": lambda _connection, _request: self.hello,
            "ping": lambda _connection, _request: {},
            "cancel": lambda _connection, _request: {"cancelled": True},
        }
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def on(self, method: str, reply: Reply | Any) -> None:
        self.replies[method] = reply if callable(reply) else lambda _connection, _request: reply

    def start(self) -> ScriptedDaemon:
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self.path)
        listener.listen(128)
        self._run(lambda: self._accept(listener))
        return self

    def stop(self) -> None:
        """End as a killed daemon does, but for the socket's file, which goes too."""
        listener, self._listener = self._listener, None
        if listener is not None:
            os.unlink(self.path)
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in self.connections:
            connection.drop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self._threads.clear()

    def __enter__(self) -> ScriptedDaemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def connection(self, number: int = 0) -> Connection:
        """The connection of that number, counted from 0, once it was accepted."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.connections) > number, PATIENCE_S), "nobody connected"
            return self.connections[number]

    def asked(self, method: str) -> int:
        """How many requests for `method` came, on all connections together."""
        return sum(len(connection.requests(method)) for connection in self.connections)

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._news:
                connection = Connection(sock, len(self.connections))
                self.connections.append(connection)
                self._news.notify_all()
            self._run(lambda s=sock, c=connection: self._serve(s, c))  # type: ignore[misc]

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        decoder = Decoder()
        with sock:
            while True:
                try:
                    data = sock.recv(65_536)
                except OSError:
                    data = b""
                if not data:
                    connection.ended.set()
                    return
                decoder.feed(data)
                try:
                    messages = list(decoder)
                except ProtocolError:
                    return
                connection.chunks.append(len(messages))
                connection.encoding = decoder.encoding or Encoding.MSGPACK
                for message in messages:
                    assert not isinstance(message, Invalid)
                    connection.took(message)
                    self._answer(connection, message)

    def _answer(self, connection: Connection, request: dict[str, Any]) -> None:
        reply = self.replies.get(request["method"])
        try:
            if reply is None:
                raise MethodNotFound(f"no method {request['method']}")
            result = reply(connection, request)
        except RpcError as error:
            connection.fail(request["id"], error)
            return
        if result is not NOTHING:
            connection.reply(request["id"], msgspec.to_builtins(result))


def beside(reply: Callable[[Connection, dict[str, Any]], Any]) -> Callable[[Connection, dict[str, Any]], Any]:
    """Answers in a thread of its own, so that the connection is read meanwhile."""

    def start(connection: Connection, request: dict[str, Any]) -> Any:
        def work() -> None:
            result = reply(connection, request)
            if result is not NOTHING:
                connection.reply(request["id"], result)

        threading.Thread(target=work, daemon=True).start()
        return NOTHING

    return start


def leaves_twice(result: Any) -> Reply:
    """Refuses as one that another takes over from, then ends the connection instead of answering; then answers."""
    asked = itertools.count()

    def reply(connection: Connection, _: dict[str, Any]) -> Any:
        number = next(asked)
        if number == 0:
            raise ShuttingDown("connect anew", reconnect=True)
        if number == 1:
            connection.drop()
            return NOTHING
        return result

    return reply


def completion(text: str, **fields: Any) -> types.Completion:
    """A Completion that says `text`."""
    usage = types.Usage(prompt_tokens=3, completion_tokens=len(text.split()))
    return types.Completion(model="m", text=text, finish_reason="stop", usage=usage, timings=types.Timings(), **fields)


def model(id: str = "org/m", state: types.ModelState = "Ready", **fields: Any) -> types.Model:
    return types.Model(id=id, state=state, source="hub", **fields)
