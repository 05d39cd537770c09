"""Writes clients/typescript/src/types.ts from the daemon's own description of its interface.

python3 tools/dev.py draw
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxd.server.document import openrpc

FILE = Path(__file__).resolve().parent.parent / "clients" / "typescript" / "src" / "types.ts"
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def source() -> str:
    document = openrpc("")
    schemas: dict[str, Any] = document["components"]["schemas"]
    parts = ["// Written by `tools/dev.py draw` from the daemon's method table; what the fields mean: docs/wire.md."]
    parts += [_struct(name, schema) for name, schema in schemas.items()]
    lines = [
        f"  {json.dumps(method['name'])}: {{ params: {_params(method)}; result: {_type(method['result']['schema'])} }};"
        for method in document["methods"]
    ]
    parts.append(
        "/** Every method, with what it takes and answers. */\nexport interface Methods {\n" + "\n".join(lines) + "\n}"
    )
    kinds = " | ".join(json.dumps(kind) for kind in document["components"]["errors"])
    parts.append(f"/** The stable names of failures. */\nexport type ErrorKind = {kinds};")
    return "\n\n".join(parts) + "\n"


def _params(method: dict[str, Any]) -> str:
    fields = "; ".join(
        f"{param['name']}{'' if param['required'] else '?'}: {_type(param['schema'])}" for param in method["params"]
    )
    return f"{{ {fields} }}" if fields else "Record<string, never>"


def _struct(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    lines = [
        f"  {field}{'' if field in required else '?'}: {_type(value)};"
        for field, value in schema.get("properties", {}).items()
    ]
    return (
        f"export interface {name} {{\n" + "\n".join(lines) + "\n}"
        if lines
        else f"export type {name} = Record<string, never>;"
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(entry) for entry in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items", {})
        if isinstance(items, list):
            return f"[{', '.join(map(_type, items))}]"
        inner = _type(items) if items else "unknown"
        return f"({inner})[]" if "|" in inner else f"{inner}[]"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"Record<string, {_type(values) if isinstance(values, dict) and values else 'unknown'}>"
    return _PLAIN.get(str(kind), "unknown")


def files() -> dict[Path, bytes]:
    return {FILE: source().encode()}
