"""The least that a socket server on uvloop can do: frames of the wire come in and go out again, not even decoded.

Run as a process: `python -m benchmarks.echo SOCKET`; prints a line once it listens.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop


class Echo(asyncio.Protocol):
    """Cuts the stream into frames (4-byte big-endian length, then the body) and writes each turn's at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        out = []
        while len(buffer) >= 4:
            end = 4 + int.from_bytes(buffer[:4], "big")
            if len(buffer) < end:
                break
            out.append(bytes(buffer[:end]))
            del buffer[:end]
        if out:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))


async def serve(path: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(Echo, path)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
