"""Sans-IO framing: bytes in, messages out, and back. No sockets, no clocks.

The law: for any bytes, split in any way, `Decoder` yields messages (dict), `Invalid` (a sound frame that is no valid
message; the stream goes on) or raises ProtocolError (the stream is lost). Never another exception, and never more
memory or time than a fixed multiple of `max_bytes`.

Two encodings, told apart by the first byte of the stream: `{` starts JSON lines, anything else msgpack frames
(a 4-byte big-endian length, then one msgpack map; a length that starts with `{` would be over any limit).
"""

from __future__ import annotations

import enum
import json
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from .errors import ProtocolError
from .types import MAX_DEPTH, MAX_FRAME_BYTES, MAX_INTEGER

__all__ = ["Decoder", "Encoding", "Invalid", "encode"]

# A frame holds at most this many values: small values are tens of bytes each once decoded, so that 16 MiB of empty
# arrays would otherwise become a gigabyte.
MAX_ELEMENTS = 131_072
# Up to this size a frame cannot hold enough elements to matter, and is decoded before it is judged.
_SMALL = 65_536


class Encoding(enum.Enum):
    MSGPACK = "msgpack"
    JSON = "json"


class Invalid(NamedTuple):
    """A frame that was read whole but is no valid message; `id` is the request id, where one could be read."""

    reason: str
    id: int | str | None = None


_unpack_length = struct.Struct(">I").unpack_from
_msgpack_encode = msgspec.msgpack.Encoder().encode
_msgpack_decode = msgspec.msgpack.Decoder().decode
_json_encode = msgspec.json.Encoder().encode


def encode(message: Any, encoding: Encoding = Encoding.MSGPACK) -> bytes:
    """One message as the bytes of one frame. `message` is a dict or a msgspec Struct of plain values."""
    if encoding is Encoding.MSGPACK:
        body = _msgpack_encode(message)
        return len(body).to_bytes(4, "big") + body
    return _json_encode(message) + b"\n"


