"""Is a decoded message a request, and are its parameters what the method takes? Pure; answers in words for people."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from mlxd_client.errors import InvalidParams

from .methods.connection import EMPTY
from .methods.table import Method

__all__ = ["MAX_ID_CHARS", "MEMBERS", "checked_params", "what_is_wrong"]

MEMBERS = frozenset(("jsonrpc", "id", "method", "params"))
MAX_ID_CHARS = 256
_ABSENT = object()
_FIELD_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_FIELD_NAME = re.compile(r"^Object (?:contains unknown|missing required) field `([^`]*)`")


def what_is_wrong(message: dict[str, Any]) -> str:
    if message.get("jsonrpc") != "2.0":
        return 'a request has "jsonrpc": "2.0"'
    if type(message.get("method")) is not str:
        return "a request has a `method`, which is a string"
    odd = sorted(message.keys() - MEMBERS)[0]
    return f"a request has no member named {odd[:80]!r}"


def checked_params(method: Method, message: dict[str, Any]) -> Any:
    """The parameters as the method's struct. Raises InvalidParams that names the field."""
    given = message.get("params", _ABSENT)
    if method.no_params and (given is _ABSENT or given == {}):
        return EMPTY
    if given is _ABSENT:
        given = {}
    elif type(given) is not dict:
        positional = type(given) is list
        reason = "parameters are given by name, not by position" if positional else "`params` is a map of parameters"
        raise InvalidParams(reason, field="params")
    try:
        return msgspec.convert(given, method.params)
    except msgspec.ValidationError as error:
        text = str(error)
        raise InvalidParams(f"{method.name}: {text}", field=_field(text)) from None


def _field(text: str) -> str:
    """The field that msgspec complains about, as a path such as `messages[0].role`."""
    path = _FIELD_PATH.search(text)
    name = _FIELD_NAME.search(text)
    parts = [found[1] for found in (path, name) if found is not None and found[1]]
    return ".".join(parts) or "params"
