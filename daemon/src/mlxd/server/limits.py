"""Every bound of the server in one place, so that tests can make each of them small."""

from __future__ import annotations

import msgspec

from mlxd_client.types import MAX_DEPTH, MAX_FRAME_BYTES, Limits

__all__ = ["ServerLimits"]


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, durations in seconds.

    Attributes:
        frame_bytes: largest frame body or JSON line taken in; a larger one closes its connection.
        depth: how deep maps and arrays of a frame may nest.
        in_flight: requests of one connection that wait for their answer; one more gets `queue_full`.
        queue: how many requests wait in the daemon's scheduler; only told to clients, the scheduler enforces it.
        connections: open connections; one more is told `queue_full`, and closed.
        backlog: connections the kernel holds until they are accepted.
        subscriptions: per connection; one more gets `queue_full`.
        subscriber_events: events that wait for one subscription; overflow drops them all and is announced (`lagged`).
        subscriber_bytes: the same bound, in encoded bytes.
        ring_events: past events kept for `since`.
        ring_bytes: the same bound, in estimated bytes.
        write_stall_s: a connection whose peer takes no byte for so long is closed.
        reply_backlog_bytes: replies that wait for a peer that does not read; above it, its requests are not read.
        event_chunk_bytes: events that are joined into one write.
        turn_messages: frames of one connection handled before the others get their turn.
        close_flush_s: how long closing waits for peers to take what was written for them.
    """

    frame_bytes: int = MAX_FRAME_BYTES
    depth: int = MAX_DEPTH
    in_flight: int = 1024
    queue: int = 256
    connections: int = 4096
    backlog: int = 1024
    subscriptions: int = 64
    subscriber_events: int = 1024
    subscriber_bytes: int = 4 * 1024 * 1024
    ring_events: int = 4096
    ring_bytes: int = 4 * 1024 * 1024
    write_stall_s: float = 10.0
    reply_backlog_bytes: int = 256 * 1024
    event_chunk_bytes: int = 64 * 1024
    turn_messages: int = 256
    close_flush_s: float = 1.0

    def public(self) -> Limits:
        """What `hello` tells the client."""
        return Limits(
            frame_bytes=self.frame_bytes,
            depth=self.depth,
            requests_in_flight=self.in_flight,
            queue=self.queue,
            subscriber_events=self.subscriber_events,
            subscriber_bytes=self.subscriber_bytes,
        )
