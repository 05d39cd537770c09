"""The codec's law: any bytes, split anyhow, become messages, `Invalid` or ProtocolError, and never anything else."""

from __future__ import annotations

import itertools
import json
import random
import struct
import threading
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzing import codec_inputs
from fuzzing.codec_fuzzer import Law
from mlxd_client import codec
from mlxd_client.codec import Decoder, Encoding, Invalid, encode
from mlxd_client.errors import ProtocolError
from mlxd_client.types import MAX_INTEGER

LAW = Law(codec)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
MESSAGES = st.dictionaries(TEXT, VALUES, max_size=5)
ENCODINGS = st.sampled_from(list(Encoding))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(chunks: list[bytes], encoding: Encoding | None = None, **limits: int) -> list[Any]:
    """What a Decoder makes of the chunks; a ProtocolError ends the list as that class."""
    decoder, made = Decoder(encoding, **limits), []
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            for message in decoder:
                made.append(message)  # one by one: those before an error count
    except ProtocolError:
        made.append(ProtocolError)
    for message in made:
        assert message is ProtocolError or isinstance(message, dict | Invalid)
    return made


def nested(depth: int) -> bytes:
    """A msgpack map that nests `depth` containers in all."""
    return b"\x81\xa1a" + b"\x91" * (depth - 1) + b"\xc0"


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_in_any_split_keep_the_law_and_the_split_makes_no_difference(data: bytes, cuts: list[int]) -> None:
    assert read(split(data, cuts)) == read([data])


@given(st.binary(max_size=100), st.lists(st.integers(0, 200), max_size=5))
def test_any_body_in_a_sound_frame_keeps_the_law(body: bytes, cuts: list[int]) -> None:
    data = framed(body) + encode({"after": 1})
    made = read(split(data, cuts), Encoding.MSGPACK)
    assert made == read([data], Encoding.MSGPACK)
    assert made[-1] is ProtocolError or made[-1] == {"after": 1}


@given(st.binary(max_size=100), st.lists(st.integers(0, 200), max_size=5))
def test_any_line_keeps_the_law(line: bytes, cuts: list[int]) -> None:
    data = b"{" + line + b'\n{"after":1}\n'
    assert read(split(data, cuts)) == read([data])


@given(st.lists(MESSAGES, min_size=1, max_size=4), ENCODINGS, st.lists(st.integers(0, 4000), max_size=6))
def test_messages_come_back_as_they_went(messages: list[dict[str, Any]], encoding: Encoding, cuts: list[int]) -> None:
    data = b"".join(encode(message, encoding) for message in messages)
    if encoding is Encoding.JSON or data[0] != 0x7B:
        assert read(split(data, cuts)) == messages
    assert read([bytes([byte]) for byte in data[:500]], encoding) == read([data[:500]], encoding)


@given(MESSAGES)
def test_the_walk_finds_no_fault_with_what_is_sound(message: dict[str, Any]) -> None:
    assert codec._scan_msgpack(msgspec.msgpack.encode(message), 64) is None


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_the_quick_way_and_the_walk_agree(seed: int, mutations: int) -> None:
    draw = random.Random(seed)
    body = codec_inputs.mutated(draw, mutations) if seed % 2 else codec_inputs.grown(draw)
    assert LAW.judge(body, walk=False) == LAW.judge(body, walk=True)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_the_largest_frame_passes_and_the_next_does_not(encoding: Encoding) -> None:
    data = encode({"a": "x" * 100}, encoding)
    size = len(data) - (4 if encoding is Encoding.MSGPACK else 1)
    assert read([data], max_bytes=size) == [{"a": "x" * 100}]
    assert read([data], max_bytes=size - 1) == [ProtocolError]
    assert read([data[:40]], max_bytes=30) == [ProtocolError], "judged before the rest has come"


