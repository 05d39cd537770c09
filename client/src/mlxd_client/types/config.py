"""The daemon's settings: what they are, where each came from, changing them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from .base import ErrorObject, Name, Params, Result

# When a change takes effect: at once; for what is connected, loaded or downloaded from then on; with the next daemon.
Applies = Literal["now", "connection", "load", "download", "restart"]
# A setting, or `setting.key`: one entry of a setting that is a table. All after the first dot is the key.
SettingName = Annotated[str, Meta(min_length=1, max_length=4200)]


class SettingValue(Result, kw_only=True):
    """`value` is what the daemon runs with. `origin` is where it came from; `place` is the file and line, the variable
    or the flag. `applies` says when a change takes effect: `now`, with what is connected, loaded or downloaded from
    then on (`connection`, `load`, `download`), or with the next daemon (`restart`). `configured` is set where it was
    changed and waits for that."""

    value: Any
    origin: Literal["default", "file", "environment", "flag"]
    applies: Applies
    place: str | None = None
    configured: Any = UNSET


class GetConfigParams(Params, kw_only=True):
    """`names` are settings; unset means all."""

    names: Annotated[list[Name], Meta(max_length=256)] | UnsetType = UNSET


class ConfigResult(Result, kw_only=True):
    """`path` is the file, be it there or not. `error`: as it is now it cannot be used, and what it said before stands.
    `restart` names the settings that wait for the next daemon. `warnings` are sentences about variables of the
    environment that look like typing errors."""

    path: str
    settings: dict[str, SettingValue]
    error: ErrorObject | None = None
    restart: list[str] = []
    warnings: list[str] = []


class SetConfigParams(Params, kw_only=True):
    """`values` go to the file, `unset` names what is taken out of it; all of that or, where anything is wrong, nothing.
    A name is that of a setting, or `setting.key` for one entry of a table: all after the first dot is the key."""

    values: Annotated[dict[SettingName, Any], Meta(max_length=256)] = {}
    unset: Annotated[list[SettingName], Meta(max_length=256)] = []


class ConfigChange(Result, kw_only=True):
    """What became of it. `changed` settings are other than before, at once or as `applies` says; `restart` ones wait
    for the next daemon. `overridden` ones stand in the file and have no effect, since what is named there wins."""

    path: str
    changed: list[str] = []
    restart: list[str] = []
    overridden: dict[str, str] = {}
