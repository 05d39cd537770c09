"""The client's half of the protocol, sans-IO: ids, pending calls, replies, streams, events. No sockets, no clock.

A shell asks a Session for the bytes to send, hands it the bytes that came, and is told which calls have news. The same
Session serves both shells; it is not locked, and belongs to one connection: ids and subscriptions end with it.
"""

from __future__ import annotations

import copy
from collections import deque
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from .codec import Decoder, Encoding, Invalid, encode
from .errors import ConnectionLost, InvalidParams, InvalidRequest, MlxdError, ProtocolError, ShuttingDown, from_wire
from .types import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    CancelParams,
    ClientInfo,
    Event,
    HelloParams,
    HelloResult,
    Since,
    Snapshot,
    Stream,
    SubscribeParams,
    SubscribeResult,
)

__all__ = ["MOST_MOVES", "Call", "Cursor", "Session", "Subscription", "fresh"]

T = TypeVar("T")

# A stream's consumer may be slow: beyond this many waiting pieces, new text is joined to the last, up to this length.
_MOST_PIECES = 1024
_MOST_JOINED = 4096
_MOST_ANSWERS = 16
# Daemons that may take over one after the other while one request is being asked.
MOST_MOVES = 5


def fresh(error: MlxdError) -> MlxdError:
    """A copy to raise: one failure ends many calls, and an exception raised twice mixes up its tracebacks."""
    return copy.copy(error).with_traceback(None)


class Call(Generic[T]):
    """One request until its response.

    Attributes:
        done: whether `outcome` has something to say.
        pieces: `stream` notifications not taken yet, in order.
        waiter: the shell's, to wake whoever waits.
    """

    __slots__ = ("done", "error", "id", "method", "next_seq", "pieces", "result", "result_type", "waiter")

    def __init__(self, id: int, method: str, result_type: Any) -> None:
        self.id = id
        self.method = method
        self.result_type = result_type
        self.done = False
        self.result: T | None = None
        self.error: MlxdError | None = None
        self.pieces: deque[Stream] = deque()
        self.next_seq = 0
        self.waiter: Any = None

    @property
    def news(self) -> bool:
        """Whether a stream's consumer has something to take: a piece, or the end."""
        return self.done or bool(self.pieces)

    @property
    def moved(self) -> bool:
        """Whether nothing was done of it, and a new connection finds the daemon that does it."""
        return self.done and isinstance(self.error, ShuttingDown) and self.error.reconnect

    def outcome(self) -> T:
        """The typed result of a call that is done. Raises what the daemon, or the connection's end, made of it."""
        if self.error is not None:
            raise fresh(self.error)
        return self.result  # type: ignore[return-value]

    def add(self, piece: Stream) -> None:
        if piece.seq != self.next_seq:
            raise ProtocolError(f"a stream skipped from piece {self.next_seq - 1} to {piece.seq}")
        self.next_seq += 1
        if len(self.pieces) >= _MOST_PIECES and _only_text(piece):
            # Pieces of several answers come in turns.
            last = next((one for one in islice(reversed(self.pieces), _MOST_ANSWERS) if one.index == piece.index), None)
            if last is not None and _only_text(last) and len(last.text or "") < _MOST_JOINED:
                last.text = (last.text or "") + (piece.text or "")
                return
        self.pieces.append(piece)


class Subscription(Call[SubscribeResult]):
    """An `events.subscribe` request, and after its response the events that belong to it."""

    __slots__ = ("events", "rev")

    def __init__(self, id: int, method: str, result_type: Any) -> None:
        super().__init__(id, method, result_type)
        self.events: deque[Event] = deque()
        self.rev = -1

    @property
    def news(self) -> bool:
        return self.error is not None or bool(self.events)


def _only_text(piece: Stream) -> bool:
    other = piece.reasoning or piece.tool_calls or piece.malformed_tool_calls or piece.phase
    return piece.text is not None and other is None


