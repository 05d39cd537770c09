"""A crowd of clients in a process of its own: some follow events, some never read, some send rubbish.

`python -m support.crowd SOCKET FOLLOWERS DEAF NOISY IDLE` says `there` once all are connected, and answers each line of
standard input with a line of JSON: what the followers saw since the line before. It ends with its input.

How late an event is: from when it was published, by the daemon's clock, to when a follower has decoded it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import uvloop

from mlxd_client.codec import encode

__all__ = ["Crowd", "Seen", "Shape"]

SUBSCRIBE = encode({"jsonrpc": "2.0", "id": 1, "method": "events.subscribe", "params": {}})
PING = encode({"jsonrpc": "2.0", "id": 1, "method": "ping"})
# What a noisy client sends each time: requests that are none, or bytes that are no frame and cost it its connection.
INVALID = encode({"jsonrpc": "2.0", "id": "x" * 300, "method": 5, "extra": ["x"] * 50}) * 10
NOISE_S, IDLE_S = 0.25, 1.0
PATIENCE_S = 120.0


class Shape(NamedTuple):
    """How many clients of which kind."""

    followers: int
    deaf: int
    noisy: int
    idle: int

    @classmethod
    def of(cls, clients: int) -> Shape:
        """Nine tenths follow, a twentieth never reads, a fiftieth sends rubbish, the rest pings now and then."""
        followers, deaf, noisy = clients * 9 // 10, max(2, clients // 20), max(2, clients // 50)
        return cls(followers, deaf, noisy, clients - followers - deaf - noisy)


class Seen(msgspec.Struct):
    """What the crowd saw. Times in seconds.

    Attributes:
        events: all that came to all followers; `finished` are the ends of generations, by follower.
        late: of events, at the quantiles 0.5, 0.9, 0.99 and 1.
        lost: followers whose connection was closed, or that were told that they lag.
        again: how often deaf clients were closed and came back, and how often noisy ones.
    """

    events: int
    late: list[float]
    finished: list[int]
    lost: int
    again: list[int]


class Crowd:
    """The process, as a context."""

    def __init__(self, socket: Path, shape: Shape) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.crowd", str(socket), *map(str, shape)], cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Crowd:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "there\n"
        return self

    def seen(self) -> Seen:
        """Since the last time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Seen)

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait()


# --- in the process -------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct):
    name: str = ""
    at: float = 0.0


class _Message(msgspec.Struct):
    params: _Event | None = None
    result: dict[str, Any] | None = None


_decode = msgspec.msgpack.Decoder(_Message).decode


class _Books:
    """What all of them saw."""

    def __init__(self, followers: int) -> None:
        self.late: list[float] = []
        self.finished = [0] * followers
        self.lost = 0
        self.again = [0, 0]
        self.subscribed = 0
        self.all_there = asyncio.Event()

    def told(self) -> Seen:
        late = sorted(self.late)
        quantiles = [late[min(len(late) - 1, int(len(late) * q))] for q in (0.5, 0.9, 0.99, 1.0)] if late else []
        seen = Seen(len(late), quantiles, self.finished, self.lost, self.again)
        self.late, self.finished = [], [0] * len(self.finished)
        self.lost, self.again = 0, [0, 0]
        return seen


class _Follower(asyncio.Protocol):
    def __init__(self, number: int, books: _Books) -> None:
        self._number, self._books = number, books
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(SUBSCRIBE)

    def data_received(self, data: bytes) -> None:
        books, now = self._books, time.time()
        buffer = self._buffer + data if self._buffer else data
        at, size = 0, len(buffer)
        while size - at >= 4 and size - at >= (end := 4 + int.from_bytes(buffer[at : at + 4], "big")):
            message = _decode(buffer[at + 4 : at + end])
            at += end
            event = message.params
            if event is None:
                books.subscribed += 1
                if books.subscribed == len(books.finished):
                    books.all_there.set()
            else:
                books.late.append(now - event.at)
                if event.name == "generation_finished":
                    books.finished[self._number] += 1
                books.lost += event.name == "lagged"
        self._buffer = buffer[at:]

    def connection_lost(self, _: Exception | None) -> None:
        self._books.lost += 1


async def _deaf(path: str, books: _Books) -> None:
    """Follows all events, and never reads one; comes back when it is closed."""
    loop = asyncio.get_running_loop()
    while True:
        closed = asyncio.Event()
        protocol = _Silent(closed)
        transport, _ = await loop.create_unix_connection(lambda made=protocol: made, path)
        transport.write(SUBSCRIBE)
        transport.pause_reading()
        await _gone(transport, closed)
        books.again[0] += 1


class _Silent(asyncio.Protocol):
    def __init__(self, closed: asyncio.Event) -> None:
        self._closed = closed

    def connection_lost(self, _: Exception | None) -> None:
        self._closed.set()


async def _gone(transport: asyncio.WriteTransport, closed: asyncio.Event) -> None:
    """Who does not read is not told that the other side has closed: it notices when it writes."""
    while not closed.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), IDLE_S)
        if not transport.is_closing():
            transport.write(PING)


async def _noisy(path: str, books: _Books, seed: int) -> None:
    draw = random.Random(seed)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                data = b"the beginning"
                while data:
                    await asyncio.sleep(NOISE_S)
                    writer.write(draw.randbytes(1000) if draw.random() < 0.1 else INVALID)
                    data = await asyncio.wait_for(reader.read(65_536), IDLE_S)
            finally:
                writer.close()
        books.again[1] += 1


async def _idle(path: str) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    while True:
        writer.write(PING)
        await reader.read(65_536)
        await asyncio.sleep(IDLE_S)


def _allow_many_files() -> None:
    """One for each client; macOS gives 256 to who does not ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _main(path: str, shape: Shape) -> None:
    _allow_many_files()
    os.nice(5)  # what measures gives way to what is measured, where there are few cores
    loop = asyncio.get_running_loop()
    books = _Books(shape.followers)
    for number in range(shape.followers):
        await loop.create_unix_connection(lambda made=number: _Follower(made, books), path)
    tasks = [loop.create_task(_deaf(path, books)) for _ in range(shape.deaf)]
    tasks += [loop.create_task(_noisy(path, books, seed)) for seed in range(shape.noisy)]
    tasks += [loop.create_task(_idle(path)) for _ in range(shape.idle)]
    async with asyncio.timeout(PATIENCE_S):
        await books.all_there.wait()
    asked: asyncio.Queue[bool] = asyncio.Queue()
    loop.add_reader(0, lambda: asked.put_nowait(bool(os.read(0, 1))))
    print("there", flush=True)
    while await asked.get():
        for task in tasks:
            if task.done():
                task.result()
        print(json.dumps(msgspec.to_builtins(books.told())), flush=True)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], Shape(*map(int, sys.argv[2:]))))
