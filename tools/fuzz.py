"""A fuzzer of the codec: sound frames, mutated by structure and by chance, judged by the codec's law.

    python tools/fuzz.py [EXECUTIONS] [--seed N]
    python tools/fuzz.py --engine [RUNS] [--seed N]      requests of every kind mixed; see tests/support/mix.py

Every execution feeds one mutated stream to a Decoder in a random split. A finding is an exception that is not
ProtocolError, a message that is neither a dict nor Invalid, an answer that depends on the split, a message that breaks
a limit, or a verdict in which the quick way and the full walk of a frame differ. Exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mlxd_client import codec
from mlxd_client.codec import Decoder, Encoding, Invalid, encode
from mlxd_client.errors import ProtocolError
from mlxd_client.types import MAX_DEPTH, MAX_INTEGER

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


def mutated(draw: random.Random, mutations: int, *, line: bool = False) -> bytes:
    """A body (or a JSON line) that was sound before `mutations` changes."""
    bodies, pieces = (LINES, SCRAPS) if line else (BODIES, PIECES)
    body = bytearray(draw.choice(bodies))
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


def judge(body: bytes, *, walk: bool) -> Any:
    """The verdict on one msgpack body, walked in Python first or not; comparable."""
    small = codec._SMALL
    try:
        codec._SMALL = -1 if walk else small
        made = codec._decode_msgpack(body, MAX_DEPTH)
    except ProtocolError:
        return "ProtocolError"
    finally:
        codec._SMALL = small
    # Of several faults either way may name another first.
    return ("Invalid", made.id) if isinstance(made, Invalid) else repr(made)


@dataclass
class Report:
    executions: int = 0
    seconds: float = 0.0
    messages: int = 0
    invalid: int = 0
    errors: int = 0
    findings: list[str] = field(default_factory=list)


def run(executions: int, seed: int = 0) -> Report:
    """Fuzz. Deterministic by `seed`."""
    draw, report = random.Random(seed), Report()
    began = time.perf_counter()
    for _ in range(executions):
        _once(draw, report)
    report.executions, report.seconds = executions, time.perf_counter() - began
    return report


def _once(draw: random.Random, report: Report) -> None:
    line = draw.random() < 0.4
    count, parts = draw.choice((1, 1, 1, 2, 3)), []
    for _ in range(count):
        body = body_of(draw, line)
        if line:
            parts.append(body + b"\n")
            continue
        size = len(body) if draw.random() < 0.95 else draw.choice((0, len(body) + 1, 2**24, 2**24 + 1, 2**32 - 1))
        parts.append(size.to_bytes(4, "big") + body)
        if judge(body, walk=False) != judge(body, walk=True):
            report.findings.append(f"the quick way and the walk differ: {body!r}")
    data = b"".join(parts)
    encoding = Encoding.JSON if line else Encoding.MSGPACK
    try:
        whole = _read([data], encoding)
        edges = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(4)))
        pieces = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
        if repr(_read(pieces, encoding)) != repr(whole):
            report.findings.append(f"the split {edges} matters: {data!r}")
    except Exception as error:  # whatever it is, it is what the fuzzer looks for
        report.findings.append(f"{type(error).__name__}: {error}: {data!r}")
        return
    for message in whole:
        if message is ProtocolError:
            report.errors += 1
        elif isinstance(message, Invalid):
            report.invalid += 1
        elif isinstance(message, dict) and _sound(message, 1):
            report.messages += 1
            if _read([encode(message, encoding)], encoding) != [message]:
                report.findings.append(f"does not come back: {message!r}")
        else:
            report.findings.append(f"is no message: {message!r}")


def _read(chunks: list[bytes], encoding: Encoding) -> list[Any]:
    decoder, made = Decoder(encoding), []
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            for message in decoder:
                made.append(message)  # one by one: those before an error count
    except ProtocolError:
        made.append(ProtocolError)
    return made


def _sound(value: Any, depth: int) -> bool:
    """The limits of a message, said again in the plainest way."""
    if isinstance(value, dict):
        return depth <= MAX_DEPTH and all(type(k) is str and _sound(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth <= MAX_DEPTH and all(_sound(v, depth + 1) for v in value)
    if type(value) is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER
    if type(value) is float:
        return value - value == 0.0
    return value is None or type(value) in (str, bool, bytes)


def mix(runs: int, seed: int) -> int:
    """Run mixes of 60 requests each, by seeds from `seed` on. Returns the exit status."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from support.mix import Mix, Models

    findings = 0
    with tempfile.TemporaryDirectory(prefix="mlxd-mix-") as folder:
        models = Models(Path(folder))
        for number in range(seed, seed + runs):
            began = time.perf_counter()
            try:
                told = dict(Mix(models, number).run(60))
                print(f"seed {number}: {time.perf_counter() - began:.1f} s, {told}", flush=True)
            except AssertionError as error:
                findings += 1
                print("FINDING", error, flush=True)
    print(f"{findings} findings")
    return 1 if findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the codec, or the engine.")
    parser.add_argument("executions", nargs="?", type=int, help="1,000,000, or 20 of --engine, where it is not said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="store_true", help="mix requests of every kind on a tiny model")
    arguments = parser.parse_args()
    if arguments.engine:
        return mix(arguments.executions or 20, arguments.seed)
    arguments.executions = arguments.executions or 1_000_000
    report = run(arguments.executions, arguments.seed)
    rate = report.executions / max(report.seconds, 1e-9)
    print(f"{report.executions:,} executions in {report.seconds:.1f} s ({rate:,.0f}/s), seed {arguments.seed}")
    print(f"{report.messages:,} messages, {report.invalid:,} invalid, {report.errors:,} protocol errors")
    for finding in report.findings[:20]:
        print("FINDING", finding)
    print(f"{len(report.findings)} findings")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
