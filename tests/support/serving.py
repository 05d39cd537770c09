"""A server of the fake runtime on a real socket, and a bare client that sends what no decent client would."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mlxd.server.limits import ServerLimits
from mlxd.server.listen import listen
from mlxd.server.server import Server
from mlxd_client import codec
from mlxd_client.codec import Encoding
from support.fake_runtime import FakeRuntime, Lines

__all__ = ["Closed", "RawClient", "Served", "serving"]


class Closed(Exception):
    """The server closed the connection."""


class RawClient:
    """Sends bytes and messages, and reads messages one by one. `parked` holds what `answer` read past."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, encoding: Encoding) -> None:
        self.reader = reader
        self.writer = writer
        self.encoding = encoding
        self.parked: list[dict[str, Any]] = []
        self._decoder = codec.Decoder(encoding)
        self._last_id = 0

    def send_bytes(self, data: bytes) -> None:
        self.writer.write(data)

    def send(self, message: Any) -> None:
        self.writer.write(codec.encode(message, self.encoding))

    def request(self, method: str, params: Any = None, *, id: Any = None) -> Any:
        """Send a request; returns its id."""
        if id is None:
            self._last_id += 1
            id = self._last_id
        message = {"jsonrpc": "2.0", "id": id, "method": method}
        self.send(message if params is None else message | {"params": params})
        return id

    async def next(self) -> dict[str, Any]:
        """The next message, parked ones first. Raises Closed."""
        return self.parked.pop(0) if self.parked else await self._read()

    async def _read(self) -> dict[str, Any]:
        while True:
            message = self._decoder.next()
            if message is not None:
                assert isinstance(message, dict), message
                assert message["jsonrpc"] == "2.0"
                return message
            try:
                data = await self.reader.read(65536)
            except ConnectionError:
                raise Closed from None
            if not data:
                raise Closed
            self._decoder.feed(data)

    async def answer(self, id: Any) -> dict[str, Any]:
        """The response of that id; other messages are parked."""
        for at, message in enumerate(self.parked):
            if "method" not in message and message["id"] == id:
                return self.parked.pop(at)
        while True:
            message = await self._read()
            if "method" not in message and message["id"] == id:
                return message
            self.parked.append(message)

    async def call(self, method: str, **params: Any) -> Any:
        """The result. Raises AssertionError for an error."""
        answer = await self.answer(self.request(method, params))
        assert "result" in answer, answer
        return answer["result"]

    async def refused(self, method: str, params: Any = None) -> dict[str, Any]:
        """The error object that a request gets."""
        answer = await self.answer(self.request(method, params))
        assert "error" in answer, answer
        return dict(answer["error"])

    async def closed(self) -> list[dict[str, Any]]:
        """Everything until the server closes the connection."""
        messages = list(self.parked)
        with contextlib.suppress(Closed):
            while True:
                messages.append(await self._read())
        return messages

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Served:
    def __init__(self, path: Path, runtime: FakeRuntime, server: Server, log: Lines) -> None:
        self.path = path
        self.runtime = runtime
        self.server = server
        self.log = log
        self.open: list[RawClient] = []

    async def connect(self, encoding: Encoding = Encoding.MSGPACK) -> RawClient:
        client = RawClient(*await asyncio.open_unix_connection(str(self.path)), encoding)
        self.open.append(client)
        return client


@contextlib.asynccontextmanager
async def serving(limits: ServerLimits | None = None, *, uid: int | None = None) -> AsyncIterator[Served]:
    """Serve a FakeRuntime in a folder of its own (short: socket paths are limited) and close it all afterwards."""
    home = Path(tempfile.mkdtemp(prefix="mlxd-"))
    log = Lines()
    runtime = FakeRuntime(limits)
    listener = listen(home)
    server = Server(runtime, runtime.events, log=log, limits=limits, uid=uid)
    served = Served(home / "mlxd.sock", runtime, server, log)
    try:
        await server.start(listener)
        yield served
    finally:
        for client in served.open:
            client.writer.close()
        await server.close()
        listener.close()
        shutil.rmtree(home)