class Decoder:
    """Turns a byte stream into messages.

    Args:
        encoding: None decides by the stream's first byte.
        max_bytes: the largest frame body accepted; a larger one is refused by its length alone.
        max_depth: how deep maps and arrays may nest; judged before the body is decoded.
    """

    def __init__(
        self, encoding: Encoding | None = None, *, max_bytes: int = MAX_FRAME_BYTES, max_depth: int = MAX_DEPTH
    ) -> None:
        self.encoding = encoding
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._buffer = bytearray()
        self._scanned = 0  # JSON: bytes already searched for a newline, so that a slow line costs linear time

    @property
    def buffered(self) -> int:
        """Bytes received that belong to no complete frame yet."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[dict[str, Any] | Invalid]:
        """All messages that are complete. Raises ProtocolError where the stream cannot be read further."""
        while True:
            message = self.next()
            if message is None:
                return
            yield message

    def next(self) -> dict[str, Any] | Invalid | None:
        """The next complete message, or None until more bytes come."""
        if self.encoding is None:
            if not self._buffer:
                return None
            self.encoding = Encoding.JSON if self._buffer[0] == 0x7B else Encoding.MSGPACK
        return self._next_msgpack() if self.encoding is Encoding.MSGPACK else self._next_json()

    def _next_msgpack(self) -> dict[str, Any] | Invalid | None:
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        (size,) = _unpack_length(buffer)
        if size > self._max_bytes:
            raise ProtocolError(f"a frame of {size} bytes is over the limit of {self._max_bytes}")
        end = size + 4
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            body = bytes(view[4:end])
        del buffer[:end]
        return _decode_msgpack(body, self._max_depth)

    def _next_json(self) -> dict[str, Any] | Invalid | None:
        buffer = self._buffer
        while True:
            end = buffer.find(b"\n", self._scanned)
            if (end if end >= 0 else len(buffer)) > self._max_bytes:
                raise ProtocolError(f"a line is over the limit of {self._max_bytes} bytes")
            if end < 0:
                self._scanned = len(buffer)
                return None
            line = bytes(memoryview(buffer)[:end]).strip()
            del buffer[: end + 1]
            self._scanned = 0
            if line:
                return _decode_json(line, self._max_depth)


def _checked(message: Any, reason: str | None) -> dict[str, Any] | Invalid:
    """What every decoded frame passes through: the top level is a map, every value is in range."""
    if isinstance(message, list):
        return Invalid("batches are not supported; send the requests one after the other")
    if not isinstance(message, dict):
        return Invalid("a message is a map")
    reason = reason or _odd_value(message)
    if reason is None:
        return message
    request_id = message.get("id")
    sound = isinstance(request_id, str) or (type(request_id) is int and abs(request_id) <= MAX_INTEGER)
    return Invalid(reason, request_id if sound else None)


_STR = {str}
_PLAIN = {str, bool, type(None), bytes}


def _odd_value(message: dict[str, Any]) -> str | None:
    """The first value that no JSON-RPC message may hold, in words. The depth is bounded already, so a stack serves."""
    stack: list[Any] = [message]
    while stack:
        top = stack.pop()
        if type(top) is dict:
            if not _STR.issuperset(map(type, top)):
                return "map keys must be strings"
            values = top.values()
        else:
            values = top
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind is int:
                if not -MAX_INTEGER <= value <= MAX_INTEGER:
                    return "integers must lie within ±2^53"
            elif kind is float:
                if value - value != 0.0:
                    return "numbers must be finite"
            elif kind is dict or kind is list:
                if value:
                    stack.append(value)
            else:
                return "msgpack extension types are not supported"
    return None


# --- msgpack ------------------------------------------------------------------------------------------------------

_CONTAINERS = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])
_NOT_CONTAINERS = bytes(sorted(set(range(256)) - set(_CONTAINERS)))


def _decode_msgpack(body: bytes, max_depth: int) -> dict[str, Any] | Invalid:
    """Decode one body.

    Each level of nesting costs one container byte, so that counting those (in C) bounds the depth from above; only
    where that bound is too high, or the body large, is it walked in Python before it is decoded.
    """
    reason, size = None, len(body)
    scanned = size > _SMALL or (size > max_depth and len(body.translate(None, _NOT_CONTAINERS)) > max_depth)
    if scanned:
        reason = _scan_msgpack(body, max_depth)
    try:
        message = _msgpack_decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError, TypeError) as error:
        raise ProtocolError(f"a frame is no msgpack: {error}") from None
    # A map with a key twice decodes shorter than it came. Whatever re-encodes to the same bytes has none.
    if not scanned and not _same_bytes(message, body):
        reason = _scan_msgpack(body, max_depth)
    return _checked(message, reason)


def _same_bytes(message: Any, body: bytes) -> bool:
    try:
        return bool(_msgpack_encode(message) == body)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        return False


# Leading byte → how many bytes of value follow, for types of a fixed size.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4}
_FIXED |= {0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
# Leading byte → how many bytes of length follow, and how many more than that length the value takes.
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_SIZED |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
# Leading byte → how many bytes of count follow, and how many values each entry holds.
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _scan_msgpack(body: bytes, max_depth: int) -> str | None:
    """Walk the body without building it. Raises ProtocolError where it is unsound or too deep.

    Returns: why it is no valid message (a key twice, a key that is no string), or None.
    """
    at, size, elements, reason = 0, len(body), 0, None
    # One level: [values still to come, keys seen or None for an array, whether the next value is a key]
    levels: list[list[Any]] = [[1, None, False]]
    while levels:
        level = levels[-1]
        if level[0] == 0:
            levels.pop()
            continue
        if at >= size:
            raise ProtocolError("a frame ends inside a value")
        elements += 1
        if elements > MAX_ELEMENTS:
            raise ProtocolError(f"a frame holds more than {MAX_ELEMENTS} values")
        head, start = body[at], at
        after, count, pairs = _skip(body, at)
        level[0] -= 1
        if level[1] is not None:
            level[2] = not level[2]
            if level[2]:  # this value is a key
                if not (0xA0 <= head <= 0xBF or 0xD9 <= head <= 0xDB):
                    reason = reason or "map keys must be strings"
                key = _string_body(body, start, after)
                if key in level[1]:
                    reason = reason or "a map holds the same key twice"
                level[1].add(key)
        at = after
        if count is not None:
            if len(levels) > max_depth:
                raise ProtocolError(f"a frame nests deeper than {max_depth}")
            levels.append([count, set() if pairs else None, False])
    if at != size:
        raise ProtocolError("a frame holds bytes after its value")
    return reason


def _skip(body: bytes, at: int) -> tuple[int, int | None, bool]:
    """Where the value's own bytes end; for a container also how many values follow, and whether it is a map."""
    head = body[at]
    if head <= 0x7F or head >= 0xE0:
        return at + 1, None, False
    if head <= 0x8F:
        return at + 1, 2 * (head & 0x0F), True
    if head <= 0x9F:
        return at + 1, head & 0x0F, False
    if head <= 0xBF:
        return _within(body, at + 1 + (head & 0x1F)), None, False
    if head in _FIXED:
        return _within(body, at + 1 + _FIXED[head]), None, False
    if head in _SIZED:
        width, extra = _SIZED[head]
        start = _within(body, at + 1 + width)
        return _within(body, start + int.from_bytes(body[at + 1 : start], "big") + extra), None, False
    if head in _COUNTED:
        width, per = _COUNTED[head]
        start = _within(body, at + 1 + width)
        return start, per * int.from_bytes(body[at + 1 : start], "big"), per == 2
    raise ProtocolError("a frame is no msgpack: the byte 0xc1")