class Session:
    """One connection's protocol state.

    Args:
        name, version: the client, as `hello` introduces it.
        encoding: of the connection; the daemon answers in the same.

    Attributes:
        hello: the daemon's introduction, once it came.
        closed: why the connection is of no more use, or None while it is.
    """

    def __init__(self, name: str, version: str = "", encoding: Encoding = Encoding.MSGPACK) -> None:
        self._encoding = encoding
        self._decoder = Decoder(encoding)
        self._last_id = 0
        self._pending: dict[int | str, Call[Any]] = {}
        self._subscriptions: dict[int, Subscription] = {}
        self.greeting: Call[HelloResult] = Call(0, "hello", HelloResult)
        self._hello_params = HelloParams(
            protocol=(PROTOCOL, PROTOCOL), client=ClientInfo(name=name or "client", version=version)
        )
        self._greeted = False
        self.hello: HelloResult | None = None
        self.closed: MlxdError | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is awaited from the daemon."""
        return bool(self._pending or self._subscriptions)

    # --- out ------------------------------------------------------------------------------------------------------

    def greet(self) -> bytes:
        """The bytes of `hello`, which come first on a connection; empty where they were sent already."""
        if self._greeted:
            return b""
        self._greeted = True
        self._pending[0] = self.greeting
        return self._frame(0, "hello", self._hello_params)

    def start(self, method: str, params: Any, result_type: Any = Any) -> tuple[Call[Any], bytes]:
        """A new request and the bytes to send, `hello` before them where it has not been said.

        Args:
            params: a Params struct or a dict of plain values; None for a method without any.
            result_type: what the result is converted to.

        Raises:
            InvalidParams, InvalidRequest: the params cannot be encoded, or are larger than a frame may be.
            MlxdError: the connection has ended; see `closed`.
        """
        return self._start(Call(self._next_id(), method, result_type), params)

    def subscribe(self, params: SubscribeParams) -> tuple[Subscription, bytes]:
        """An `events.subscribe` request; its events arrive in it from the response on, none is missed between."""
        call = Subscription(self._next_id(), "events.subscribe", SubscribeResult)
        return call, self._start(call, params)[1]

    def cancel(self, call: Call[Any]) -> bytes:
        """The bytes that ask the daemon to cancel `call`; empty where that makes no sense any more."""
        if call.done or self.closed is not None:
            return b""
        return self._frame(self._next_id(), "cancel", CancelParams(id=call.id))

    def forget(self, call: Call[Any]) -> None:
        """Nobody waits for `call` any more: its response, should one come, is dropped."""
        self._pending.pop(call.id, None)

    def _next_id(self) -> int:
        if self.closed is not None:
            raise fresh(self.closed)
        self._last_id += 1
        return self._last_id

    def _start(self, call: Call[Any], params: Any) -> tuple[Call[Any], bytes]:
        data = self._frame(call.id, call.method, params)
        self._pending[call.id] = call
        return call, data if self._greeted else self.greet() + data

    def _frame(self, id: int, method: str, params: Any) -> bytes:
        message: dict[str, Any] = {"jsonrpc": "2.0", "id": id, "method": method}
        if params is not None:
            message["params"] = params
        try:
            data = encode(message, self._encoding)
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise InvalidParams(f"the params of `{method}` cannot be sent: {error}") from error
        limit = self.hello.limits.frame_bytes if self.hello is not None else MAX_FRAME_BYTES
        if len(data) > limit:
            raise InvalidRequest(f"`{method}` takes {len(data)} bytes, {limit} is the limit", limit_bytes=limit)
        return data

    # --- in -------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes | bytearray | memoryview) -> list[Call[Any]]:
        """Take what came from the socket. Returns the calls that have news; `closed` says if it was the last."""
        if self.closed is not None:
            return []
        touched: list[Call[Any]] = []
        self._decoder.feed(data)
        try:
            for message in self._decoder:
                self._take(message, touched)
        except MlxdError as error:
            touched += self.lost(error)
        return touched

    def lost(self, error: MlxdError | None = None) -> list[Call[Any]]:
        """The connection ended: every call that is pending, and every subscription, ends with it.

        Args:
            error: why; None for an end of file, which is ConnectionLost.
        """
        if self.closed is not None:
            return []
        self.closed = error or ConnectionLost("mlxd closed the connection")
        ended = [*self._pending.values(), *self._subscriptions.values()]
        self._pending.clear()
        self._subscriptions.clear()
        for call in ended:
            call.error, call.done = self.closed, True
        return ended

    def _take(self, message: dict[str, Any] | Invalid, touched: list[Call[Any]]) -> None:
        if isinstance(message, Invalid):
            call = self._pending.pop(message.id, None) if message.id is not None else None
            if call is None:
                raise ProtocolError(f"mlxd sent no valid message: {message.reason}")
            self._fail(call, ProtocolError(f"the answer to `{call.method}` is not valid: {message.reason}"))
            touched.append(call)
            return
        method = message.get("method")
        if method is None:
            self._response(message, touched)
        elif method == "stream":
            self._stream(message.get("params"), touched)
        elif method == "event":
            self._event(message.get("params"), touched)
        # Any other method comes from a newer daemon, to clients that know it.

    def _response(self, message: dict[str, Any], touched: list[Call[Any]]) -> None:
        id, error = message.get("id"), message.get("error")
        if id is None:  # the daemon could not tell which request it refuses, or refuses the connection
            raise from_wire(error) if isinstance(error, dict) else ProtocolError("mlxd sent a message without id")
        call = self._pending.pop(id, None) if type(id) in (int, str) else None
        if call is None:  # a late answer to what was given up, or to `cancel`
            return
        touched.append(call)
        if error is not None:
            self._fail(call, from_wire(error if isinstance(error, dict) else {}))
        elif "result" not in message:
            self._fail(call, ProtocolError(f"the answer to `{call.method}` holds neither a result nor an error"))
        else:
            self._succeed(call, message["result"])

    def _succeed(self, call: Call[Any], result: Any) -> None:
        try:
            call.result = result if call.result_type is Any else msgspec.convert(result, call.result_type)
        except (msgspec.ValidationError, RecursionError) as error:
            self._fail(call, ProtocolError(f"the answer to `{call.method}` is not what it should be: {error}"))
            return
        call.done = True
        if call is self.greeting:
            self.hello = self.greeting.result
        elif isinstance(call, Subscription) and call.result is not None:
            call.rev = call.result.rev
            self._subscriptions[call.result.subscription] = call

    def _fail(self, call: Call[Any], error: MlxdError) -> None:
        call.error, call.done = error, True
        if call is self.greeting:  # without a common protocol nothing else can be understood
            raise error

    def _stream(self, params: Any, touched: list[Call[Any]]) -> None:
        piece = _typed(params, Stream)
        call = self._pending.get(piece.id)
        if call is not None:
            call.add(piece)
            touched.append(call)

    def _event(self, params: Any, touched: list[Call[Any]]) -> None:
        event = _typed(params, Event)
        call = self._subscriptions.get(event.subscription)
        if call is not None and event.rev > call.rev:
            call.rev = event.rev
            call.events.append(event)
            touched.append(call)


def _typed(params: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(params, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(f"mlxd sent no valid {kind.__name__.lower()} notification: {error}") from None


class Cursor:
    """What an event stream remembers across connections: what it asked for, and how far it came.

    Attributes:
        epoch, rev: the position: the next event has a higher rev, or another epoch.
        snapshot: the last whole state that came; None if the position that the caller gave was honoured so far.
    """

    def __init__(
        self, topics: list[str] | None = None, models: list[str] | None = None, since: tuple[str, int] | None = None
    ) -> None:
        self._topics: list[str] | UnsetType = UNSET if topics is None else topics
        self._models: list[str] | UnsetType = UNSET if models is None else models
        self._since = since
        self.epoch, self.rev = since or ("", 0)
        self.snapshot: Snapshot | None = None

    def params(self) -> SubscribeParams:
        since = Since(epoch=self.epoch, rev=self.rev) if self._since else UNSET
        return SubscribeParams(topics=self._topics, models=self._models, since=since)

    def subscribed(self, result: SubscribeResult, at: float) -> Event | None:
        """Take the answer to `params`. Returns the `resync` event where a position was given but not honoured.

        Args:
            at: now, in Unix seconds, which becomes the event's time.
        """
        resumed, self._since = self._since is not None, (result.epoch, result.rev)
        self.epoch, self.rev = result.epoch, result.rev
        if result.snapshot is None:
            return None
        self.snapshot = result.snapshot
        if not resumed:
            return None
        return Event(subscription=result.subscription, rev=result.rev, name="resync", at=at, snapshot=result.snapshot)

    @staticmethod
    def again(error: MlxdError) -> bool:
        """Whether a subscription that was refused with `error` is to be asked for anew, of the daemon that comes after:
        unlike other requests, it may be where its connection ended, since asking does nothing."""
        return isinstance(error, ConnectionLost) or (isinstance(error, ShuttingDown) and error.reconnect)

    def passed(self, event: Event) -> None:
        """`event` is about to be handed to the caller: it will not be asked for again."""
        self.rev = event.rev
        if event.snapshot is not None:
            self.snapshot = event.snapshot
