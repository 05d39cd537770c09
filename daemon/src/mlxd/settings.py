"""Every setting of the daemon in one typed struct, and where each value came from.

Sources, later ones win: defaults, `config.toml` in the home folder, the environment (`MLXD_` and the name in capitals),
command-line flags. A name or a value that is wrong is refused with a sentence that says where it stands.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from mlxd_client import paths
from mlxd_client.errors import MlxdError
from mlxd_client.types import Applies, Persona, Template

from .personas import check_persona, check_template

__all__ = [
    "APPLIES", "LIVE", "LOG_LEVELS", "MAX_FILE_BYTES", "NOT_BY_CLIENTS", "Loaded", "LogLevel", "Origin", "Settings",
    "SettingsError", "check", "config_file", "from_text", "load", "name_and_key", "read_file", "unknown",
]  # fmt: skip

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
# What people write by hand is far below; reading more would hold up whoever waits for it.
MAX_FILE_BYTES = 256 * 1024
MEMORY_SHARE = 0.7
RESERVE_SHARE, MOST_RESERVE_BYTES = 0.1, 2 * 1024**3
PROMPT_CACHE_SHARE = 0.1

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=4096)]
Title = Annotated[str, Meta(min_length=1, max_length=256)]
Models = Annotated[list[Name], Meta(max_length=256)]


class SettingsError(MlxdError):
    """A setting that cannot be used; the message names it, where it stands, and what would be right.

    Attributes:
        setting: its name, where it is one's.
        place: the file and line, the variable or the flag.
    """

    def __init__(self, message: str, *, setting: str | None = None, place: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting
        self.place = place


def default_worker_command() -> list[str]:
    return [sys.executable, "-m", "mlxd.worker"]


def default_fetcher_command() -> list[str]:
    return [sys.executable, "-m", "mlxd.fetch"]


def memory_budget() -> int:
    """Bytes that all models together may take by default: a share of the memory that this process may ever have."""
    return int(_capacity() * MEMORY_SHARE)


def memory_reserve() -> int:
    """Bytes of the system's memory that loads leave to others by default."""
    return min(int(_capacity() * RESERVE_SHARE), MOST_RESERVE_BYTES)


def prompt_cache_budget() -> int:
    """Bytes that one model's prompt cache may take by default: a share of what all models may."""
    return int(memory_budget() * PROMPT_CACHE_SHARE)


