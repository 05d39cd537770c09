"""Round trips: the same blocking client, byte for byte, against the daemon and against a bare echo server.

A round trip within one core costs a few µs, one between two cores several times as much, and the system moves processes
as it likes. So client and servers are kept where they belong, where the system allows that, and both ways are measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from mlxd_client import AsyncClient
from mlxd_client.codec import encode

from .effort import Effort
from .processes import Daemon, Echo
from .table import Row, paired

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


class Placement(NamedTuple):
    """Which core the client runs on, and which one the servers."""

    label: str
    client: int
    servers: int


def placements() -> list[Placement | None]:
    """The ways to be measured: None where processes go where the system puts them."""
    if sys.platform != "linux":
        return [None]
    first, *others = sorted(os.sched_getaffinity(0))
    return [Placement("one core", first, first), *(Placement("two cores", first, other) for other in others[:1])]


@contextlib.contextmanager
def placed(placement: Placement | None, *servers: int) -> Iterator[str]:
    """Keep this process and the servers, by pid, to their cores. Gives what to add to a row's words."""
    if placement is None:
        yield ""
        return
    wanted = {psutil.Process(): placement.client} | {psutil.Process(pid): placement.servers for pid in servers}
    before = {process: process.cpu_affinity() for process in wanted}
    try:
        for process, core in wanted.items():
            process.cpu_affinity([core])
        yield f", {placement.label}"
    finally:
        for process, cores in before.items():
            process.cpu_affinity(cores)


def ping_rows(daemon: Daemon, echo: Echo, effort: Effort) -> Iterator[Row]:
    target: tuple[str, float] | None = ("<=", 2.0)
    for placement in placements():
        with placed(placement, daemon.process.pid, echo.process.pid) as where:
            for kind, pairs in _pings(daemon, echo.path, effort).items():
                what = f"ping, {kind}{where}; bare echo, raw client"
                yield paired("ping", what, pairs, "µs", target if kind == "raw client" else None)
        target = None  # the harder way has it: what crossing costs hides what the server does


def _pings(daemon: Daemon, echo: Path, effort: Effort) -> dict[str, list[tuple[float, float]]]:
    """Median round trips in µs by kind of client, each beside the bare one of the same moment."""
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
    return pairs


async def _async_round_trip_us(path: Path, count: int) -> float:
    async with AsyncClient(path) as client:
        await client.ping()
        times = []
        for _ in range(count):
            began = time.perf_counter()
            await client.ping()
            times.append(time.perf_counter() - began)
        return median(times) * 1e6


def pipelined_rows(daemon: Daemon, echo: Echo, effort: Effort) -> Iterator[Row]:
    """Client and servers on one core: what both together manage, however many cores there are."""
    placement = placements()[0]
    with placed(placement, daemon.process.pid, echo.process.pid) as where:
        raw, bare = RawClient(daemon.socket), RawClient(echo.path)
        raw.ask(HELLO)
        kinds: dict[str, Callable[[], float]] = {
            "raw client": lambda: raw.pipeline(PING, effort.pipelined),
            "AsyncClient": lambda: asyncio.run(_async_pipeline(daemon.socket, effort.pipelined)),
        }
        for kind, ask in kinds.items():
            pairs = [(ask(), bare.pipeline(PING, effort.pipelined)) for _ in range(max(2, effort.ping_rounds // 2))]
            what = f"pipelined pings, {kind}{where}; bare echo, raw client"
            yield paired("pipelined", what, pairs, "/s", (">=", AIM_PER_S), "value")
        raw.close()
        bare.close()


async def _async_pipeline(path: Path, count: int) -> float:
    async with AsyncClient(path) as client:
        await client.ping()
        began = time.perf_counter()
        for start in range(0, count, WINDOW):
            await asyncio.gather(*(client.ping() for _ in range(min(WINDOW, count - start))))
        return count / (time.perf_counter() - began)
