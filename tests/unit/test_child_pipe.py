"""A child's pipe and its stderr, with the other side played by the test."""

from __future__ import annotations

import asyncio
import os
import socket
from itertools import pairwise
from typing import Any

import pytest

from mlxd.children.lastwords import LastWords
from mlxd.children.pipe import READ_BYTES, FramePipe
from mlxd_client.codec import encode
from support.loops import both_loops, run, until


class Side:
    """A FramePipe, all that it reported, and the other end as a plain socket."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.garbage: list[str] = []
        self.ends = 0
        ours, self.other = socket.socketpair()
        self.other.settimeout(10)
        loop = asyncio.get_running_loop()
        self.pipe = FramePipe(
            loop,
            ours,
            bytearray(READ_BYTES),
            loop.time,
            on_data=lambda: None,
            on_message=self.messages.append,
            on_garbage=self.garbage.append,
            on_end=self.end,
        )

    def end(self) -> None:
        self.ends += 1

    def close(self) -> None:
        self.pipe.close()
        self.other.close()


@both_loops
@pytest.mark.parametrize("size", [1, 3, 64, 100_000])
def test_messages_arrive_whole_however_they_are_split(loop_kind: str, size: int) -> None:
    messages = [{"method": "progress", "params": {"progress": k / 100}} for k in range(100)]
    stream = b"".join(encode(message) for message in messages)

    async def main() -> None:
        side = Side()
        for at in range(0, len(stream), size):
            side.other.sendall(stream[at : at + size])
            await asyncio.sleep(0)
        await until(lambda: len(side.messages) >= len(messages))
        assert side.messages == messages
        side.close()

    run(main(), loop_kind=loop_kind)


@both_loops
def test_a_long_burst_is_handled_in_turns_and_in_order(loop_kind: str) -> None:
    async def main() -> None:
        side = Side()
        side.other.sendall(b"".join(encode({"id": k, "result": {}}) for k in range(2000)))
        counts = []
        while len(side.messages) < 2000:
            await asyncio.sleep(0)
            counts.append(len(side.messages))
        assert max(after - before for before, after in pairwise(counts)) <= 512
        assert [message["id"] for message in side.messages] == list(range(2000))
        side.close()

    run(main(), loop_kind=loop_kind)


@both_loops
def test_the_end_comes_after_all_messages(loop_kind: str) -> None:
    async def main() -> None:
        side = Side()
        side.other.sendall(b"".join(encode({"id": k, "result": {}}) for k in range(1000)))
        side.other.close()
        await until(lambda: side.ends)
        assert (len(side.messages), side.ends, side.garbage) == (1000, 1, [])
        side.close()

    run(main(), loop_kind=loop_kind)


def test_drain_takes_what_is_there_without_waiting() -> None:
    async def main() -> None:
        side = Side()
        side.other.sendall(b"".join(encode({"id": k, "result": {}}) for k in range(1000)) + b"\0\0")
        side.pipe.drain()
        assert len(side.messages) == 1000
        assert side.pipe.mid_frame
        side.close()

    run(main())


@both_loops
def test_garbage_is_told_once_and_what_follows_is_not_read(loop_kind: str) -> None:
    async def main() -> None:
        side = Side()
        side.other.sendall(encode({"id": 1, "result": {}}) + b"\xff" * 99 + encode({"id": 2, "result": {}}))
        await until(lambda: side.garbage)
        await asyncio.sleep(0.01)
        assert (len(side.messages), len(side.garbage)) == (1, 1)
        side.close()

    run(main(), loop_kind=loop_kind)


@both_loops
def test_what_is_not_read_waits_and_the_half_close_waits_behind_it(loop_kind: str) -> None:
    async def main() -> None:
        side = Side()
        sent = b""
        for k in range(8):
            frame = encode({"id": k, "text": "x" * 200_000})
            sent += frame
            side.pipe.send(frame)
        side.pipe.finish()
        side.pipe.send(b"too late")
        assert side.pipe.unsent_bytes > 0
        stalled_at = side.pipe.stalled_at
        assert stalled_at is not None
        received = await asyncio.get_running_loop().run_in_executor(None, read_all, side.other)
        assert received == sent
        assert side.pipe.unsent_bytes == 0
        assert side.pipe.stalled_at is None
        side.close()

    run(main(), loop_kind=loop_kind)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65_536):
        parts.append(part)
    return b"".join(parts)


@both_loops
def test_writing_to_nobody_does_nothing(loop_kind: str) -> None:
    async def main() -> None:
        side = Side()
        side.pipe.send(b"x" * 3_000_000)
        side.other.close()
        await until(lambda: side.ends)
        side.pipe.send(b"x")
        side.pipe.finish()
        side.close()
        side.pipe.close()

    run(main(), loop_kind=loop_kind)


@both_loops
def test_stderr_comes_in_lines_and_leaves_last_words(loop_kind: str) -> None:
    async def main() -> None:
        reader, writer = os.pipe()
        lines: list[str] = []
        words = LastWords(asyncio.get_running_loop(), reader, lines.append)
        os.write(writer, b"one\ntw")
        await until(lambda: lines == ["one"])
        os.write(writer, b"o\n" + b"y" * 5000 + b"\nthree")
        os.close(writer)
        await until(lambda: len(lines) == 4)
        words.close()
        words.close()
        assert lines[1] == "two"
        assert lines[2] == "y" * 1024
        assert lines[3] == "three"
        assert words.text().endswith("\nthree")

    run(main(), loop_kind=loop_kind)
