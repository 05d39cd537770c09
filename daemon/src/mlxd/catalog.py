"""The recommended models: those of catalog.toml, and what the user's settings add or change. Reads that one file only.

What is known of this machine (`state`, `fits`) is the daemon's to fill in. Nothing is kept: who wants the catalog,
loads it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlxd_client.errors import MlxdError
from mlxd_client.types import CatalogEntry

__all__ = ["CatalogError", "load"]

# What a worker takes beside its weights, at the least: see store/folder.py.
_WORKER_BYTES = 128 * 1024 * 1024

_Bytes = Annotated[int, Meta(ge=1, le=2**53)]
_Text = Annotated[str, Meta(max_length=256)]
_Use = Annotated[str, Meta(min_length=1, max_length=32)]


class CatalogError(MlxdError, ValueError):
    """An entry that cannot be used; the message names it, its field, and what would be right."""


class _Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An entry as it is written. What is left out is not known, and 0 in the entry that is made of it."""

    name: _Text = ""
    uses: list[_Use] = []
    size_bytes: _Bytes | None = None
    memory_bytes: _Bytes | None = None
    smallest_mac_gb: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    note: _Text = ""
    default: bool = False


def load(user: Mapping[str, Mapping[str, Any]]) -> list[CatalogEntry]:
    """The built-in entries in their order, then the user's own in theirs.

    Args:
        user: by id; a field given here replaces the built-in one. A default of the user's is the only one.

    Raises: CatalogError, which is a ValueError too.
    """
    own = {model: _fields(model, written) for model, written in user.items()}
    defaults = [model for model, fields in own.items() if fields.default]
    if len(defaults) > 1:
        raise CatalogError(f"the catalog can have one default, not both {defaults[0]} and {defaults[1]}")
    written: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text("utf-8"))
    if defaults:
        for fields in written.values():
            fields.pop("default", None)
    for model, changes in user.items():
        written[model] = {**written.get(model, {}), **changes}
    return [_entry(model, _fields(model, fields)) for model, fields in written.items()]


def _fields(model: str, written: Mapping[str, Any]) -> _Fields:
    if not model or len(model) > 4096:
        raise CatalogError("the catalog has an entry without an id, or with one that is longer than 4,096 characters")
    if not isinstance(written, Mapping):
        raise CatalogError(f'catalog."{model}" must be a table of fields')
    for name in written:
        if name not in _Fields.__struct_fields__:
            known = ", ".join(_Fields.__struct_fields__)
            raise CatalogError(f'catalog."{model}" has a field {name!r} that is none: there are {known}')
    for name, value in written.items():
        try:
            msgspec.convert({name: value}, _Fields)
        except msgspec.ValidationError as error:
            reason = str(error).split(" - at ")[0]
            raise CatalogError(
                f'catalog."{model}": {name} cannot be {value!r:.80}: {reason[0].lower()}{reason[1:]}'
            ) from None
    return msgspec.convert(dict(written), _Fields)


def _entry(model: str, fields: _Fields) -> CatalogEntry:
    size = fields.size_bytes or 0
    return CatalogEntry(
        model=model,
        name=fields.name,
        uses=fields.uses,
        size_bytes=size,
        memory_bytes=fields.memory_bytes or (size + _WORKER_BYTES if size else 0),
        smallest_mac_gb=fields.smallest_mac_gb or 0,
        note=fields.note,
        default=fields.default,
    )