def _capacity() -> int:
    """Bytes of memory that this process and its workers may ever have: the machine's, or its container's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform != "linux":
        return physical
    from .measure import this_system

    return min(physical, this_system().read().capacity_bytes or physical)


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How one daemon runs. Seconds end in `_s`, sizes in `_bytes`.

    A daemon has one of these, which configuration.py alone changes, as a whole value at a time: its parts read what
    they need where they need it.

    Attributes:
        home: the folder that holds everything the daemon keeps, absolute.
        socket: where it listens, absolute.
        default_model: answers requests that name none.
        aliases: further names for models.
        keep_alive_s: a model that nobody used for so long is unloaded; -1 never, 0 at once.
        keep_alive: the same for single models, by id. Requests may say otherwise.
        pinned: models that are not unloaded when idle, nor to make room for others that are not pinned. What is asked
            by name is done all the same, and a pinned model that wants room may take another pinned one's.
        preload: models that are loaded when the daemon starts, in this order, once they are downloaded, and again where
            their worker died; they stay by their keep_alive. None is unloaded for them, but for pinned ones.
        personas: manners of answering that requests may name, each with a system turn, a model, and options that hold
            where a request says nothing of its own. See personas.md.
        templates: prompts that requests to `process` may name, with placeholders for what they bring. See personas.md.
        draft_models: a draft model for single models, by id, that guesses for them whenever they are loaded.
        context_length: how many tokens prompt and answer may have together, for single models by id; it shortens what
            a model's own config says, and never lengthens it.
        memory_budget_bytes: bounds all loaded models together.
        memory_reserve_bytes: of the memory that the system has left, loads leave so much to others. On Linux less than
            half of it counts as pressure, and less than a quarter as critical.
        memory_calm_s: memory pressure is over once there was none for so long.
        prompt_cache_bytes: what prompts and answers that are kept, for requests that begin alike, may hold in one model
            together with those that run; 0 keeps none.
        prompt_disk_cache_bytes: what is kept of prompts on disk, over all models, for after a model was unloaded; never
            more than a tenth of the free disk; 0 keeps none.
        kv_bits: models, by id, whose KV caches are quantised for requests that say nothing, and to how many bits.
        max_batch: how many requests decode together in one model.
        blas: the library that multiplies matrices where MLX runs on a Linux CPU. `auto` takes OpenBLAS, as installed
            with the daemon or the system, or else what MLX brings; `bundled` that one; an absolute path that library,
            or no model loads.
        queue_limit: how many requests may wait, over all models.
        requests_in_flight: how many requests one connection may have open.
        max_clients: how many connections are taken at a time; one more is told `queue_full`, and closed.
        subscriber_events, subscriber_bytes: how much may wait for one subscriber before it is told that it lags.
        event_log: how many events are kept for subscribers that resume.
        write_stall_s: a connection that takes nothing for so long is closed.
        drain_s: how long running requests may go on once the daemon is told to stop.
        handover_s: how long requests may go on in a daemon that another has taken over from.
        idle_exit_s: a daemon that a service manager starts on demand ends once nobody was connected, no model loaded
            and no job open for so long; 0 never. Elsewhere nobody would start it again, and it is not looked at.
        ready_s: how long a child may take to start.
        load_s: how long a model may take to load.
        heartbeat_s: the longest silence of a child before it counts as hung.
        worker_command: what runs a worker. Tests put a misbehaving one here.
        fetcher_command: what runs a fetcher.
        batch_slots: how many items of batch jobs run at a time, in slots that interactive requests leave free; never
            more than max_batch.
        batch_retry_s: how long an item of a batch job whose worker died under it again waits for its last try, and a
            job whose model could not be loaded.
        batch_keep_s: how long batch jobs are kept that have ended, with their prompts and results.
        batch_disk_bytes: what batch jobs may take on disk; the oldest that have ended go before others have to wait.
        system_root: the folder that holds the `proc` and `sys` that memory is measured by. Tests put files of their own
            there.
        download: what becomes of a request for a model of the hub that is not here: `ask` refuses it and tells what
            the download would take, `auto` downloads first, `never` asks nobody. Downloads that are asked for by name
            are always done, but with `never`.
        downloads: how many models are downloaded at a time.
        download_connections: how many connections one download uses.
        download_rate_bytes_s: what one download may take at most; 0 is no bound.
        download_floor_bytes_s, download_stall_s: one that brings less than the former for the latter is tried anew.
        catalog: further recommended models, by id, with the fields that the built-in catalog has.
        log_level: what the log holds.
        log_prompts: whether prompts and answers may be logged.
        slow_request_s: an interactive request that takes so long gets a line in the log that says where the time went;
            0 none.
        slow_first_token_s: the same for one whose answer takes so long to begin.
    """

    home: Name
    socket: Name
    default_model: Name = "mlxd/cleanup"
    aliases: dict[Name, Name] = {}
    keep_alive_s: KeepAlive = 300.0
    keep_alive: dict[Name, KeepAlive] = {}
    pinned: Models = []
    preload: Models = []
    personas: dict[Title, Persona] = {}
    templates: dict[Title, Template] = {}
    draft_models: dict[Name, Name] = {}
    context_length: dict[Name, Annotated[int, Meta(ge=8, le=16_777_216)]] = {}
    memory_budget_bytes: Annotated[int, Meta(ge=1)] = msgspec.field(default_factory=memory_budget)
    memory_reserve_bytes: Annotated[int, Meta(ge=0, le=2**53)] = msgspec.field(default_factory=memory_reserve)
    memory_calm_s: Seconds = 10.0
    prompt_cache_bytes: Annotated[int, Meta(ge=0, le=2**53)] = msgspec.field(default_factory=prompt_cache_budget)
    prompt_disk_cache_bytes: Annotated[int, Meta(ge=0, le=2**53)] = 4 * 1024**3
    kv_bits: dict[Name, Literal[4, 8]] = {}
    max_batch: Annotated[int, Meta(ge=1, le=1024)] = 32
    blas: Annotated[str, Meta(pattern=r"^(auto|bundled|/[^\0]+)$", max_length=4096)] = "auto"
    queue_limit: Count = 512
    requests_in_flight: Count = 1024
    max_clients: Count = 2048
    subscriber_events: Count = 1024
    subscriber_bytes: Annotated[int, Meta(ge=4096)] = 4 * 1024 * 1024
    event_log: Count = 4096
    write_stall_s: Seconds = 10.0
    drain_s: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    handover_s: Annotated[float, Meta(ge=0, le=86_400)] = 600.0
    idle_exit_s: Annotated[float, Meta(ge=0, le=31_536_000)] = 600.0
    ready_s: Seconds = 60.0
    load_s: Seconds = 600.0
    heartbeat_s: Seconds = 15.0
    worker_command: Annotated[list[Name], Meta(min_length=1)] = msgspec.field(default_factory=default_worker_command)
    fetcher_command: Annotated[list[Name], Meta(min_length=1)] = msgspec.field(default_factory=default_fetcher_command)
    batch_slots: Annotated[int, Meta(ge=1, le=1024)] = 8
    batch_retry_s: Seconds = 60.0
    batch_keep_s: Annotated[float, Meta(ge=0, le=315_360_000)] = 2_592_000.0
    batch_disk_bytes: Annotated[int, Meta(ge=65_536, le=2**53)] = 4 * 1024**3
    system_root: Annotated[str, Meta(pattern=r"^/[^\0]*$", max_length=4096)] = "/"
    download: Literal["ask", "auto", "never"] = "ask"
    downloads: Annotated[int, Meta(ge=1, le=64)] = 2
    download_connections: Annotated[int, Meta(ge=1, le=8)] = 8
    download_rate_bytes_s: Annotated[int, Meta(ge=0, le=2**53)] = 0
    download_floor_bytes_s: Annotated[int, Meta(ge=0, le=2**40)] = 4096
    download_stall_s: Seconds = 30.0
    catalog: dict[Name, dict[str, Any]] = {}
    log_level: LogLevel = "info"
    log_prompts: bool = False
    slow_request_s: Annotated[float, Meta(ge=0, le=86_400)] = 120.0
    slow_first_token_s: Annotated[float, Meta(ge=0, le=86_400)] = 15.0

    @property
    def log_file(self) -> Path:
        return Path(self.home) / "logs" / "mlxd.log"


