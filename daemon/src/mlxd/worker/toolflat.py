"""Grammars for calls whose arguments stand one by one, each spelled by its type: text as it is, all else as JSON.

Such a grammar can say less than JSON Schema does; what it cannot is refused by its keyword.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxd_client.errors import Unsupported

if TYPE_CHECKING:
    from .toolsyntax import Syntax

# What would bind several arguments to each other, or the kind of text that one may be.
_ON_OBJECTS = frozenset(
    "anyOf oneOf allOf not if then else patternProperties minProperties maxProperties propertyNames dependentRequired"
    " dependentSchemas dependencies unevaluatedProperties enum const $ref $dynamicRef".split()
)
_ON_TEXT = frozenset("anyOf oneOf allOf not if then else $ref $dynamicRef pattern minLength maxLength".split())
_JSON = frozenset(("integer", "number", "boolean", "array", "object"))
_SIMPLE = frozenset(("integer", "number", "boolean"))


@dataclass(frozen=True, slots=True)
class Style:
    """How a family spells one argument.

    Attributes:
        opening, closing: what stands before and after a call's arguments, of the tool's name; what stands before and
            after one argument is `before`, of its name, and `after`.
        quote: what stands around text besides.
        joined: what stands between calls, and `section` around all of them, within the markers; None where each call
            has markers of its own.
        between: what stands between arguments, if they are no lines of their own.
        never: regular expressions of what text cannot be, as the parser would read it in another way.
        kinds: the types that are JSON.
        names: what names of arguments and tools can be.
        quoted: text is JSON, too.
        bare: a call without arguments can be read.
    """

    opening: Callable[[str], str]
    closing: str
    before: Callable[[str], str]
    after: str = ""
    quote: str = ""
    between: str = ""
    joined: str = ""
    section: tuple[str, str] | None = None
    never: tuple[str, ...] = ()
    kinds: frozenset[str] = _JSON
    names: str = r"[\w.-]+"
    quoted: bool = False
    bare: bool = True


def spell(syntax: Syntax, style: Style, names: list[str], schemas: dict[str, Any]) -> list[str]:
    """Rules `text`, where text is not quoted, and `tool_0` and so on, of a call of each tool without its markers.

    Raises:
        Unsupported: a schema, or a name, that this style has no words for.
    """
    lines = [] if style.quoted else _text(syntax, style)
    for number, name in enumerate(names):
        if not re.fullmatch(style.names, name) or (style.quoted and any(map(keyword.iskeyword, name.split(".")))):
            raise _cannot(f"the name {name}", "name")
        items = []
        for index, (argument, schema, required) in enumerate(_arguments(schemas[name], style)):
            item = f"item_{number}_{index}"
            lines.append(f"{item}: {syntax.literal(style.before(argument))} {_value(schema, syntax, style)}")
            items.append((item, required))
        if not style.bare and not any(required for _, required in items):
            raise _cannot(f"{name}, which needs no argument,", "required")
        opening, closing = syntax.literal(style.opening(name)), syntax.literal(style.closing)
        lines.append(f"tool_{number}: {opening} {_list(number, items, style.between, lines)} {closing}")
    return lines


def _text(syntax: Syntax, style: Style) -> list[str]:
    """Any text, up to what ends it. Where that begins with a special token, text could not hold it, but spell it."""
    ending = style.quote + style.after
    special = syntax.special(ending)
    never = [*style.never, *_without(syntax.markers[1]), *_without(special or "")]
    terminal = "TEXT: /(?s:.+)/" + "".join(f" & ~/(?s:{pattern})/" for pattern in never)
    if special is not None:
        return [f"text: TEXT? {syntax.literal(ending)}", terminal]
    return [f"text[suffix={json.dumps(ending)}]: TEXT", terminal.replace(".+", ".*", 1)]


def _arguments(schema: dict[str, Any], style: Style) -> list[tuple[str, dict[str, Any], bool]]:
    for key in schema:
        if key in _ON_OBJECTS:
            raise _cannot(key, key)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    missing = [name for name in required if name not in properties]
    if missing:
        raise _cannot(f"required {missing[0]}, which is no property,", "required")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    made = []
    for name, value in properties.items():
        if not re.fullmatch(style.names, name) or (style.quoted and (keyword.iskeyword(name) or "." in name)):
            raise _cannot(f"the argument {name[:100]!r}", "properties")
        if value is False:
            continue
        plain = {key: one for key, one in value.items() if key != "x-guidance"} if isinstance(value, dict) else {}
        made.append((name, plain | shared, name in required))
    return made


def _value(schema: dict[str, Any], syntax: Syntax, style: Style) -> str:
    """The grammar of one value, and of what ends it."""
    if style.quoted:
        return f"%json {json.dumps(schema)}"
    kind = schema.get("type")
    ending = syntax.literal(style.quote + style.after)
    if kind == "string":
        for key in schema:
            if key in _ON_TEXT:
                raise _cannot(key, key)
        start = syntax.literal(style.quote)
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if choices is None:
            return f"{start} text"
        texts = [json.dumps(choice) for choice in choices if isinstance(choice, str)]
        return f"{start} ({' | '.join(texts)}) {ending}"
    if not isinstance(kind, str) or kind not in style.kinds:
        raise _cannot(f"type {json.dumps(kind)[:100]}", "type")
    return f"%json {json.dumps(schema)} {syntax.literal(style.after)}"


def _list(number: int, items: list[tuple[str, bool]], between: str, lines: list[str]) -> str:
    """All required items and any of the others, in their order, with `between` where one follows another."""
    if not between:
        return " ".join(item if required else f"{item}?" for item, required in items)
    first = rest = ""
    for index, (item, required) in reversed([*enumerate(items)]):
        follow, after = f"({json.dumps(between)} {item})", rest
        lines.append(f"first_{number}_{index}: {item} {after}" + ("" if required else f" | {first or json.dumps('')}"))
        lines.append(f"rest_{number}_{index}: {follow}{'' if required else '?'} {after}")
        first, rest = f"first_{number}_{index}", f"rest_{number}_{index}"
    return first


def _without(marker: str) -> list[str]:
    return [f".*{re.escape(marker).replace('/', chr(92) + '/')}.*"] if marker else []


def _cannot(what: str, name: str) -> Unsupported:
    told = f"tools: {what} cannot be enforced with how this model's family spells calls"
    return Unsupported(told, option="tools", keyword=name)


_NULL = "(?i:null)"
STYLES: dict[str, Style] = {
    "qwen3_coder": Style(
        opening="\n<function={}>\n".format,
        closing="</function>\n",
        before="<parameter={}>\n".format,
        after="\n</parameter>\n",
        never=(_NULL,),
        joined="\n",
    ),
    "minimax_m2": Style(
        opening='\n<invoke name="{}">\n'.format,
        closing="</invoke>\n",
        before='<parameter name="{}">'.format,
        after="</parameter>\n",
        never=(rf"\s*{_NULL}\s*", r".*<\/invoke>.*"),
        section=("", ""),
    ),
    "glm47": Style(
        opening="{}".format,
        closing="",
        before="<arg_key>{}</arg_key><arg_value>".format,
        after="</arg_value>",
    ),
    "longcat": Style(
        opening="{}\n".format,
        closing="",
        before="<longcat_arg_key>{}</longcat_arg_key>\n<longcat_arg_value>".format,
        after="</longcat_arg_value>\n",
        bare=False,
        joined="\n",
    ),
    "gemma4": Style(
        opening="call:{}{{".format,
        closing="}",
        before="{}:".format,
        quote='<|"|>',
        between=",",
        never=(r".*\x00.*",),
        kinds=_SIMPLE,
        names=r"\w+",
    ),
    "function_gemma": Style(
        opening="call:{}{{".format,
        closing="}",
        before="{}:".format,
        quote="<escape>",
        between=",",
        never=(".*}.*",),
        kinds=_SIMPLE,
        names=r"\w+",
    ),
    "pythonic": Style(
        opening="{}(".format,
        closing=")",
        before="{}=".format,
        between=", ",
        joined=", ",
        section=("[", "]"),
        names=r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*",
        quoted=True,
    ),
}
