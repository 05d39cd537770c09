"""A minute of each fuzzer that is guided by coverage; `python3 tools/dev.py fuzz` is the longer form."""

from __future__ import annotations

import random
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzzing import codec_fuzzer, codec_inputs, covering, session_fuzzer, talks
from mlxd_client.codec import encode

MINUTE_S = 60.0


@pytest.mark.slow
def test_a_minute_of_the_codec_finds_nothing() -> None:
    report = codec_fuzzer.fuzz(None, seed=7, seconds=MINUTE_S)
    assert report.findings == []
    assert report.blocks > 0.85 * report.all_blocks, "it does not get far into the codec"
    assert min(report.messages, report.invalid, report.errors) > report.executions / 20


@pytest.mark.slow
def test_a_minute_of_a_live_session_finds_nothing() -> None:
    report = session_fuzzer.fuzz(None, seed=7, seconds=MINUTE_S)
    assert report.findings == []
    assert report.kept > 10
    assert {"parse_error", "invalid_request", "invalid_params", "not_found"} < report.refusals.keys()


def raises(body: bytes, max_depth: int) -> None:
    raise KeyError(body)


@pytest.mark.parametrize(("name", "broken"), [("_odd_value", lambda message: None), ("_decode_msgpack", raises)])
def test_the_codecs_fuzzer_sees_a_broken_codec(name: str, broken: Callable[..., None]) -> None:
    """One that lets through what the wire does not carry, and one that raises what it may not."""
    codec, _ = covering.copied("mlxd_client.codec", bytearray(256))
    setattr(codec, name, broken)
    law, report, draw = codec_fuzzer.Law(codec), codec_fuzzer.Report(), random.Random(1)
    for _ in range(500):
        law.check(codec_inputs.invented(draw), draw, report)
    assert report.findings


def answers(*messages: dict[str, Any]) -> bytes:
    return b"".join(encode({"jsonrpc": "2.0"} | message) for message in messages)


BUG = {"code": -32603, "message": "oh", "data": {"kind": "internal_error"}}


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        (answers({"id": 1, "result": {}}), ""),
        (answers({"id": 1, "result": {}}, {"id": 1, "result": {}}), "2 answers to 1 requests"),
        (answers({"id": 2, "result": {}}), "1 answers to 0 requests"),
        (answers({"id": None, "result": {}}, {"id": 1, "result": {}}), "2 answers where there are 1 requests"),
        (answers({"id": 1, "error": BUG}), "internal_error"),
        (b"\xff" * 8, "over the limit"),
    ],
)
def test_the_sessions_fuzzer_sees_a_wrong_answer(told: bytes, wrong: str) -> None:
    talk = talks.Talk([talks.Line(json=False, frames=[{"jsonrpc": "2.0", "id": 1, "method": "ping"}])])
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(1)

        def serve() -> None:
            with listener.accept()[0] as served:
                served.sendall(told)
                served.recv(65_536)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            session_fuzzer.play(Path(folder, "s"), talk, random.Random(1))
            found = ""
        except session_fuzzer.Wrong as error:
            found = str(error)
        thread.join()
    assert wrong in found
    assert bool(wrong) is bool(found)