class Origin(msgspec.Struct, frozen=True):
    """Where a value came from; `place` is the file and line, the variable or the flag."""

    kind: Literal["default", "file", "env", "flag"]
    place: str = ""

    def __str__(self) -> str:
        return {"default": "the default", "file": self.place, "env": f"the environment's {self.place}"}.get(
            self.kind, self.place
        )


class Loaded(msgspec.Struct, frozen=True):
    """The effective settings, each with its origin, sentences about what was passed over, and what they were made of
    besides the file."""

    settings: Settings
    origins: dict[str, Origin]
    warnings: list[str] = []
    env: dict[str, str] = {}
    flags: dict[str, object] = {}


# Clients find the daemon without reading its configuration, so the file cannot move it.
_NOT_IN_FILE = frozenset({"home", "socket"})
# The settings that `mlxd serve` has flags for; the others are set by `--set name=value`.
_OWN_FLAGS = frozenset({"home", "socket", "log_level", "log_prompts"})
# Read by others: the lookup of home and socket, and the tools of this repository.
_OTHER_VARIABLES = frozenset({"MLXD_HOME", "MLXD_SOCKET", "MLXD_HANDOVER"})


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
    for name in _NOT_IN_FILE:
        try:
            str(values[name]).encode()
        except UnicodeEncodeError:  # it stands in messages, which are text
            raise SettingsError(f"{name} cannot be {_short(values[name])}: that is no UTF-8", setting=name) from None
    origins = {name: Origin("default") for name in _TYPES}
    origins |= {name: Origin("env", f"MLXD_{name.upper()}") for name in _NOT_IN_FILE if env.get(f"MLXD_{name.upper()}")}
    if values["socket"] == paths.socket_path({**env, "MLXD_SOCKET": ""}):  # clients tell it a daemon that they start
        origins["socket"] = Origin("default")

    file = config_file(str(values["home"]))
    text = read_file(file) if text is None else text
    lines = _lines(text)
    for name, value in _from_text(text, lines, file):
        origins[name] = _in_file(lines, file, name)
        values[name] = _checked(name, value, origins[name], strict=True, find=partial(_in_file, lines, file))
    found, warnings = _from_env(env)
    for name, text in found.items():
        origin = Origin("env", f"MLXD_{name.upper()}")
        values[name], origins[name] = _checked(name, _parsed(name, text, origin), origin, strict=False), origin
    for name, value in given.items():
        origin = Origin("flag", f"--{name.replace('_', '-')}" if name in _OWN_FLAGS else f"--set {name}")
        if name not in _NOT_IN_FILE:
            value = _parsed(name, value, origin) if isinstance(value, str) else value
            values[name] = _checked(name, value, origin, strict=False)
        origins[name] = origin
    made = Settings(**values)  # type: ignore[arg-type]  # each was checked on its own
    if made.catalog:
        _check_catalog(made.catalog, origins["catalog"])
    return Loaded(made, origins, warnings, *sources)


