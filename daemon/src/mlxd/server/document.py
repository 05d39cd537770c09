"""The interface as documents, made from the method table: OpenRPC for programs, Markdown for people.

python -m mlxd.server.document docs/wire.md     rewrites the generated parts of that file
"""

from __future__ import annotations

import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from mlxd_client import errors, types
from mlxd_client.codec import Encoding

from .methods.table import METHODS, Method

__all__ = ["encoded_openrpc", "markdown_parts", "openrpc", "rewrite"]

OPENRPC_VERSION = "1.3.2"
_REF = "#/components/schemas/"
_COMMON = (errors.InvalidRequest, errors.InvalidParams, errors.InternalError)
_WAITING = (errors.Cancelled, errors.QueueFull)
_NOTIFICATIONS: tuple[tuple[str, type[Any], str], ...] = (
    ("stream", types.Stream, "The next piece of the answer to a request that streams."),
    ("event", types.Event, "Something happened that a subscription asked for."),
)


# --- OpenRPC ------------------------------------------------------------------------------------------------------


@cache
def encoded_openrpc(version: str, encoding: Encoding) -> msgspec.Raw:
    """The OpenRPC document as it goes into a reply."""
    encode = msgspec.json.encode if encoding is Encoding.JSON else msgspec.msgpack.encode
    return msgspec.Raw(encode(openrpc(version)))


def openrpc(version: str) -> dict[str, Any]:
    """The OpenRPC document of this interface (https://spec.open-rpc.org, 1.3); schemas are JSON Schema draft 7.

    Notifications from the daemon, which OpenRPC has no place for, stand under `x-notifications`.
    """
    schemas = _schemas()
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {
            "title": "mlxd",
            "version": version,
            "description": "Local language models for all apps of one user, over JSON-RPC 2.0 on a Unix socket.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "methods": [_method(method, schemas) for method in METHODS.values()],
        "components": {
            "schemas": schemas,
            "errors": {cls.kind: _error(cls) for cls in errors.BY_KIND.values()},
        },
        "x-notifications": [
            {"name": name, "summary": summary, "params": {"$ref": _REF + struct.__name__}}
            for name, struct, summary in _NOTIFICATIONS
        ],
    }


def _schemas() -> dict[str, Any]:
    structs: list[type[Any]] = [struct for _, struct, _ in _NOTIFICATIONS]
    for method in METHODS.values():
        structs += [method.params] if method.result is None else [method.params, method.result]
    _, components = msgspec.json.schema_components(structs, ref_template=_REF + "{name}")
    return {name: _draft7(schema) for name, schema in sorted(components.items())}


