"""Tools through a daemon: the whole round trip, the stream, the refusals, and a thought that has a budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mlxd_client import Client
from mlxd_client.errors import InvalidParams, RpcError, Unsupported
from mlxd_client.types import Message
from support import tool_templates
from support.daemon import Daemon

pytestmark = pytest.mark.model

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
ASKED = [{"role": "user", "content": "what is the weather in Paris?"}]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 400}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tool_templates.build(tmp_path_factory.mktemp("models") / "tiny", "json_tools"))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def saying(text: str) -> dict[str, Any]:
    """Options with which any model says exactly this."""
    return GREEDY | {"grammar": "start: " + json.dumps(text), "tools": TOOLS}


def test_a_whole_round_trip(client: Client, model: str) -> None:
    done = client.chat(ASKED, model=model, tools=TOOLS, tool_choice={"name": "get_weather"}, **GREEDY)
    assert (done.finish_reason, done.text, done.malformed_tool_calls) == ("tool_calls", "", None)
    assert done.tool_calls is not None
    (call,) = done.tool_calls
    assert call.name == "get_weather"
    assert len(call.arguments["city"]) <= 8
    turns = [
        *ASKED,
        {"role": "assistant", "content": done.text, "tool_calls": done.tool_calls},
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'},
    ]
    answer = client.chat(turns, model=model, tools=TOOLS, **GREEDY)
    assert answer.usage.prompt_tokens == client.count_tokens(messages=turns, tools=TOOLS, model=model)
    assert answer.usage.prompt_tokens > done.usage.prompt_tokens
    assert client.count_tokens(messages=ASKED, model=model) < done.usage.prompt_tokens


def test_calls_stream_as_they_are_complete(client: Client, model: str) -> None:
    bad = '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'
    stream = client.stream_chat(ASKED, model=model, **saying(f"I look.{PARIS}{bad} And{PARIS}\n."))
    told = [*stream.pieces()]
    result = stream.result
    assert "".join(piece.text or "" for piece in told) == result.text == "I look.And."
    calls = [index for index, piece in enumerate(told) for _ in piece.tool_calls or ()]
    (bad_at,) = (index for index, piece in enumerate(told) if piece.malformed_tool_calls)
    assert calls[0] <= bad_at <= calls[1] < len(told)
    assert calls[0] < calls[1]  # each when it was complete, not all at the end
    assert result.finish_reason == "tool_calls"
    assert result.tool_calls is not None
    assert [call.arguments for call in result.tool_calls] == [{"city": "Paris"}] * 2
    assert result.malformed_tool_calls is not None
    assert result.malformed_tool_calls[0].name == "rm"


def test_a_streamed_call_is_the_answers(client: Client, model: str) -> None:
    stream = client.stream_chat(ASKED, model=model, **saying(PARIS))
    streamed = [call for piece in stream.pieces() for call in piece.tool_calls or ()]
    assert streamed == stream.result.tool_calls


def test_a_call_that_is_cut_short(client: Client, model: str) -> None:
    done = client.chat(ASKED, model=model, **saying(PARIS) | {"max_tokens": 20})
    assert (done.finish_reason, done.text, done.tool_calls) == ("length", "", None)
    assert done.malformed_tool_calls is not None
    assert done.malformed_tool_calls[0].text.startswith('\n{"name')


def test_as_deep_as_a_frame_may_be(client: Client, model: str) -> None:
    """What was called can be sent back."""
    deep: Any = 1
    for _ in range(54):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "deep", "parameters": {"type": "object"}}}]
    text = f"<tool_call>\n{json.dumps({'name': 'deep', 'arguments': deep})}\n</tool_call>"
    options = saying(text) | {"tools": tools, "max_tokens": 900}
    done = client.chat(ASKED, model=model, **options)
    assert done.tool_calls is not None, done.malformed_tool_calls
    assert done.tool_calls[0].arguments == deep
    nested = {"id": "x", "type": "function", "function": {"name": "deep", "arguments": deep}}
    for call in (msgspec.to_builtins(done.tool_calls[0]), nested):
        turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
        assert client.count_tokens(messages=turns, tools=tools, model=model) > done.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"tools": [WEATHER, WEATHER]}, InvalidParams, "tools[1].function.name"),
        ({"tools": [CLOCK | {"type": "code"}]}, InvalidParams, "tools[0].type"),
        ({"tools": [CLOCK] * 129}, InvalidParams, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 10_000_000}}]},
         InvalidParams, "tools"),
        ({"tool_choice": "auto"}, InvalidParams, "tool_choice"),
        ({"tools": [], "tool_choice": "none"}, InvalidParams, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"name": "rm"}}, InvalidParams, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "schema": True}, InvalidParams, "tool_choice"),
        ({"thinking": False, "thinking_budget": 3}, InvalidParams, "thinking_budget"),
        ({"tools": TOOLS, "model": "mlxd/cleanup"}, Unsupported, "tools"),
        ({"thinking_budget": 3, "model": "mlxd/cleanup"}, Unsupported, "thinking_budget"),
        ({"messages": [{"role": "tool", "content": "3 PM"}], "model": "mlxd/cleanup"}, Unsupported, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}], "model": "mlxd/cleanup"}, Unsupported, "messages"),
    ],
)  # fmt: skip
def test_refusals_name_their_field(
    client: Client, model: str, fields: dict[str, Any], kind: type[RpcError], name: str
) -> None:
    with pytest.raises(kind) as caught:
        client.chat(**{"messages": ASKED, "model": model} | fields)
    assert name in (caught.value.details.get("field"), caught.value.details.get("option"))


def test_turns_are_checked(client: Client, model: str) -> None:
    turns = [*ASKED, {"role": "tool", "tool_call_id": "nobody", "content": "x"}]
    with pytest.raises(InvalidParams) as caught:
        client.chat(turns, model=model)
    assert caught.value.details["field"] == "messages[1].tool_call_id"
    with pytest.raises(InvalidParams):
        client.call("tokens.count", {"text": "x", "tools": TOOLS, "model": model})


def test_a_thinking_budget(client: Client, model: str) -> None:
    done = client.chat(ASKED, model=model, thinking_budget=6, **GREEDY | {"max_tokens": 20})
    assert done.usage.reasoning_tokens == 6
    assert done.reasoning
    assert done.text
    called = client.chat([Message(role="user", content="go")], model=model, tools=TOOLS, thinking_budget=4,
                         tool_choice={"name": "clock"}, **GREEDY)  # fmt: skip
    assert called.tool_calls is not None
    assert (called.tool_calls[0].name, called.usage.reasoning_tokens) == ("clock", 4)
