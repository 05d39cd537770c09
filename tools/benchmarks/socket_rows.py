"""Round trips: the same blocking client, byte for byte, against the daemon and against a bare echo server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from mlxd_client import AsyncClient
from mlxd_client.codec import encode

from .effort import Effort
from .processes import Daemon
from .table import Row, alone, paired

PING = encode({"jsonrpc": "2.0", "id": 1, "method": "ping"})
HELLO = encode(
    {
        "jsonrpc": "2.0",
        "id": 0,
        "method": "hello",
        "params": {"protocol": [1, 1], "client": {"name": "bench", "version": ""}},
    }
)
# How many pings are on their way at once where they are pipelined: enough to hide the way there and back.
WINDOW = 256
AIM_PER_S = 20_000


class RawClient:
    """A blocking socket and the length of a frame; nothing is decoded on this side."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._buffer = b""

    def frame(self) -> bytes:
        """The next frame."""
        buffer = self._buffer
        while len(buffer) < 4 or len(buffer) < 4 + int.from_bytes(buffer[:4], "big"):
            data = self._socket.recv(65_536)
            if not data:
                raise RuntimeError("the server closed the connection")
            buffer += data
        end = 4 + int.from_bytes(buffer[:4], "big")
        self._buffer = buffer[end:]
        return buffer[:end]

    def ask(self, request: bytes) -> bytes:
        self._socket.sendall(request)
        return self.frame()

    def pipeline(self, request: bytes, count: int) -> float:
        """Send `count` requests, never more than WINDOW ahead of the answers. Returns answers per second."""
        length = len(self.ask(request))  # every answer to this request is as long
        began = time.perf_counter()
        sent = min(count, WINDOW)
        self._socket.sendall(request * sent)
        received, pending = 0, 0
        while received < count:
            pending += len(self._socket.recv(65_536))
            arrived, pending = divmod(pending, length)
            received += arrived
            more = min(arrived, count - sent)
            if more:
                self._socket.sendall(request * more)
                sent += more
        return count / (time.perf_counter() - began)

    def close(self) -> None:
        self._socket.close()


def round_trip_us(ask: Callable[[], object], count: int) -> float:
    """The median time of one call, in µs."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        ask()
        times.append(time.perf_counter() - began)
    return median(times) * 1e6


def ping_rows(daemon: Daemon, echo: Path, effort: Effort) -> Iterator[Row]:
    raw, bare = RawClient(daemon.socket), RawClient(echo)
    raw.ask(HELLO)
    with daemon.client() as client, asyncio.Runner() as runner:
        client.ping()
        kinds: dict[str, Callable[[], float]] = {
            "raw client": lambda: round_trip_us(lambda: raw.ask(PING), effort.pings),
            "Client": lambda: round_trip_us(client.ping, effort.pings),
            "AsyncClient": lambda: runner.run(_async_round_trip_us(daemon.socket, effort.pings)),
        }
        pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(effort.ping_rounds):
            for kind, ask in kinds.items():
                pairs[kind].append((ask(), round_trip_us(lambda: bare.ask(PING), effort.pings)))
    raw.close()
    bare.close()
    for kind, measured in pairs.items():
        target = ("<=", 2.0) if kind == "raw client" else None
        yield paired("ping", f"ping, {kind}; bare echo, raw client", measured, "µs", target)


async def _async_round_trip_us(path: Path, count: int) -> float:
    async with AsyncClient(path) as client:
        await client.ping()
        times = []
        for _ in range(count):
            began = time.perf_counter()
            await client.ping()
            times.append(time.perf_counter() - began)
        return median(times) * 1e6


def pipelined_rows(daemon: Daemon, echo: Path, effort: Effort) -> Iterator[Row]:
    raw, bare = RawClient(daemon.socket), RawClient(echo)
    raw.ask(HELLO)
    pairs = []
    for _ in range(max(2, effort.ping_rounds // 2)):
        pairs.append((raw.pipeline(PING, effort.pipelined), bare.pipeline(PING, effort.pipelined)))
    raw.close()
    bare.close()
    yield paired("pipelined", "pipelined pings, one connection; a bare echo", pairs, "/s")
    rate = median(ours for ours, _ in pairs)
    yield alone("pipelined", "pipelined pings, one connection, against the target", rate, "/s", (">=", AIM_PER_S))
    rates = [asyncio.run(_async_pipeline(daemon.socket, effort.pipelined)) for _ in range(3)]
    yield alone("pipelined", "pipelined pings, AsyncClient", median(rates), "/s")


async def _async_pipeline(path: Path, count: int) -> float:
    async with AsyncClient(path) as client:
        await client.ping()
        began = time.perf_counter()
        for start in range(0, count, WINDOW):
            await asyncio.gather(*(client.ping() for _ in range(min(WINDOW, count - start))))
        return count / (time.perf_counter() - began)
