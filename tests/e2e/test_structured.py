"""Schemas and grammars through the daemon: the value, the stream, the refusals, and who else is served meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlxd_client import Client
from mlxd_client.errors import InvalidParams, RpcError, Unsupported
from support.daemon import Daemon

pytestmark = pytest.mark.model

MEETING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "maxLength": 12},
        "hour": {"type": "integer", "minimum": 0, "maximum": 23},
        "days": {"type": "array", "items": {"enum": ["mon", "tue", "wed"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["who", "hour", "days"],
    "additionalProperties": False,
}
SAID = "um so i think we should meet maria on monday at three"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def test_a_schema_and_its_value(client: Client) -> None:
    done = client.process(SAID, schema=MEETING, max_tokens=300)
    assert done.finish_reason == "stop"
    assert done.structured == json.loads(done.text)
    assert 0 <= done.structured["hour"] <= 23
    assert set(done.structured["days"]) <= {"mon", "tue", "wed"}


def test_streams_are_as_ever(client: Client) -> None:
    stream = client.stream_process(SAID, schema=MEETING, temperature=0, max_tokens=300)
    text = "".join(stream)
    assert stream.result.text == text
    assert stream.result.structured == json.loads(text)


def test_a_grammar_has_no_value(client: Client) -> None:
    done = client.process(SAID, grammar='start: "yes" | "no"')
    assert done.text in ("yes", "no")
    assert done.structured is None


def test_an_answer_that_is_cut_short(client: Client) -> None:
    done = client.process(SAID, schema={"type": "array", "items": {"type": "integer"}, "minItems": 200}, max_tokens=9)
    assert (done.finish_reason, done.structured) == ("length", None)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"const": 1}
    for _ in range(depth):
        schema = {"items": schema, "type": "array", "minItems": 1, "maxItems": 1}
    return schema


def test_a_schema_as_deep_as_a_frame_may_be(client: Client) -> None:
    deepest = None
    for depth in range(50, 64):
        with contextlib.suppress(RpcError):
            deepest = client.process("x", schema=nested(depth), max_tokens=300)
    assert deepest is not None
    assert deepest.text.startswith("[" * 50)


@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"schema": {"$ref": "https://example.org/schema.json"}}, InvalidParams, "schema"),
        ({"schema": {"type": "string", "pattern": "["}}, InvalidParams, "schema"),
        ({"schema": {"uniqueItems": True}}, Unsupported, "schema"),
        ({"grammar": "start: nowhere"}, InvalidParams, "grammar"),
        ({"grammar": 'start: "a" start'}, InvalidParams, "grammar"),
    ],
)
def test_refusals_name_their_field(client: Client, options: dict[str, Any], kind: type[RpcError], name: str) -> None:
    with pytest.raises(kind) as caught:
        client.process(SAID, **options)
    assert name in (caught.value.details.get("field"), caught.value.details.get("option"))
    assert "Traceback" not in caught.value.message


def test_free_requests_beside_constrained_ones(daemon: Daemon, client: Client) -> None:
    alone = client.process(SAID, temperature=0).text
    with daemon.client() as other:
        streams = [other.stream_process(f"{SAID} {number}", schema=MEETING, max_tokens=300) for number in range(3)]
        assert client.process(SAID, temperature=0).text == alone
        for stream in streams:
            assert stream.wait().structured is not None
