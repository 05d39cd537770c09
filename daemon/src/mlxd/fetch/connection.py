"""One request for one segment: bytes from the socket into the part, at the pace that is allowed and demanded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .http import Failure
from .pace import Flow
from .segments import CHUNK_BYTES, Segment
from .targets import Target

if TYPE_CHECKING:
    from .transfer import Transfer

# However slowly bytes come, they are written this often.
FLUSH_S = 0.5
NO_FLOOR_IDLE_S = 60.0


def receive(transfer: Transfer, target: Target, segment: Segment) -> None:
    """Fetch the segment to its end, which may move back meanwhile.

    Raises: Failure, Unranged; Closed once the transfer ended; OSError of the disk.
    """
    order, size = transfer.order, target.file.size
    start, stop = (0, size) if segment.serial else (segment.at, segment.stop)
    idle_s = order.stall_s if order.floor_bytes_s else max(order.stall_s, NO_FLOOR_IDLE_S)
    with transfer.http.get(target.route, start, stop, size, idle_s) as body:
        sink = Sink(transfer, target, segment)
        flow = Flow(order.stall_s, time.monotonic())
        try:
            for piece in body:
                now = time.monotonic()
                flow.add(now, len(piece))
                room = segment.left - sink.gathered
                if len(piece) > room:
                    if segment.stop == stop:
                        raise Failure("more bytes came than were asked for")
                    sink.add(piece[: max(0, room)], now)
                    break  # another connection fetches the rest
                sink.add(piece, now)
                if len(piece) < room and flow.full(now) and flow.rate(now) < order.floor_bytes_s:
                    raise Failure(f"fewer than {order.floor_bytes_s} bytes/s came over {order.stall_s:g} s", slow=True)
                if (wait := transfer.limiter.take(len(piece), now)) > 0:
                    transfer.wait(wait)
                    flow.pause(wait)
        finally:
            sink.flush()  # what has come is kept, whatever happened
    if segment.left > 0:
        raise Failure("fewer bytes came than were asked for")


class Sink:
    """Gathers pieces up to the next chunk's end, so that the disk sees few and large writes."""

    def __init__(self, transfer: Transfer, target: Target, segment: Segment) -> None:
        self._transfer, self._target, self._segment = transfer, target, segment
        self._part, _ = target.opened
        self._pieces: list[bytes] = []
        self.gathered = 0
        self._flushed_at = time.monotonic()

    def add(self, piece: bytes, now: float) -> None:
        self._pieces.append(piece)
        self.gathered += len(piece)
        segment = self._segment
        chunk_end = (segment.at // CHUNK_BYTES + 1) * CHUNK_BYTES
        if segment.at + self.gathered >= min(chunk_end, segment.stop) or now - self._flushed_at > FLUSH_S:
            self.flush()
            self._flushed_at = now

    def flush(self) -> None:
        if not self.gathered:
            return
        pieces, count = self._pieces, self.gathered
        self._pieces, self.gathered = [], 0
        self._transfer.came(count)
        at = self._segment.at
        fresh = self._write_gaps(pieces, at) if self._segment.serial else self._write(pieces, at, count)
        self._part.mark(self._transfer.stored(self._target, self._segment, count, fresh))
        self._transfer.offer(self._target)

    def _write(self, pieces: list[bytes], at: int, count: int) -> int:
        self._part.write(pieces, at)
        return count

    def _write_gaps(self, pieces: list[bytes], at: int) -> int:
        """Only chunks that are not there: those that are may have been hashed already. Returns how many bytes."""
        data, fresh = memoryview(b"".join(pieces)), 0
        while data:
            chunk = at // CHUNK_BYTES
            part = data[: (chunk + 1) * CHUNK_BYTES - at]
            if not self._part.chunks[chunk]:
                self._part.write([bytes(part)], at)
                fresh += len(part)
            data, at = data[len(part) :], at + len(part)
        return fresh