def _draft7(schema: Any) -> Any:
    """msgspec writes draft 2020-12 and OpenRPC reads draft 7; the two differ in tuples. And nothing is null here:
    a field whose type allows None is one that may be absent."""
    if isinstance(schema, list):
        return [_draft7(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _draft7(value) for key, value in schema.items()}
    if "prefixItems" in made:
        made["items"] = made.pop("prefixItems")
        made["additionalItems"] = False
    if {"type": "null"} in made.get("anyOf", ()):
        rest = [entry for entry in made.pop("anyOf") if entry != {"type": "null"}]
        made.pop("default", None)
        made = rest[0] | made if len(rest) == 1 and "$ref" not in rest[0] else made | {"anyOf": rest}
    elif "default" in made and made["default"] is None:
        del made["default"]
    return made


def _method(method: Method, schemas: dict[str, Any]) -> dict[str, Any]:
    params = schemas[method.params.__name__]
    required = params.get("required", [])
    result: dict[str, Any] = {"type": "object"}
    if method.result is not None:
        result = {"$ref": _REF + method.result.__name__}
    told = "\n\n".join(text for _, text in _told_of(method))
    return {
        "name": method.name,
        "summary": method.summary,
        **({"description": told} if told else {}),
        "paramStructure": "by-name",
        "params": [
            {"name": name, "required": name in required, "schema": schema}
            for name, schema in sorted(params.get("properties", {}).items(), key=lambda item: item[0] not in required)
        ],
        "result": {"name": "result", "schema": result},
        "errors": [{"$ref": f"#/components/errors/{cls.kind}"} for cls in _errors_of(method)],
        "x-since": method.since,
    }


def _told_of(method: Method) -> list[tuple[type[Any], str]]:
    """What the struct of a method's parameters says of them, and those that it extends, each with its text."""
    structs = [struct for struct in method.params.__mro__ if struct not in types.Empty.__mro__]
    texts = [(struct, inspect.cleandoc(struct.__dict__.get("__doc__") or "")) for struct in structs]
    return [(struct, text) for struct, text in texts if text and text != method.summary]


def _errors_of(method: Method) -> list[type[errors.RpcError]]:
    return list(dict.fromkeys((*_COMMON, *(_WAITING if method.waits else ()), *method.errors)))


def _error(cls: type[errors.RpcError]) -> dict[str, Any]:
    return {"code": cls.code, "message": cls.kind, "data": {"kind": cls.kind}}


# --- Markdown -----------------------------------------------------------------------------------------------------


def rewrite(text: str) -> str:
    """The text with the lines between each pair of `<!-- generated: NAME -->` and `<!-- end -->` made anew."""
    for name, part in markdown_parts().items():
        opening = f"<!-- generated: {name} -->\n"
        before, found, rest = text.partition(opening)
        _, closed, after = rest.partition("<!-- end -->")
        if not (found and closed):
            raise ValueError(f"there is no place for {name!r}")
        text = f"{before}{opening}\n{part}\n{closed}{after}"
    return text


def markdown_parts() -> dict[str, str]:
    """The generated parts of the wire reference, by name."""
    document = openrpc("")
    return {
        "methods": _methods_text(document),
        "structs": _structs_text(document),
        "errors": _errors_text(),
        "events": _events_text(),
    }


def _methods_text(document: dict[str, Any]) -> str:
    lines: list[str] = []
    told: dict[type[Any], str] = {}
    for method in document["methods"]:
        lines += [f"### `{method['name']}`", "", method["summary"], ""]
        texts = _told_of(METHODS[method["name"]])
        firsts = [told.setdefault(struct, method["name"]) for struct, _ in texts]
        for (_, text), first in zip(texts, firsts, strict=True):
            lines += [text, ""] if first == method["name"] else []
        for first in dict.fromkeys(name for name in firsts if name != method["name"]):
            lines += [f"The other options are those of [`{first}`](#{first}).", ""]
        if method["params"]:
            lines += ["| parameter | type | |", "|---|---|---|"]
            lines += [
                f"| `{param['name']}` | {_type_text(param['schema'])} | {'required' if param['required'] else ''} |"
                for param in method["params"]
            ]
            lines.append("")
        own = [f"`{cls.kind}`" for cls in _errors_of(METHODS[method["name"]]) if cls not in _COMMON]
        lines.append(f"Result: {_type_text(method['result']['schema'])}.")
        lines += [f"Errors: {', '.join(own)}."] if own else []
        lines += ["", *_example_text(method["name"])]
    return "\n".join(lines)


def _example_text(name: str) -> list[str]:
    """The method's request and answer, as they go over the wire in JSON."""
    from .methods.examples import EXAMPLES  # for people: rpc.discover does without

    if name not in EXAMPLES:
        return []
    params, result, _ = EXAMPLES[name]
    head = {"jsonrpc": "2.0", "id": list(EXAMPLES).index(name) + 1}
    request = head | {"method": name} | ({"params": params} if params else {})
    lines = (json.dumps(line, ensure_ascii=False) for line in (request, head | {"result": result}))
    return ["```", *(f"{sign} {line}" for sign, line in zip(("->", "<-"), lines, strict=True)), "```", ""]


def _structs_text(document: dict[str, Any]) -> str:
    params = {method.params.__name__ for method in METHODS.values()}
    lines: list[str] = []
    for name, schema in document["components"]["schemas"].items():
        if name in params:
            continue
        lines += [f"### struct {name}", ""]
        if "description" in schema:
            lines += [" ".join(schema["description"].split()), ""]
        required = schema.get("required", [])
        lines += ["| field | type | |", "|---|---|---|"]
        lines += [
            f"| `{field}` | {_type_text(value)} | {'always' if field in required else ''} |"
            for field, value in schema.get("properties", {}).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _errors_text() -> str:
    lines = ["| code | kind |", "|---|---|"]
    lines += [f"| {cls.code} | `{cls.kind}` |" for cls in errors.BY_KIND.values()]
    return "\n".join(lines) + "\n"


def _events_text() -> str:
    lines = ["| topic | events |", "|---|---|"]
    for topic in dict.fromkeys(types.EVENT_TOPICS.values()):
        names = ", ".join(f"`{name}`" for name, of in types.EVENT_TOPICS.items() if of == topic)
        lines.append(f"| `{topic}` | {names} |")
    return "\n".join(lines) + "\n"


def _type_text(schema: dict[str, Any]) -> str:
    """A JSON Schema as a few words, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name == "Empty":
            return "`{}`"
        of = next((method.name for method in METHODS.values() if method.params.__name__ == name), None)
        return f"[{name}](#struct-{name.lower()})" if of is None else f"[parameters of `{of}`](#{of.replace('.', '')})"
    if "anyOf" in schema:
        return " or ".join(_type_text(entry) for entry in schema["anyOf"])
    if "enum" in schema:
        text = " \\| ".join(f"`{value}`" for value in schema["enum"])
        return f"{text}, default `{schema['default']}`" if "default" in schema else text
    kind = schema.get("type", "any value")
    if kind == "array":
        items = schema.get("items", {})
        inner = ", ".join(map(_type_text, items)) if isinstance(items, list) else _type_text(items) if items else "any"
        return f"[{inner}]"
    bounds = [f"{sign} {schema[key]:,}" for key, sign in _BOUNDS.items() if key in schema]
    if schema.get("default") not in (None, "", {}, []):
        bounds.append(f"default `{str(schema['default']).lower()}`")
    return ", ".join([{"object": "map"}.get(kind, kind), *bounds])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "maxLength": "length ≤"}


def main() -> None:
    path = Path(sys.argv[1])
    path.write_text(rewrite(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
