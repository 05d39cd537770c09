"""Where settings come from; later ones win: defaults, `config.toml` in the home folder, the environment (`MLXD_` and
the name in capitals), command-line flags. Each value is told with its origin."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec

from mlxd_client import paths

from .table import NOT_IN_FILE, TYPES, Settings, SettingsError
from .values import Origin, check_catalog, convert, meant, parse, short

# What people write by hand is far below; reading more would hold up whoever waits for it.
MAX_FILE_BYTES = 256 * 1024
# The settings that `mlxd serve` has flags for; the others are set by `--set name=value`.
_OWN_FLAGS = frozenset({"home", "socket", "log_level", "log_prompts"})
# Read by others: the lookup of home and socket, and the tools of this repository.
_OTHER_VARIABLES = frozenset({"MLXD_HOME", "MLXD_SOCKET", "MLXD_HANDOVER"})


class Loaded(msgspec.Struct, frozen=True):
    """The effective settings, each with its origin, sentences about what was passed over, and what they were made of
    besides the file."""

    settings: Settings
    origins: dict[str, Origin]
    warnings: list[str] = []
    env: dict[str, str] = {}
    flags: dict[str, object] = {}


def config_file(home: str) -> Path:
    """Where the settings of a daemon with this home folder stand."""
    return Path(home) / "config.toml"


def load(
    env: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None, text: str | None = None
) -> Loaded:
    """The settings for this environment and these flags.

    Args:
        env: the environment; os.environ where not given.
        flags: values by field name; None counts as not given. `home` and `socket` come before everything else.
        text: what config.toml says; read from there where not given.

    Raises:
        SettingsError: something stands there that is not a setting or not a value for it.
        mlxd_client.errors.SocketPathTooLong: MLXD_SOCKET is no path that a socket can have.
    """
    env = dict(os.environ if env is None else env)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    sources = dict(env), dict(given)
    for name, variable in (("home", "MLXD_HOME"), ("socket", "MLXD_SOCKET")):
        if name in given:
            env[variable] = str(given[name])
    values: dict[str, object] = {"home": paths.home(env), "socket": paths.socket_path(env)}
    for name in NOT_IN_FILE:
        try:
            str(values[name]).encode()
        except UnicodeEncodeError:  # it stands in messages, which are text
            raise SettingsError(f"{name} cannot be {short(values[name])}: that is no UTF-8", setting=name) from None
    origins = {name: Origin("default") for name in TYPES}
    origins |= {name: Origin("env", f"MLXD_{name.upper()}") for name in NOT_IN_FILE if env.get(f"MLXD_{name.upper()}")}
    if values["socket"] == paths.socket_path({**env, "MLXD_SOCKET": ""}):  # clients tell it a daemon that they start
        origins["socket"] = Origin("default")

    file = config_file(str(values["home"]))
    text = read_file(file) if text is None else text
    lines = _lines(text)
    for name, value in _from_text(text, lines, file):
        origins[name] = _in_file(lines, file, name)
        values[name] = convert(name, value, origins[name], strict=True, find=partial(_in_file, lines, file))
    found, warnings = _from_env(env)
    for name, text in found.items():
        origin = Origin("env", f"MLXD_{name.upper()}")
        values[name], origins[name] = convert(name, parse(name, text, origin), origin, strict=False), origin
    for name, value in given.items():
        origin = Origin("flag", f"--{name.replace('_', '-')}" if name in _OWN_FLAGS else f"--set {name}")
        if name not in NOT_IN_FILE:
            value = parse(name, value, origin) if isinstance(value, str) else value
            values[name] = convert(name, value, origin, strict=False)
        origins[name] = origin
    made = Settings(**values)  # type: ignore[arg-type]  # each was checked on its own
    if made.catalog:
        check_catalog(made.catalog, origins["catalog"])
    return Loaded(made, origins, warnings, *sources)


def read_file(path: Path) -> str:
    """The text of config.toml; empty where there is none. Raises SettingsError."""
    try:
        with open(path, "rb", opener=_unblocked) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SettingsError(f"{path} is no file", place=str(path))
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise SettingsError(f"{path} is larger than {MAX_FILE_BYTES} bytes", place=str(path))
        return data.decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}", place=str(path)) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no TOML: {error}", place=str(path)) from None


def _unblocked(path: str, flags: int) -> int:
    """Opened without waiting, should it be a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _from_text(text: str, lines: _Lines, path: Path) -> list[tuple[str, object]]:
    """What config.toml sets."""
    import tomllib

    if not text:
        return []
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        line = re.search(r"line (\d+)", str(error))
        place = f"{path}:{line[1]}" if line else str(path)
        raise SettingsError(f"{path} is no TOML: {error}", place=place) from None
    for name in sorted(NOT_IN_FILE & table.keys()):
        origin = _in_file(lines, path, name)
        told = f"{name} cannot be set in a file ({origin}), since clients do not read it: use MLXD_{name.upper()}"
        raise SettingsError(told, setting=name, place=origin.place)
    return list(table.items())


# What is set in a file: the keys, outermost first, and the line's number. As a mapping by the first key.
_Lines = dict[str, list[tuple[tuple[str, ...], int]]]
_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_SETS = re.compile(rf"\s*(?:(\[\[?)\s*)?({_KEY}(?:\s*\.\s*{_KEY})*)\s*[=\]]")


def _lines(text: str) -> _Lines:
    """Where a text sets what; tables within a line count as one."""
    found: _Lines = {}
    table: tuple[str, ...] = ()
    quotes = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not quotes and (said := _SETS.match(line)):
            keys = tuple(key.strip("\"'") for key in re.findall(_KEY, said[2]))
            table, keys = (keys, keys) if said[1] else (table, table + keys)
            found.setdefault(keys[0], []).append((keys, number))
        for marks in ('"""', "'''"):  # within a text of several lines nothing is set
            if quotes in ("", marks) and line.count(marks) % 2:
                quotes = "" if quotes else marks
    return found


def _in_file(lines: _Lines, path: Path, *wanted: str) -> Origin:
    """The line that sets a value, found by its keys: the first that says most of them; 1 where none says any."""
    most, best = 0, 1
    for keys, number in lines.get(wanted[0], ()):
        agree = min(len(keys), len(wanted))
        if agree > most and keys[:agree] == wanted[:agree]:
            most, best = agree, number
        if most == len(wanted):
            break
    return Origin("file", f"{path}:{best}")


def _from_env(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Settings among the variables, empty ones left out, and a sentence about each that looks like a typing error."""
    found: dict[str, str] = {}
    warnings: list[str] = []
    for variable, text in env.items():
        name = variable.removeprefix("MLXD_").lower()
        if not variable.startswith("MLXD_") or variable in _OTHER_VARIABLES or not text:
            continue
        if name in TYPES:
            found[name] = text
        elif near := meant(name, TYPES):  # others may well have variables of their own that begin like ours
            warnings.append(f"{variable} in the environment is no setting{near}")
    return found, warnings
