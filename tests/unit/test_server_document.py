"""The interface as documents: valid OpenRPC that describes every method, and a wire reference that is true."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from mlxd.server import document
from mlxd.server.methods.table import METHODS
from mlxd_client import types
from mlxd_client.codec import Encoding
from mlxd_client.types import Model
from support.loops import run
from support.serving import RawClient, Served, serving

WIRE = Path(__file__).parents[2] / "docs" / "wire.md"

_STRING = {"type": "string"}
_NAME = {"type": "string", "minLength": 1}
_REFERENCE = {"type": "object", "additionalProperties": False, "required": ["$ref"], "properties": {"$ref": _STRING}}


def _object(needed: list[str], /, **properties: Any) -> dict[str, Any]:
    """An OpenRPC object: nothing but its fields and `x-` extensions."""
    return {
        "type": "object",
        "required": needed,
        "additionalProperties": False,
        "patternProperties": {"^x-": {}},
        "properties": properties,
    }


def _list_of(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"oneOf": [{"$ref": f"#/definitions/{kind}"}, _REFERENCE]}}


# The rules of https://spec.open-rpc.org version 1.3 for the objects that the document uses.
OPENRPC_RULES: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **_object(
        ["openrpc", "info", "methods"],
        openrpc={"enum": ["1.3.0", "1.3.1", "1.3.2"]},
        info=_object(
            ["title", "version"],
            title=_STRING,
            description=_STRING,
            termsOfService=_STRING,
            version=_STRING,
            license=_object([], name=_STRING, url=_STRING),
        ),
        methods={"type": "array", "items": {"$ref": "#/definitions/method"}},
        components={
            "type": "object",
            "propertyNames": {"enum": ["schemas", "errors"]},
            "properties": {
                "schemas": {"additionalProperties": {"$ref": "#/definitions/schema"}},
                "errors": {"additionalProperties": {"$ref": "#/definitions/error"}},
            },
        },
    ),
    "definitions": {
        "schema": {"type": ["object", "boolean"]},  # checked against draft 7's own meta-schema below
        "error": {
            "type": "object",
            "additionalProperties": False,
            "required": ["code", "message"],
            "properties": {"code": {"type": "integer"}, "message": _STRING, "data": {}},
        },
        "content": _object(
            ["name", "schema"],
            name=_NAME,
            summary=_STRING,
            description=_STRING,
            schema={"$ref": "#/definitions/schema"},
            required={"type": "boolean"},
            deprecated={"type": "boolean"},
        ),
        "method": _object(
            ["name", "params", "result"],
            name=_NAME,
            summary=_STRING,
            description=_STRING,
            paramStructure={"enum": ["by-position", "by-name", "either"]},
            params=_list_of("content"),
            result={"oneOf": [{"$ref": "#/definitions/content"}, _REFERENCE]},
            errors=_list_of("error"),
            deprecated={"type": "boolean"},
        ),
    },
}


@pytest.fixture(scope="module", params=list(Encoding))
def discovered(request: pytest.FixtureRequest) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with serving() as served:
            client = await served.connect(request.param)
            assert await client.call("rpc.discover") == await client.call("rpc.discover")
            return dict(await client.call("rpc.discover"))

    return run(main())


def _all(value: Any, key: str) -> Iterator[Any]:
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from _all(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _all(inner, key)


def test_it_is_valid_openrpc(discovered: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(OPENRPC_RULES).validate(discovered)
    for schema in [*discovered["components"]["schemas"].values(), *_all(discovered["methods"], "schema")]:
        jsonschema.Draft7Validator.check_schema(schema)
        assert '"null"' not in json.dumps(schema)
        assert "prefixItems" not in json.dumps(schema)
    for method in discovered["methods"]:
        names = [param["name"] for param in method["params"]]
        assert len(names) == len(set(names))
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True)  # required ones come first


def test_every_reference_resolves(discovered: dict[str, Any]) -> None:
    references = set(_all(discovered, "$ref"))
    assert len(references) > 30
    for reference in references:
        at: Any = discovered
        for step in reference.removeprefix("#/").split("/"):
            at = at[step]


def test_it_describes_every_method_of_version_1(discovered: dict[str, Any]) -> None:
    now = (
        "hello ping status stats metrics shutdown restart rpc.discover "
        "config.get config.set config.reload personas.list "
        "models.list models.get models.story models.load models.unload models.acquire "
        "models.release models.plan models.download models.delete models.verify models.catalog jobs.list jobs.get "
        "jobs.wait jobs.cancel batch.submit batch.append batch.start batch.list batch.get batch.results batch.cancel "
        "batch.delete cache.list cache.clear process chat tokens.count tokens.encode tokens.decode embed "
        "cancel events.subscribe "
        "events.unsubscribe"
    ).split()
    names = [method["name"] for method in discovered["methods"]]
    assert set(now) == set(names)
    assert names == list(METHODS)


def test_its_schemas_accept_what_the_daemon_sends(discovered: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving() as served:
            client = await served.connect()
            asked: dict[str, Any] = {
                "hello": {"protocol": [1, 1], "client": {"name": "x"}},
                "status": None,
                "models.story": None,
                "stats": {"model": "fake/model"},
                "metrics": None,
                "models.list": None,
                "models.acquire": {"model": "fake/model"},
                "process": {"prompt": "echo x"},
                "events.subscribe": None,
            }
            for name, params in asked.items():
                answer = await client.answer(client.request(name, params))
                (method,) = [method for method in discovered["methods"] if method["name"] == name]
                for schema, value in [(method["result"]["schema"], answer["result"]), *_given(method, params or {})]:
                    whole = schema | {"components": discovered["components"]}
                    jsonschema.Draft7Validator({"allOf": [schema], "components": whole["components"]}).validate(value)

    run(main())


def _given(method: dict[str, Any], params: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(param["schema"], params[param["name"]]) for param in method["params"] if param["name"] in params]


# --- the wire reference -------------------------------------------------------------------------------------------


def test_the_wire_reference_is_up_to_date() -> None:
    text = WIRE.read_text("utf-8")
    assert text == document.rewrite(text), "run: python -m mlxd.server.document docs/wire.md"
    for topic in types.TOPICS:
        assert f"| `{topic}` |" in text


EXAMPLES = re.findall(r"<!-- example -->\n```\n(.*?)```", WIRE.read_text("utf-8"), re.DOTALL)


def test_the_examples_are_true() -> None:
    """They are one conversation: what a client sends is sent, and what it gets must match; `…` stands for anything."""

    async def main() -> None:
        async with serving() as served:
            builtin = Model(id="mlxd/cleanup", state="Downloaded", source="builtin")
            served.runtime.model_states = {builtin.id: builtin}
            client = await served.connect(Encoding.JSON)
            assert len(EXAMPLES) >= 5
            for example in EXAMPLES:
                await _play(example.splitlines(), served, client)

    run(main())


async def _play(lines: list[str], served: Served, client: RawClient) -> None:
    for line in lines:
        message = json.loads(line[3:])
        if line.startswith("->"):
            client.send(message)
            continue
        await _provoke(message, served, cancelled='"cancel"' in "".join(lines))
        _matches(message, await client.next())


async def _provoke(message: dict[str, Any], served: Served, cancelled: bool) -> None:
    """Let the fake runtime do what leads to the message."""
    if message.get("method") == "event":
        served.runtime.change(Model(id="mlxd/cleanup", state="Loading", source="builtin"), "loading_started")
    elif message.get("method") == "stream":
        piece = message["params"]
        if piece["seq"] == 0:
            await served.runtime.asked.get()
        ticket = served.runtime.tickets[-1]
        if "phase" in piece:
            ticket.sink.phase(piece["phase"], piece["progress"])
        else:
            ticket.piece(piece["text"])
    elif "text" in message.get("result", {}) and not cancelled:
        served.runtime.tickets[-1].done()
    await asyncio.sleep(0)


def _matches(expected: Any, got: Any) -> None:
    if expected == "…":
        return
    if isinstance(expected, dict):
        assert isinstance(got, dict)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            _matches(value, got[key])
    else:
        assert expected == got
