"""What the codec is fed with: frames and lines that were sound before they were changed, and what breaks parsers."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec

__all__ = ["Stream", "body_of", "changed", "grown", "grown_line", "invented", "mutated", "mutated_bytes"]

MESSAGES: list[dict[str, Any]] = [
    {"jsonrpc": "2.0", "id": 1, "method": "ping"},
    {"jsonrpc": "2.0", "id": "a", "method": "process", "params": {"prompt": "um so é \U0001f600", "top_p": 0.5}},
    {"jsonrpc": "2.0", "id": 2**31, "method": "chat", "params": {"messages": [{"role": "user", "content": "[{" * 9}]}},
    {"jsonrpc": "2.0", "method": "stream", "params": {"id": 3, "seq": 200, "text": " word", "progress": 1e-9}},
    {"jsonrpc": "2.0", "id": -5, "error": {"code": -32600, "message": "no", "data": {"kind": "x", "details": {}}}},
    {
        "id": None,
        "a": [[], {}, [[[[]]]], {"b": {"c": [True, False, None]}}],
        "bias": {str(n): n * 1.5 for n in range(9)},
    },
]
BODIES = [msgspec.msgpack.encode(message) for message in MESSAGES]
LINES = [json.dumps(message, ensure_ascii=n % 2 == 0).encode() for n, message in enumerate(MESSAGES)]

# What breaks parsers: headers of every type at their limits, numbers at theirs, keys that are none, text that is none.
NUMBERS = [
    b"\xcf\x00\x20\x00\x00\x00\x00\x00\x01",
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\xca\x3f\x80\x00\x00",
    b"\xd6\xff\x00\x00\x00\x00",
]
PIECES = [
    *NUMBERS,
    *(bytes([head]) for head in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xC3, 0xD4, 0xE0, 0xFF, 0x7F)),
    *(
        bytes([head]) + b"\xff" * width
        for head, width in ((0xC4, 1), (0xC6, 4), (0xC9, 4), (0xDB, 4), (0xDD, 4), (0xDF, 4))
    ),
    b"\xa2id",
    b"\xd9\x02id",
    b"\xa2\xc3\x28",
    b"\xa3\xed\xa0\x80",
    b"\x81\x90\xc0",
    b"\x91" * 70,
    b"\x81\xa1a" * 70,
]
SCRAPS = [*(bytes([c]) for c in b'{}[]",:\\\n\r \x00\xff'), b"\\ud800", b"\\u0061", b"1e999", b"NaN", b"-", b"9" * 30]
SCRAPS += [b'"a":1,"a":2', b"[" * 70, b"true", b"nul", b'"\\', b"\xef\xbb\xbf", b"0" * 5]


# A stream that grows from run to run would only be slower.
MOST_BYTES = 4096


class Stream(msgspec.Struct, frozen=True):
    """One input: bodies with the sizes that their frames claim, or lines, whose size nobody says."""

    line: bool
    bodies: list[tuple[int, bytes]]

    def parts(self) -> list[bytes]:
        """Its bytes, frame by frame."""
        if self.line:
            return [body + b"\n" for _, body in self.bodies]
        return [size.to_bytes(4, "big") + body for size, body in self.bodies]


def invented(draw: random.Random) -> Stream:
    """A stream that comes from no other."""
    line = draw.random() < 0.4
    return Stream(line, [_framed(draw, body_of(draw, line)) for _ in range(draw.choice((1, 1, 1, 2, 3)))])


def changed(draw: random.Random, stream: Stream, other: Stream) -> Stream:
    """A stream with some of its bodies changed, or with some of another's."""
    bodies = list(stream.bodies)
    at = draw.randrange(len(bodies))
    match draw.randrange(6):
        case 0 if stream.line == other.line and len(bodies) < 8:
            bodies[at:at] = other.bodies[: draw.randrange(1, 4)]
        case 1 if len(bodies) > 1:
            del bodies[at]
        case _:
            body = mutated_bytes(draw, bytearray(bodies[at][1]), draw.choice((1, 1, 2, 4, 8)), stream.line)
            bodies[at] = _framed(draw, body[:MOST_BYTES])
    return Stream(stream.line, bodies)