@pytest.mark.parametrize("depth", [63, 64, 65, 66, 1000, 60_000])
def test_the_deepest_frame_passes_and_the_next_does_not(depth: int) -> None:
    sound = depth <= 64
    (made,) = read([framed(nested(depth))])
    assert (made is not ProtocolError) is sound
    (made,) = read([b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n"])
    assert (made is not ProtocolError) is sound


def test_brackets_in_strings_are_not_depth() -> None:
    text = "[{" * 500 + '\\"' + "]" * 3
    for encoding in Encoding:
        assert read([encode({"a": text}, encoding)]) == [{"a": text}]


@pytest.mark.parametrize("depth", [64, 100, 50_000])
def test_a_small_thread_stack_is_enough(depth: int) -> None:
    made: list[Any] = []

    def work() -> None:
        made.extend(read([framed(nested(depth))]))
        made.extend(read([b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n"]))

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert len(made) == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x82\xa1a\x01\xa1a\x02", "same key twice"),
        (b"\x82\xa1a\x01\xd9\x01a\x02", "same key twice"),
        (b"\x82\xa2id\x07\xa1a\x82\xa1b\x01\xa1b\x01", "same key twice"),
        (b"\x81\x01\x02", "keys must be strings"),
        (b"\x81\xa1a\x81\x01\x02", "keys must be strings"),
        (b"\x81\xa1a\xcf\x00\x20\x00\x00\x00\x00\x00\x01", "2^53"),
        (b"\x81\xa1a\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", "finite"),
        (b"\x81\xa1a\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", "finite"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "extension"),
        (b"\x81\xa1a\xd4\x05\x00", "extension"),
        (b"\x93\x01\x02\x03", "batches"),
        (b"\x01", "a map"),
        (b"\xc0", "a map"),
    ],
)
def test_sound_frames_that_are_no_message(body: bytes, reason: str) -> None:
    (made,) = read([framed(body)])
    assert isinstance(made, Invalid)
    assert reason in made.reason
    assert read([framed(body) + encode({"a": 1})])[1] == {"a": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":1,"a":2}', "same key twice"),
        (b'{"a":1,"\\u0061":2}', "same key twice"),
        (b'{"a":9007199254740993}', "2^53"),
        (b'{"a":' + b"9" * 5000 + b"}", "2^53"),
        (b'{"a":1e999}', "finite"),
        (b'{"a":NaN}', "finite"),
        (b"[1]", "batches"),
        (b"7", "a map"),
    ],
)
def test_sound_lines_that_are_no_message(line: bytes, reason: str) -> None:
    (made,) = read([line + b"\n"], Encoding.JSON)
    assert isinstance(made, Invalid)
    assert reason in made.reason


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":"\n',
        b"{]",
        b"\xef\xbb\xbf{}",
        b'{"a":1}}',
        b'{"a\\',
        "{}".encode("utf-16-le"),
    ],
)
def test_lines_that_cannot_be_read(line: bytes) -> None:
    assert read([line + b"\n"], Encoding.JSON) == [ProtocolError]


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x81\xa1a", b"\x80\x80", b"\x81\xa1\xff\x01", b"\xdf\xff\xff\xff\xff"]
)
def test_frames_that_cannot_be_read(body: bytes) -> None:
    assert read([framed(body)]) == [ProtocolError]


@pytest.mark.parametrize(("id", "kept"), [(7, 7), ("x", "x"), (2.5, None), (None, None), (True, None), ([1], None)])
def test_an_invalid_message_keeps_its_id_where_it_has_one(id: Any, kept: Any) -> None:
    for encoding in Encoding:
        (made,) = read([encode({"id": id, "a": 2**60}, encoding)])
        assert isinstance(made, Invalid)
        assert made.id == kept
        assert made.id is not True


def test_a_frame_of_very_many_values_is_refused() -> None:
    many = codec.MAX_ELEMENTS + 1
    assert read([framed(b"\x81\xa1a\xdd" + struct.pack(">I", many) + b"\xc0" * many)]) == [ProtocolError]
    assert read([b'{"a":[' + b"1," * many + b"1]}\n"]) == [ProtocolError]


@pytest.mark.parametrize(
    "line",
    [
        b'{"' + b'\\"' * 500_000,
        b'{"' + b'\\"' * 500_000 + b"\\",
        b'{"a":"' + b"x" * 1_000_000,
        b"{" * 1_000_000,
        b'"' * 1_000_000,
        b'{"a":' + b"1" * 1_000_000,
        b'{"a":0.' + b"1" * 1_000_000 + b"}",
    ],
)
def test_no_line_of_a_megabyte_takes_long(line: bytes) -> None:
    began = time.process_time()
    read([line + b"\n"], Encoding.JSON)
    assert time.process_time() - began < 2.0, "linear work takes a twentieth of this"


def test_a_line_that_comes_byte_by_byte_takes_linear_time() -> None:
    decoder = Decoder(Encoding.JSON)
    began = time.process_time()
    for _ in range(200_000):
        decoder.feed(b" ")
        assert decoder.next() is None
    assert time.process_time() - began < 5.0


def test_json_that_json_writes_is_read() -> None:
    message = {"a": "é\u2028\U0001f600", "b": [1.5, -0.0, 1e-7], "c": {"": None}}
    assert read([json.dumps(message).encode() + b"\r\n\n  \n"]) == [message]
