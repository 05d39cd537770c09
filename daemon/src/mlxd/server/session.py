"""One connection: bytes in, calls out, answers back in order of completion.

Input: frames are handled as they come; what needs no waiting is answered within the same turn, and all answers of a
turn leave in one write. A connection that sends much yields to the others after `turn_messages` frames.
Output, in this order: answers, stream pieces, events. Nothing is written while the peer does not read (the kernel's
buffer is full): then pieces merge per request, events wait in their subscription's bounded queue, answers wait in
`_out`, and above `reply_backlog_bytes` of those, requests are not read either. After `write_stall_s` it is closed.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from typing import TYPE_CHECKING, Any

from mlxd_client import codec
from mlxd_client.errors import Cancelled as CancelledRpc
from mlxd_client.errors import (
    InternalError,
    InvalidRequest,
    MethodNotFound,
    ParseError,
    ProtocolError,
    QueueFull,
    RpcError,
)
from mlxd_client.types import ClientInfo

from .call import PENDING, Call
from .listen import Peer, first_byte, peer_gone, peer_of
from .methods.table import METHODS
from .requests import MAX_ID_CHARS, MEMBERS, checked_params, what_is_wrong
from .stall import StallWatch

if TYPE_CHECKING:
    from .events import Subscription
    from .server import Server

__all__ = ["Session"]

_ABSENT = object()
_HALF_CLOSED_CHECK_S = 0.25


class Session(asyncio.Protocol):
    """One client's connection.

    Attributes:
        client: the connection's number, never used twice.
        subscriptions: by their number on this connection.
    """

    def __init__(self, server: Server, client: int) -> None:
        self.server = server
        self.client = client
        self.peer: Peer | None = None
        self.subscriptions: dict[int, Subscription] = {}
        self.next_subscription = 1
        limits = server.limits
        self._decoder = codec.Decoder(max_bytes=limits.frame_bytes, max_depth=limits.depth)
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None  # uvloop's, whose write buffer limit is set to zero: paused means a full kernel
        self._calls: dict[int | str, Call] = {}
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._streams: dict[Call, None] = {}  # calls with pieces to write, oldest first
        self._open = False  # bytes are handled, calls are answered
        self._parting = False  # closes as soon as nothing is under way
        self._ending = False  # no further frame is handled; closes once everything is answered
        self._half_closed = False  # the peer will send nothing more, but still reads
        self._paused = False  # the kernel takes no more bytes
        self._held_back = False  # frames wait in the decoder until the peer reads, or the others had their turn
        self._in_turn = False  # answers are gathered, to be written when the turn ends
        self._flush_scheduled = False
        self._stall = StallWatch(self._loop, limits.write_stall_s, self._stalled)

    @property
    def encoding(self) -> codec.Encoding:
        return self._decoder.encoding or codec.Encoding.MSGPACK

    # --- the transport's callbacks --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        peer, refusal = None, None
        try:
            peer = peer_of(transport.get_extra_info("socket"))
        except OSError as error:
            refusal = f"no credentials: {error.strerror}"
        refusal = refusal or self.server.refusal(peer)
        if refusal is not None:
            self.server.session_refused()
            self.server.log.warning("client_refused", client=self.client, reason=refusal, peer=peer)
            self._transport.abort()
            return
        if self.server.full:
            self._turn_away()
            return
        self.peer = peer
        self._open = True
        self._transport.set_write_buffer_limits(high=0)
        self.server.session_opened(self)

    def _turn_away(self) -> None:
        """One connection too many is told so, in the encoding that it has begun to speak, if it has."""
        limit = self.server.limits.connections
        self.server.log.warning("client_refused", client=self.client, reason="too many connections", limit=limit)
        error = QueueFull(f"{limit} clients are connected, and the daemon takes no more", limit=limit)
        spoken = first_byte(self._transport.get_extra_info("socket").fileno())
        encoding = codec.Encoding.JSON if spoken == b"{" else codec.Encoding.MSGPACK
        self._transport.write(codec.encode({"jsonrpc": "2.0", "id": None, "error": error.to_wire()}, encoding))
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._open or self._ending:
            return
        self._decoder.feed(data)
        if not self._held_back:
            self._turn()

    def eof_received(self) -> bool:
        """A client that only finished writing (`printf … | nc -U`) still gets its answers; one that left does not."""
        if not self._open or peer_gone(self._transport.get_extra_info("socket")):
            return False
        self._half_closed = True
        if self._decoder.buffered and self._decoder.encoding is codec.Encoding.JSON:
            self._decoder.feed(b"\n")
        if not self._held_back:
            self._turn()
        self._watch_half_closed()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop()
        self._stall.stop()
        self.server.session_ended(self)

    def pause_writing(self) -> None:
        self._paused = True
        self._stall.start(self._transport)

    def resume_writing(self) -> None:
        self._paused = False
        self._stall.stop()
        self._flush()
        if self._held_back and not self._paused:
            self._turn()

    # --- input ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Handle the frames that are there, then write all answers at once.

        Stops early, with the rest of the frames held back, where the peer does not read its answers (goes on when it
        does) or where the others are due (goes on after them).
        """
        self._in_turn = True
        left = self.server.limits.turn_messages
        hold = False
        try:
            while self._open and not self._ending:
                if self.server.paused:
                    hold = True
                    break
                if self._out_bytes > self.server.limits.reply_backlog_bytes:
                    self._write_answers()
                    if self._paused:
                        hold = True
                        break
                if left == 0:
                    hold = True
                    self._loop.call_soon(self._next_turn)
                    break
                message = self._decoder.next()
                if message is None:
                    break
                left -= 1
                self._on_message(message)
            self._after_frames(hold)
        except ProtocolError as error:
            self._refuse_bytes(str(error))
        finally:
            self._in_turn = False
        self._hold(hold)
        self._flush()

    def _next_turn(self) -> None:
        if self._held_back and self._open and not self._paused:
            self._turn()

    def _after_frames(self, hold: bool) -> None:
        if self._half_closed and not hold and not self._ending:
            if self._decoder.buffered:
                raise ProtocolError("the connection ended inside a frame")
            self._ending = not self.subscriptions

    def _hold(self, hold: bool) -> None:
        if hold == self._held_back:
            return
        self._held_back = hold
        if self._transport.is_closing() or self._half_closed:
            return
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _on_message(self, message: dict[str, Any] | codec.Invalid) -> None:
        """Dispatch one frame: an invalid one is refused, a notification is never answered, a request always is."""
        if not isinstance(message, dict):
            self._refuse(message.id, message.reason)
            return
        name = message.get("method")
        request_id = message.get("id", _ABSENT)
        kind = type(request_id)
        sound = kind is int or (kind is str and 0 < len(request_id) <= MAX_ID_CHARS)
        if type(name) is not str or message.get("jsonrpc") != "2.0" or not message.keys() <= MEMBERS:
            self._refuse(request_id if sound else None, what_is_wrong(message))
        elif sound:
            if request_id in self._calls:
                self._refuse(request_id, f"the id {request_id!r} is that of a request under way")
            else:
                self._on_request(request_id, name, message)
        elif request_id is _ABSENT:
            self._on_notification(name, message)
        else:
            self._refuse(None, f"an id is an integer or a string of 1 to {MAX_ID_CHARS} characters")

    def _on_request(self, request_id: int | str, name: str, message: dict[str, Any]) -> None:
        method = METHODS.get(name)
        if method is None:
            error = MethodNotFound(f"there is no method named {name[:80]!r}", method=name[:80])
            self._send({"jsonrpc": "2.0", "id": request_id, "error": error.to_wire()})
            return
        call = Call(self, request_id, method)
        if self._parting and not method.bound:
            call.fail(self.server.refused())
            return
        try:
            params = checked_params(method, message)
            if method.waits:
                self._admit(call)
            result = method.handler(call, params)
        except RpcError as error:
            self.server.refused_requests[name, error.kind] += 1
            call.fail(error)
        except Exception as error:
            call.fail(self._bug(call, error))
        else:
            if method.is_async:
                call.task = task = self._loop.create_task(result)
                task.add_done_callback(lambda ended: self._on_task_done(call, ended))
            elif result is not PENDING:
                call.reply(result)

    def _admit(self, call: Call) -> None:
        """Count a call among those that wait for their answer, or refuse it."""
        limit = self.server.limits.in_flight
        if len(self._calls) >= limit:
            raise QueueFull(f"this connection has {limit} requests under way", limit=limit)
        if call.method.work:
            if self.server.draining:
                raise self.server.refused()
            self.server.work_begins()
        self._calls[call.id] = call

    def _on_task_done(self, call: Call, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            call.fail(CancelledRpc("the request was cancelled"))
            return
        error = task.exception()
        if error is None:
            call.reply(task.result())
        elif isinstance(error, RpcError):
            call.fail(error)
        else:
            call.fail(self._bug(call, error))

    def _on_notification(self, name: str, message: dict[str, Any]) -> None:
        """JSON-RPC allows no answer here, so only what needs none is accepted."""
        if name == "cancel":
            params = message.get("params")
            target = params.get("id") if isinstance(params, dict) else None
            if type(target) is int or type(target) is str:
                self.cancel(target)
                return
        self.server.log.debug("notification_ignored", client=self.client, method=name[:80])

    # --- for the methods ------------------------------------------------------------------------------------------

    def introduced(self, client: ClientInfo) -> None:
        """The client said who it is."""
        self.server.log.debug("client_introduced", client=self.client, name=client.name, version=client.version)

    def cancel(self, request_id: int | str) -> bool:
        """Cancel a request of this connection. Returns whether there was one under way."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        call.cancel()
        return True

    def read_on(self) -> None:
        """The server's pause is over."""
        if self._held_back and self._open and not self._paused:
            self._turn()

    def part(self) -> None:
        """Another daemon takes over: close once nothing is under way. A client that has said nothing yet is heard
        first, for only then it can be answered."""
        self._parting = True
        self.schedule_flush()

    def end_after_answers(self) -> None:
        """Handle no further frame, and close once all calls are answered and written."""
        self._ending = True
        self.schedule_flush()

    # --- output ---------------------------------------------------------------------------------------------------

    def send_result(self, call: Call, result: Any) -> None:
        """Answer a call. Only for Call, which sees to it that this happens once."""
        self._last_piece(call)
        try:
            frame = codec.encode({"jsonrpc": "2.0", "id": call.id, "result": result}, self.encoding)
        except Exception as error:  # a result that cannot be encoded is a bug like any other, and must be answered
            wire = self._bug(call, error).to_wire()
            frame = codec.encode({"jsonrpc": "2.0", "id": call.id, "error": wire}, self.encoding)
        self._forget(call)
        self._send_frame(frame)

    def send_error(self, call: Call, error: RpcError) -> None:
        """Answer a call with an error. Only for Call."""
        self._last_piece(call)
        self._forget(call)
        self._send({"jsonrpc": "2.0", "id": call.id, "error": error.to_wire()})

    def stream_waits(self, call: Call) -> None:
        """A call has a piece to write."""
        self._streams[call] = None
        self.schedule_flush()

    def schedule_flush(self) -> None:
        """Write what waits, once everything that happens in this turn of the loop has been gathered."""
        if not (self._flush_scheduled or self._in_turn or self._paused):
            self._flush_scheduled = True
            self._loop.call_soon(self._scheduled_flush)

    def _scheduled_flush(self) -> None:
        self._flush_scheduled = False
        self._flush()

    def _send(self, message: dict[str, Any]) -> None:
        self._send_frame(codec.encode(message, self.encoding))

    def _send_frame(self, frame: bytes) -> None:
        if not self._open:
            return
        self._out.append(frame)
        self._out_bytes += len(frame)
        self.schedule_flush()

    def _refuse(self, request_id: int | str | None, reason: str) -> None:
        """Answer a frame that is no valid request.

        The id is null where it could not be read (JSON-RPC 2.0, section 5), and also where it belongs to a request
        under way: that one gets its own answer, and only one.
        """
        details = {} if request_id is None else {"id": request_id}
        if request_id in self._calls:
            request_id = None
        error = InvalidRequest(reason, **details)
        self._send({"jsonrpc": "2.0", "id": request_id, "error": error.to_wire()})

    def _last_piece(self, call: Call) -> None:
        """What a stream still holds goes out before its answer."""
        if call in self._streams:
            del self._streams[call]
            self._add_piece(call)

    def _add_piece(self, call: Call) -> None:
        piece = call.take_piece()
        while piece is not None and self._open:
            frame = codec.encode({"jsonrpc": "2.0", "method": "stream", "params": piece}, self.encoding)
            self._out.append(frame)
            self._out_bytes += len(frame)
            piece = call.take_piece() if call.more_pieces else None

    def _forget(self, call: Call) -> None:
        if self._calls.get(call.id) is call:
            del self._calls[call.id]
            if call.method.work:
                self.server.work_ends()

    def _flush(self) -> None:
        """Write answers, then stream pieces, then events, until the peer cannot take more."""
        if not self._open or self._paused:
            return
        if self._streams:
            calls = list(self._streams)
            self._streams.clear()
            for call in calls:
                self._add_piece(call)
        self._write_answers()
        if self.subscriptions:
            self._write_events()
        if self._calls or self._paused or not (self._ending or self._parting):
            return
        if self._ending:
            self._close()
        elif self._decoder.encoding is not None and not any(sub.waiting for sub in self.subscriptions.values()):
            self._say_goodbye()
            self._close()

    def _write_answers(self) -> None:
        if self._out and not self._paused:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._out_bytes = 0
            self._write(data)

    def _write_events(self) -> None:
        """One chunk of each subscription; where more waits, the other connections come first."""
        more = False
        for sub in list(self.subscriptions.values()):
            if self._paused or not self._open:
                return
            if sub.waiting:
                self._write(sub.take(self.server.limits.event_chunk_bytes))
                more = more or sub.waiting
        if more:
            self.schedule_flush()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    # --- the end --------------------------------------------------------------------------------------------------

    def _refuse_bytes(self, reason: str) -> None:
        """Bytes that are no frame: say so, and close. What was under way ends, since nobody can follow any more."""
        self.server.log.info("client_bytes_refused", client=self.client, reason=reason)
        for call in list(self._calls.values()):
            self._forget(call)
            call.detach()
        self._streams.clear()
        self._send({"jsonrpc": "2.0", "id": None, "error": ParseError(reason).to_wire()})
        self._close()

    def shut(self, error: RpcError) -> None:
        """The daemon ends: answer what is under way with `error`, write what there is, close."""
        if not self._open:
            return
        for call in list(self._calls.values()):
            self.send_error(call, error)
            call.detach()
        while not self._paused and any(sub.waiting for sub in self.subscriptions.values()):
            self._write_answers()
            self._write_events()
        if self._parting and self._decoder.encoding is not None:
            self._say_goodbye()
        self._close()

    def _say_goodbye(self) -> None:
        """All that was accepted is answered by now, so that whatever the client still waits for was not accepted, and
        may be asked again elsewhere. Without an id, as where a connection is refused."""
        self._send({"jsonrpc": "2.0", "id": None, "error": self.server.refused().to_wire()})

    def abort(self) -> None:
        """Close without waiting for the peer."""
        self._transport.abort()

    def _close(self) -> None:
        """Close once the kernel took what is written; a peer that does not read is cut off after `write_stall_s`."""
        if self._out and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
            self._out.clear()
        self._drop()
        self._transport.close()
        if self._transport.get_write_buffer_size() and not self._stall.running:
            self._stall.start(self._transport)

    def _stalled(self, unsent_bytes: int) -> None:
        limit = self.server.limits.write_stall_s
        self.server.log.warning("write_stalled", client=self.client, unsent_bytes=unsent_bytes, stalled_s=limit)
        self._transport.abort()

    def _drop(self) -> None:
        """Everything that this connection held ends now. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._out.clear()
        self._streams.clear()
        for sub in self.subscriptions.values():
            self.server.events.unsubscribe(sub)
        self.subscriptions.clear()
        for call in list(self._calls.values()):
            self._forget(call)
            try:
                call.detach()
            except Exception as error:  # the other calls must be cancelled whatever this one's does
                self._bug(call, error)
        self.server.session_closed(self)

    def _watch_half_closed(self) -> None:
        """No read tells any more that the peer left, so look: a request of somebody who left must not go on."""
        if not self._open:
            return
        sock: socket.socket = self._transport.get_extra_info("socket")
        if peer_gone(sock):
            self._transport.abort()
            return
        self._loop.call_later(_HALF_CLOSED_CHECK_S, self._watch_half_closed)

    def _bug(self, call: Call, error: BaseException) -> InternalError:
        """What went wrong is for the log; the client gets a reference to it."""
        reference = secrets.token_hex(4)
        self.server.log.error(
            "request_failed_by_bug",
            reference=reference,
            request=call.request_name,
            method=call.method.name,
            exc_info=(type(error), error, error.__traceback__),
        )
        return InternalError(
            f"something went wrong inside the daemon; its log has it as {reference}", reference=reference
        )