def _check_catalog(entries: dict[str, dict[str, Any]], origin: Origin | None) -> None:
    """Better now than when the first app asks for it."""
    from . import catalog  # few have any

    try:
        catalog.load(entries)
    except MlxdError as error:
        place = None if origin is None else str(origin)
        raise SettingsError(f"{error}{f' ({place})' if place else ''}", setting="catalog", place=place) from None


_TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}


# Those that are lists or tables; as one text they are JSON.
def _plain(kind: Any) -> Any:
    """A type without its bounds, and without what it holds."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(kind) or kind


_JSON = frozenset(name for name, kind in _TYPES.items() if _plain(kind) in (dict, list))
# What the entries of those are that are tables.
_ENTRIES: dict[str, Any] = {name: get_args(kind)[1] for name, kind in _TYPES.items() if get_origin(kind) is dict}

# When a change takes effect, where that is not at once: see Applies in the wire's types.
_APPLIES: dict[str, Applies] = {
    "home": "restart", "socket": "restart", "system_root": "restart", "batch_disk_bytes": "restart",
    "write_stall_s": "connection",
    "draft_models": "load", "context_length": "load", "prompt_cache_bytes": "load", "prompt_disk_cache_bytes": "load",
    "kv_bits": "load", "max_batch": "load", "blas": "load", "ready_s": "load", "load_s": "load", "heartbeat_s": "load",
    "worker_command": "load",
    "fetcher_command": "download", "download_connections": "download", "download_rate_bytes_s": "download",
    "download_floor_bytes_s": "download", "download_stall_s": "download",
}  # fmt: skip
APPLIES: dict[str, Applies] = {name: _APPLIES.get(name, "now") for name in _TYPES}
LIVE = frozenset(name for name, when in APPLIES.items() if when != "restart")
# They name what is run. An app that may talk to the daemon, but is kept by the system from starting programs of its
# own, must not do so by way of the daemon: whoever changes them has to be able to write the file.
NOT_BY_CLIENTS = frozenset({"worker_command", "fetcher_command", "blas"})


def _checked(
    name: str, value: object, origin: Origin | None, *, strict: bool, find: Callable[..., Origin] | None = None
) -> Any:
    """`value` as the type of setting `name`, or of one entry of a table, as `name.key`. `find` says, by its keys, where
    an entry stands, or a field of one."""
    if name.partition(".")[0] not in _TYPES:
        raise SettingsError(
            f"there is no setting {name!r}{_told(origin)}{_near(name, _TYPES)}", setting=name, place=str(origin)
        )
    setting, key = name_and_key(name)
    if key is None and setting in _ENTRIES and isinstance(value, dict):
        return {
            entry: _checked(f"{name}.{entry}", one, origin, strict=strict, find=find) for entry, one in value.items()
        }
    kind = _TYPES[name] if key is None else _ENTRIES[setting]
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
            near = _near(unheard[1], dict.fromkeys(_ENTRIES[setting].__struct_fields__))
            reason = f"it has a field {unheard[1]!r} that is none{near}"
        elif reason.startswith("Invalid enum value") and (choice := get_args(kind)):
            reason = f"it is one of {', '.join(map(str, choice))}"
        if find and key is not None:
            at = unheard or field
            origin = find(setting, key, at[1]) if at else find(setting, key)
        told = f"{name} cannot be {_short(value)}{_told(origin)}: {reason[0].lower()}{reason[1:]}"
        raise SettingsError(told, setting=name, place=None if origin is None else str(origin)) from None


def _told(origin: Origin | None) -> str:
    return "" if origin is None else f" ({origin})"


def name_and_key(name: str) -> tuple[str, str | None]:
    """The setting that `setting` or `setting.key` names, and the key in its table. Raises SettingsError."""
    setting, dot, key = name.partition(".")
    if setting not in _TYPES:
        raise unknown(name)
    if dot and setting not in _ENTRIES:
        raise SettingsError(f"{setting} is no table: there is no {name}", setting=name)
    return setting, key if dot else None


def check(name: str, value: object) -> Any:
    """What a value for a setting, or for one entry of a table, is in the file. Raises SettingsError."""
    if name in _NOT_IN_FILE:
        raise SettingsError(f"{name} cannot be set in a file, since clients do not read it", setting=name)
    made = _as_written(name, msgspec.to_builtins(_checked(name, value, None, strict=True)))
    setting, key = name_and_key(name)
    if setting == "catalog":
        _check_catalog(made if key is None else {key: made}, None)
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
    kind = _TYPES[setting] if key is None else _ENTRIES[setting]
    if key is None:
        value = _parsed(name, text, None)
    else:
        value = text if _plain(kind) in (str, float, int) else _json(name, text, None)
    return _as_written(name, msgspec.to_builtins(_checked(name, value, None, strict=False)))


def unknown(name: str) -> SettingsError:
    return SettingsError(f"there is no setting {name!r}{_near(name, _TYPES)}", setting=name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(name: str, known: Mapping[str, object]) -> str:
    import difflib  # costs milliseconds, and only a mistake needs it

    matches = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


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
    for name in sorted(_NOT_IN_FILE & table.keys()):
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
        if name in _TYPES:
            found[name] = text
        elif near := _near(name, _TYPES):  # others may well have variables of their own that begin like ours
            warnings.append(f"{variable} in the environment is no setting{near}")
    return found, warnings


def _parsed(name: str, text: str, origin: Origin | None) -> object:
    """A variable's or flag's text as its value: lists as shell words or JSON, tables as JSON, the rest as it is."""
    if _plain(_TYPES.get(name)) is list and not text.lstrip().startswith("["):
        import shlex

        try:
            return shlex.split(text)
        except ValueError as error:
            raise _unreadable(name, text, origin, str(error)) from None
    if name in _JSON:
        return _json(name, text, origin)
    return text


def _json(name: str, text: str, origin: Origin | None) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unreadable(name, text, origin, f"it is no JSON: {error}") from None


def _unreadable(name: str, text: str, origin: Origin | None, why: str) -> SettingsError:
    place = "" if origin is None else f" ({origin})"
    return SettingsError(f"{name} cannot be {_short(text)}{place}: {why}", setting=name)