def _within(body: bytes, end: int) -> int:
    if end > len(body):
        raise ProtocolError("a frame ends inside a value")
    return end


def _string_body(body: bytes, start: int, end: int) -> bytes:
    """A key's content without its header, since the same text can be headed in several ways."""
    head = body[start]
    return body[start + (1 if 0xA0 <= head <= 0xBF else 1 + _SIZED.get(head, (0, 0))[0]) : end]


# --- JSON lines ---------------------------------------------------------------------------------------------------

# Also a string that the line cuts off: else the search would begin anew at each quote in it, in quadratic time.
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_JSON_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b"{}[]")))


def _decode_json(line: bytes, max_depth: int) -> dict[str, Any] | Invalid:
    """Decode one line with the standard library's parser, whose hooks see each pair and each number."""
    bare = _JSON_STRING.sub(b'""', line)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_ELEMENTS:
        raise ProtocolError(f"a line holds more than {MAX_ELEMENTS} values")
    _check_json_depth(bare, max_depth)
    odd: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            odd.append("a map holds the same key twice")
        return made

    def integer(text: str) -> int:
        return int(text) if len(text) < 20 else MAX_INTEGER + 1

    try:
        # Decoded here: given bytes, json guesses at UTF-16 and UTF-32, in which brackets hide from the scan above.
        message = json.loads(line.decode(), object_pairs_hook=pairs, parse_int=integer)
        if b"\\u" in line:  # an escape may spell half of a surrogate pair, which is no text
            json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ProtocolError("a line holds text that is no Unicode") from None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a line is no JSON: {error}") from None
    return _checked(message, odd[0] if odd else None)


def _check_json_depth(bare: bytes, max_depth: int) -> None:
    """`bare` is the line with its strings emptied: only brackets decide its depth."""
    depth = 0
    for byte in bare.translate(None, _JSON_NOT_STRUCTURE):
        depth += 1 if byte in b"{[" else -1
        if depth > max_depth:
            raise ProtocolError(f"a line nests deeper than {max_depth}")
