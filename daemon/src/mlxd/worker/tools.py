"""The tools of a request, checked: what the chat template shows, what calls are measured by, and whether one must come.

Checking schemas takes time, so that sets of tools which come again with each turn are kept.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from referencing import Registry

from mlxd_client.errors import InvalidParams, ModelInvalid

from ..childwire import MAX_TOOLS, MAX_TOOLS_BYTES
from .timelimit import time_limit

CHECK_LIMIT_S = 2.0
KEPT = 32
# No parameters are given: the tool takes none.
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
AUTO, NONE, REQUIRED = "auto", "none", "required"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# Under these are names, each with a schema; under the others are plain values.
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_PLAIN = frozenset(("const", "enum", "default", "examples"))


@dataclass(frozen=True, slots=True)
class Toolset:
    """`shown` is what templates and mlx_lm's parsers get; `schemas` and `validators` are by name."""

    shown: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    validators: dict[str, Any]


class Toolsets:
    """Reads the tools of one model's requests."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Toolset] = OrderedDict()

    def read(self, tools: list[dict[str, Any]]) -> Toolset:
        """Raises InvalidParams for what is no set of tools; details.field says where."""
        if len(tools) > MAX_TOOLS:
            raise InvalidParams(f"tools: {len(tools)} are over the limit of {MAX_TOOLS}", field="tools")
        key = json.dumps(tools, separators=(",", ":"))
        if len(key) > 2 * MAX_TOOLS_BYTES:  # the daemon measured it in its own way
            raise InvalidParams(f"tools: {len(key)} bytes are over the limit of {MAX_TOOLS_BYTES}", field="tools")
        found = self._kept.get(key)
        if found is None:
            try:
                with time_limit(CHECK_LIMIT_S, "checking the schemas of the tools"):
                    found = self._kept[key] = _read(tools)
            except ModelInvalid as error:
                raise InvalidParams(f"tools: they are too complex: {error.message}", field="tools") from None
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found


def read_choice(choice: str | dict[str, Any] | None, names: dict[str, Any]) -> tuple[str, str | None]:
    """AUTO, NONE or REQUIRED, and the only tool that is to be called, if one is named.

    Args:
        choice: as on the wire; None is AUTO.
        names: of the request's tools.

    Raises:
        InvalidParams: it is none of the forms, or names no tool.
    """
    if choice is None:
        return AUTO, None
    if isinstance(choice, str):
        if choice not in (AUTO, NONE, REQUIRED):
            told = "tool_choice is auto, none, required, or an object that names a tool"
            raise InvalidParams(told, field="tool_choice")
        return choice, None
    function = choice if set(choice) == {"name"} else choice.get("function")
    if function is not choice and not (set(choice) == {"type", "function"} and choice["type"] == "function"):
        told = 'tool_choice names a tool as {"name": …} or {"type": "function", "function": {"name": …}}'
        raise InvalidParams(told, field="tool_choice")
    name = function.get("name") if isinstance(function, dict) and set(function) == {"name"} else None
    if not isinstance(name, str) or name not in names:
        raise InvalidParams("tool_choice names none of the tools", field="tool_choice")
    return REQUIRED, name


def _read(tools: list[dict[str, Any]]) -> Toolset:
    made = Toolset([], {}, {})
    for number, tool in enumerate(tools):
        field = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise InvalidParams('a tool is {"type": "function", "function": {…}}', field=f"{field}.type")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise InvalidParams("a tool has a function: name, description, parameters", field=f"{field}.function")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            told = "a tool has a name: letters, digits, _ . and -, 128 at most"
            raise InvalidParams(told, field=f"{field}.function.name")
        if name in made.schemas:
            raise InvalidParams(f"two tools have the name {name}", field=f"{field}.function.name")
        if not isinstance(function.get("description", ""), str):
            raise InvalidParams("a tool's description is text", field=f"{field}.function.description")
        schema = function.get("parameters", NOTHING)
        made.validators[name] = _validator(schema, f"{field}.function.parameters")
        made.schemas[name] = schema
        # Templates and parsers look into the properties of whatever there is.
        shown = {"type": "object", **schema, "properties": schema.get("properties", {})}
        described = {"name": name, "description": function.get("description", "")}
        made.shown.append({**tool, "function": {**described, **function, "parameters": shown}})
    return made


def _validator(schema: Any, field: str) -> Any:
    import jsonschema  # type: ignore[import-untyped]

    if not isinstance(schema, dict):
        raise InvalidParams("parameters are a JSON Schema of an object", field=field)
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidParams("a tool's parameters are an object", field=f"{field}.type")
    for name, reference in _references(schema):
        if not reference.startswith("#"):
            told = f"{name} {reference[:100]!r} is elsewhere; references are followed within the schema only"
            raise InvalidParams(told, field=field)
    dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        dialect.check_schema(schema)
        validator = dialect(schema, registry=Registry())
        validator.is_valid({})  # a reference that leads nowhere, or to itself
    except jsonschema.SchemaError as error:
        raise InvalidParams(f"{field} are no JSON Schema: {error.message[:300]}", field=field) from None
    except RecursionError:
        raise InvalidParams(f"{field} have no end, or are too deep", field=field) from None
    except Exception as error:
        told = f"{field} are no JSON Schema: {type(error).__name__}: {str(error)[:300]}"
        raise InvalidParams(told, field=field) from None
    return validator


def _references(schema: Any) -> Iterator[tuple[str, str]]:
    stack = [schema]
    while stack:
        top = stack.pop()
        if isinstance(top, list):
            stack.extend(top)
        elif isinstance(top, dict):
            for name, value in top.items():
                if name in _REFERENCES and isinstance(value, str):
                    yield name, value
                elif name in _NAMED and isinstance(value, dict):
                    stack.extend(value.values())
                elif name not in _PLAIN:
                    stack.append(value)
