"""What a setting may be: checks of values, and values from the text that a person typed.

A name or a value that is wrong is refused with a sentence that says where it stands, and what was meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import msgspec

from mlxd_client.errors import MlxdError
from mlxd_client.types import Persona, Template

from ..personas import check_persona, check_template
from .table import ENTRIES, JSON, NOT_IN_FILE, TYPES, Name, SettingsError, plain


class Origin(msgspec.Struct, frozen=True):
    """Where a value came from; `place` is the file and line, the variable or the flag."""

    kind: Literal["default", "file", "env", "flag"]
    place: str = ""

    def __str__(self) -> str:
        return {"default": "the default", "file": self.place, "env": f"the environment's {self.place}"}.get(
            self.kind, self.place
        )


def convert(
    name: str, value: object, origin: Origin | None, *, strict: bool, find: Callable[..., Origin] | None = None
) -> Any:
    """`value` as the type of setting `name`, or of one entry of a table, as `name.key`. `find` says, by its keys, where
    an entry stands, or a field of one."""
    if name.partition(".")[0] not in TYPES:
        raise SettingsError(
            f"there is no setting {name!r}{_told(origin)}{meant(name, TYPES)}", setting=name, place=str(origin)
        )
    setting, key = name_and_key(name)
    if key is None and setting in ENTRIES and isinstance(value, dict):
        return {
            entry: convert(f"{name}.{entry}", one, origin, strict=strict, find=find) for entry, one in value.items()
        }
    kind = TYPES[name] if key is None else ENTRIES[setting]
    try:
        if key is not None:
            msgspec.convert(key, Name)
        made = msgspec.convert(value, kind, strict=strict)
        if isinstance(made, Persona):
            check_persona(made)
        elif isinstance(made, Template):
            check_template(made)
        return made
    except ValueError as error:  # msgspec.ValidationError is one
        # "Expected `int`, got `str` - at `$.models[...].x`": the name is said already
        reason = re.sub(r" - at `.*\$\.?(.*)`$", lambda at: f" at {at[1]}" if at[1] else "", str(error))
        field = re.search(r" - at `\$\.([a-z_]+)", str(error))
        if unheard := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
            near = meant(unheard[1], dict.fromkeys(ENTRIES[setting].__struct_fields__))
            reason = f"it has a field {unheard[1]!r} that is none{near}"
        elif reason.startswith("Invalid enum value") and (choice := get_args(kind)):
            reason = f"it is one of {', '.join(map(str, choice))}"
        if find and key is not None:
            at = unheard or field
            origin = find(setting, key, at[1]) if at else find(setting, key)
        told = f"{name} cannot be {short(value)}{_told(origin)}: {reason[0].lower()}{reason[1:]}"
        raise SettingsError(told, setting=name, place=None if origin is None else str(origin)) from None


def _told(origin: Origin | None) -> str:
    return "" if origin is None else f" ({origin})"


def name_and_key(name: str) -> tuple[str, str | None]:
    """The setting that `setting` or `setting.key` names, and the key in its table. Raises SettingsError."""
    setting, dot, key = name.partition(".")
    if setting not in TYPES:
        raise unknown(name)
    if dot and setting not in ENTRIES:
        raise SettingsError(f"{setting} is no table: there is no {name}", setting=name)
    return setting, key if dot else None


def check(name: str, value: object) -> Any:
    """What a value for a setting, or for one entry of a table, is in the file. Raises SettingsError."""
    if name in NOT_IN_FILE:
        raise SettingsError(f"{name} cannot be set in a file, since clients do not read it", setting=name)
    made = _as_written(name, msgspec.to_builtins(convert(name, value, None, strict=True)))
    setting, key = name_and_key(name)
    if setting == "catalog":
        check_catalog(made if key is None else {key: made}, None)
    return made


def _as_written(name: str, value: Any) -> Any:
    """A plain value with numbers as people write them: 60, and not 60.0. Raises SettingsError for what TOML lacks."""
    if isinstance(value, dict):
        return {key: _as_written(name, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_written(name, one) for one in value]
    if value is None:
        raise SettingsError(f"{name} cannot hold null: there is none in config.toml", setting=name)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def from_text(name: str, text: str) -> Any:
    """The value that a person means who types it for a setting, or for one entry of a table. Raises SettingsError."""
    setting, key = name_and_key(name)
    kind = TYPES[setting] if key is None else ENTRIES[setting]
    if key is None:
        value = parse(name, text, None)
    else:
        value = text if plain(kind) in (str, float, int) else _json(name, text, None)
    return _as_written(name, msgspec.to_builtins(convert(name, value, None, strict=False)))


def unknown(name: str) -> SettingsError:
    return SettingsError(f"there is no setting {name!r}{meant(name, TYPES)}", setting=name)


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def meant(name: str, known: Mapping[str, object]) -> str:
    import difflib  # costs milliseconds, and only a mistake needs it

    matches = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def parse(name: str, text: str, origin: Origin | None) -> object:
    """A variable's or flag's text as its value: lists as shell words or JSON, tables as JSON, the rest as it is."""
    if plain(TYPES.get(name)) is list and not text.lstrip().startswith("["):
        import shlex

        try:
            return shlex.split(text)
        except ValueError as error:
            raise _unreadable(name, text, origin, str(error)) from None
    if name in JSON:
        return _json(name, text, origin)
    return text


def _json(name: str, text: str, origin: Origin | None) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unreadable(name, text, origin, f"it is no JSON: {error}") from None


def _unreadable(name: str, text: str, origin: Origin | None, why: str) -> SettingsError:
    place = "" if origin is None else f" ({origin})"
    return SettingsError(f"{name} cannot be {short(text)}{place}: {why}", setting=name)


def check_catalog(entries: dict[str, dict[str, Any]], origin: Origin | None) -> None:
    """Better now than when the first app asks for it."""
    from .. import catalog  # few have any

    try:
        catalog.load(entries)
    except MlxdError as error:
        place = None if origin is None else str(origin)
        raise SettingsError(f"{error}{f' ({place})' if place else ''}", setting="catalog", place=place) from None