def _framed(draw: random.Random, body: bytes) -> tuple[int, bytes]:
    size = len(body)
    return (size if draw.random() < 0.95 else draw.choice((0, size + 1, 2**24, 2**24 + 1, 2**32 - 1))), body


def mutated(draw: random.Random, mutations: int, *, line: bool = False) -> bytes:
    """A body (or a JSON line) that was sound before `mutations` changes."""
    return mutated_bytes(draw, bytearray(draw.choice(LINES if line else BODIES)), mutations, line)


def mutated_bytes(draw: random.Random, body: bytearray, mutations: int, line: bool) -> bytes:
    bodies, pieces = (LINES, SCRAPS) if line else (BODIES, PIECES)
    for _ in range(mutations):
        at = draw.randrange(len(body) + 1)
        match draw.randrange(7):
            case 0 if at < len(body):
                body[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(body):
                body[at] = draw.randrange(256)
            case 2:
                body[at:at] = draw.choice(pieces)
            case 3:
                body[at : at + 1] = draw.choice(pieces)
            case 4:
                del body[at : at + draw.randrange(1, 9)]
            case 5:
                body[at:at] = body[draw.randrange(len(body) + 1) :][: draw.randrange(1, 40)]
            case 6:
                other = draw.choice(bodies)
                body[at:] = other[draw.randrange(len(other)) :]
    return bytes(body)


def grown(draw: random.Random, depth: int = 0) -> bytes:
    """A well-formed msgpack value in any spelling: long headers, odd keys, keys twice, extensions, large numbers."""
    kind = draw.randrange(8 if depth < 5 else 6) if depth else 7
    if kind < 2:
        return draw.choice((b"\xc0", b"\xc2", b"\xc3", b"\x07", b"\xd0\x05", b"\xcf" + bytes(7) + b"\x01", *NUMBERS))
    if kind == 2:
        return b"\xc4\x02\xff\xfe" if draw.random() < 0.2 else b"\xcb" + draw.randbytes(8)
    if kind < 6:
        text = draw.choice((b"id", b"a", b"", b"params", "é".encode()))
        return (
            draw.choice((bytes([0xA0 + len(text)]), b"\xd9" + bytes([len(text)]), b"\xda\x00" + bytes([len(text)])))
            + text
        )
    count = draw.randrange(4)
    if kind == 6:
        head = draw.choice((bytes([0x90 + count]), b"\xdc\x00" + bytes([count]), b"\xdd" + bytes(3) + bytes([count])))
        return head + b"".join(grown(draw, depth + 1) for _ in range(count))
    head = draw.choice((bytes([0x80 + count]), b"\xde\x00" + bytes([count])))
    keys = [b"\xa2id", b"\xa1a", b"\xa1b", b"\xa1c"] if draw.random() < 0.6 else [grown(draw, 5) for _ in range(4)]
    return head + b"".join(keys[n] + grown(draw, depth + 1) for n in range(count))


def grown_line(draw: random.Random, depth: int = 0) -> str:
    """A well-formed JSON value, likewise."""
    kind = draw.randrange(6 if depth < 5 else 4) if depth else 5
    if kind < 2:
        return draw.choice(("null", "true", "1.5", "-0", "9007199254740993", "1e999", "NaN", "1E-9"))
    if kind < 4:
        return draw.choice(('""', '"id"', '"\\u0061"', '"\\ud83d\\ude00"', '"[{\\""', '"\\ud800"'))
    count = draw.randrange(4)
    if kind == 4:
        return "[" + ",".join(grown_line(draw, depth + 1) for _ in range(count)) + "]"
    keys = draw.choice((['"id"', '"a"', '"b"', '"c"'], ['"a"', '"id"', '"\\u0061"', '"a"']))
    return "{" + ", ".join(f"{keys[n]} : {grown_line(draw, depth + 1)}" for n in range(count)) + "}"


def body_of(draw: random.Random, line: bool) -> bytes:
    if draw.random() < 0.5:
        return grown_line(draw).encode() if line else grown(draw)
    return mutated(draw, draw.choice((0, 1, 1, 2, 3, 8)), line=line)
