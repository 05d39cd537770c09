"""The daemon's end of the socketpair to one child: bytes to messages, messages to bytes, both bounded.

Reads run once per decode step of every model, so they are plain loop callbacks without a task or a transport; that
also makes spawning synchronous, which a transport's set-up is not.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from mlxd_client.codec import Decoder, Encoding, Invalid
from mlxd_client.errors import ProtocolError

__all__ = ["READ_BYTES", "FramePipe"]

READ_BYTES = 65_536
# Messages handled in one go: a child that floods gets its turn like any other reader of the loop, and no more.
_MESSAGES_PER_TURN = 256


class FramePipe:
    """Reads and writes frames on `sock`, and owns it.

    Args:
        scratch: a buffer of 64 KiB to read into; may be shared by all pipes of a loop.
        clock: seconds, for `stalled_at`.
        on_data: called once per read, before its messages: a sign of life.
        on_message: called for each message.
        on_garbage: called once, with a reason, when the bytes are no messages; nothing is read after it.
        on_end: called once, when the other side has closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        scratch: bytearray,
        clock: Callable[[], float],
        *,
        on_data: Callable[[], None],
        on_message: Callable[[dict[str, Any]], None],
        on_garbage: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._scratch = memoryview(scratch)
        self._clock = clock
        self._on_data, self._on_message, self._on_garbage, self._on_end = on_data, on_message, on_garbage, on_end
        self._decoder = Decoder(Encoding.MSGPACK)
        self._out = bytearray()
        self._reading = True
        self._backlog = False
        self._writable = True
        self._finishing = False
        self._closed = False
        self.stalled_at: float | None = None  # since when the other side takes no bytes; None while it does
        sock.setblocking(False)
        loop.add_reader(sock, self._on_readable)

    @property
    def unsent_bytes(self) -> int:
        return len(self._out)

    @property
    def mid_frame(self) -> bool:
        """Whether bytes came that belong to no complete frame."""
        return self._decoder.buffered > 0

    def send(self, data: bytes) -> None:
        """Write, or keep until the other side reads. Where it is gone, the bytes are dropped: its end is being told."""
        if not self._writable or self._finishing:
            return
        if self._out:
            self._out += data
            return
        sent = self._write(data)
        if sent < len(data) and self._writable:
            self._out += memoryview(data)[sent:]
            self.stalled_at = self._clock()
            self._loop.add_writer(self._sock, self._on_writable)

    def finish(self) -> None:
        """Half-close, once everything before is sent."""
        if not self._finishing:
            self._finishing = True
            if not self._out:
                self._shut_down()

    def poll(self) -> None:
        """Handle what has come and the loop has not told of yet."""
        if self._reading:
            self._on_readable()

    def drain(self) -> None:
        """Handle what has come already, without waiting; the writer is gone."""
        self._pump(None)
        while self._reading and self._receive():
            self._pump(None)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop_reading()
        self._stop_writing()
        self._sock.close()

    # --- reading ---

    def _on_readable(self) -> None:
        if not self._backlog and self._receive():
            self._pump(_MESSAGES_PER_TURN)

    def _receive(self) -> bool:
        """Whether bytes came."""
        try:
            count = self._sock.recv_into(self._scratch, READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # a reset is an end
            count = 0
        if count == 0:
            self._stop_reading()
            self._on_end()
            return False
        self._decoder.feed(self._scratch[:count])
        self._on_data()
        return True

    def _pump(self, budget: int | None) -> None:
        """Hand on what is complete; past the budget, the rest in the loop's next turn."""
        self._backlog = False
        handled = 0
        try:
            while self._reading:
                message = self._decoder.next()
                if message is None:
                    return
                if isinstance(message, Invalid):
                    raise ProtocolError(message.reason)
                self._on_message(message)
                handled += 1
                if handled == budget:
                    self._backlog = True
                    self._loop.call_soon(self._resume)
                    return
        except ProtocolError as error:
            self._stop_reading()
            self._on_garbage(str(error))

    def _resume(self) -> None:
        if self._backlog:
            self._pump(_MESSAGES_PER_TURN)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    # --- writing ---

    def _write(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes were taken."""
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # the reading side will tell
            self._stop_writing()
            return 0

    def _on_writable(self) -> None:
        with memoryview(self._out) as view:
            sent = self._write(view)
        if not self._writable:
            self._out.clear()
            return
        if sent:
            del self._out[:sent]
            self.stalled_at = self._clock()
        if not self._out:
            self.stalled_at = None
            self._loop.remove_writer(self._sock)
            if self._finishing:
                self._shut_down()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # gone already
            pass

    def _stop_writing(self) -> None:
        self._writable = False
        self.stalled_at = None
        if self._out:
            self._loop.remove_writer(self._sock)
