"""The turns of a conversation, checked, as chat templates take them.

Tool calls come as a Completion has them, or in the nested form that other APIs use; templates get the nested one, with
arguments as objects, as mlx_lm's server hands them over.
"""

from __future__ import annotations

import hashlib
from typing import Any

from mlxd_client.errors import InvalidParams, Unsupported

from .constraint import parse_value

ROLES = ("system", "user", "assistant", "tool")
MAX_NAME = 256
# Mistral's templates take no other ids.
SHORT_ID = 9


def read_turns(messages: list[dict[str, Any]], *, tools: bool, short_ids: bool = False) -> list[dict[str, Any]]:
    """The messages for a chat template.

    Args:
        tools: whether the model's template has a place for calls and what they returned.
        short_ids: the template takes ids of SHORT_ID letters and digits only; others are replaced, alike everywhere.

    Raises:
        InvalidParams: no or malformed messages; details.field says where.
        Unsupported: turns of tools, with a model that has none.
    """
    if not messages:
        raise InvalidParams("there are no messages", field="messages")
    made = []
    open_calls: dict[str, str] = {}  # of the last assistant turn, those that nothing was returned for: id → name
    for index, turn in enumerate(messages):
        role, field = turn.get("role"), f"messages[{index}]"
        if role not in ROLES:
            raise InvalidParams(f"a message's role is one of {', '.join(ROLES)}", field=f"{field}.role")
        if not tools and (role == "tool" or turn.get("tool_calls") or turn.get("tool_call_id")):
            told = f"{field}: this model takes no turns of tools"
            raise Unsupported(told, option="messages", field=field)
        if not isinstance(turn.get("content", ""), str | list):  # parts were checked before
            raise InvalidParams("a message's content is text, or parts", field=f"{field}.content")
        turn = {**turn, "content": turn.get("content", "")}
        calls = turn.pop("tool_calls", None)
        if calls and role != "assistant":
            raise InvalidParams("tool calls are made by assistant turns", field=f"{field}.tool_calls")
        if role == "tool":
            _answer(turn, open_calls, field)
        elif "tool_call_id" in turn:
            raise InvalidParams("a tool_call_id belongs to a tool turn", field=f"{field}.tool_call_id")
        else:
            open_calls = {}
        if calls:
            turn["tool_calls"] = _calls(calls, open_calls, f"{field}.tool_calls")
        made.append(turn)
    return [_shorten(turn) for turn in made] if short_ids else made


def _answer(turn: dict[str, Any], open_calls: dict[str, str], field: str) -> None:
    """Check a tool turn against the calls before it; it also gets the tool's name, which some templates show."""
    if "tool_call_id" not in turn:
        raise InvalidParams("a tool turn says which call it answers", field=f"{field}.tool_call_id")
    name = open_calls.pop(turn["tool_call_id"], None)
    if name is None:
        told = "the assistant turn before it made no call of this id, or it was answered already"
        raise InvalidParams(told, field=f"{field}.tool_call_id")
    if turn.setdefault("name", name) != name:
        raise InvalidParams(f"the call was of the tool {name}", field=f"{field}.name")


def _calls(raw: Any, open_calls: dict[str, str], field: str) -> list[dict[str, Any]]:
    made = []
    for number, call in enumerate(raw):
        where = f"{field}[{number}]"
        if not isinstance(call, dict):
            raise InvalidParams("a tool call is an object", field=where)
        nested = "function" in call
        function, inner = (call["function"], f"{where}.function") if nested else (call, where)
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise InvalidParams("a tool call is of a function", field=inner)
        call_id, name = call.get("id"), function.get("name")
        if not isinstance(call_id, str) or not 0 < len(call_id) <= MAX_NAME:
            raise InvalidParams(f"a tool call has an id, of {MAX_NAME} characters at most", field=f"{where}.id")
        if call_id in open_calls:
            raise InvalidParams("another call of this turn has the same id", field=f"{where}.id")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise InvalidParams(f"a tool call has a name, of {MAX_NAME} characters at most", field=f"{inner}.name")
        arguments = _arguments(function.get("arguments", {}), f"{inner}.arguments")
        open_calls[call_id] = name
        made.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return made


def _arguments(raw: Any, field: str) -> dict[str, Any]:
    value = raw
    if isinstance(raw, str):
        try:
            value = parse_value(raw) if raw.strip() else {}
        except ValueError as error:
            raise InvalidParams(f"a call's arguments are an object, or JSON of one: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidParams("a call's arguments are an object, or JSON of one", field=field)
    return value


def _shorten(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_call_id" in turn:
        turn = turn | {"tool_call_id": _short(turn["tool_call_id"])}
    if "tool_calls" in turn:
        turn = turn | {"tool_calls": [call | {"id": _short(call["id"])} for call in turn["tool_calls"]]}
    return turn


def _short(call_id: str) -> str:
    if len(call_id) == SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:SHORT_ID]
