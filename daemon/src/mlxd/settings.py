"""Every setting of the daemon in one typed struct, and where each value came from.

Sources, later ones win: defaults, `config.toml` in the home folder, the environment (`MLXD_` and the name in capitals),
command-line flags. A name or a value that is wrong is refused with a sentence that says where it stands.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from mlxd_client import paths
from mlxd_client.errors import MlxdError

__all__ = ["LOG_LEVELS", "Loaded", "LogLevel", "Origin", "Settings", "SettingsError", "load", "unknown"]

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
MEMORY_SHARE = 0.7
PROMPT_CACHE_SHARE = 0.1

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
KeepAlive = Annotated[float, Meta(ge=-1, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=4096)]
Models = Annotated[list[Name], Meta(max_length=256)]


class SettingsError(MlxdError):
    """A setting that cannot be used; the message names it, where it stands, and what would be right."""


def default_worker_command() -> list[str]:
    return [sys.executable, "-m", "mlxd.worker"]


def default_fetcher_command() -> list[str]:
    return [sys.executable, "-m", "mlxd.fetch"]


def memory_budget() -> int:
    """Bytes that all models together may take by default: a share of the memory that this process may ever have."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(physical, _control_group_limit() or physical) * MEMORY_SHARE)


def prompt_cache_budget() -> int:
    """Bytes that one model's prompt cache may take by default: a share of what all models may."""
    return int(memory_budget() * PROMPT_CACHE_SHARE)


def _control_group_limit() -> int | None:
    """The limit that a Linux container sets, or None. See cgroup-v2.rst, memory.max."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one daemon runs. Seconds end in `_s`, sizes in `_bytes`.

    Attributes:
        home: the folder that holds everything the daemon keeps, absolute.
        socket: where it listens, absolute.
        default_model: answers requests that name none.
        aliases: further names for models.
        keep_alive_s: a model that nobody used for so long is unloaded; -1 never, 0 at once.
        keep_alive: the same for single models, by id. Requests may say otherwise.
        pinned: models that are not unloaded when idle, nor to make room for others that are not pinned. What is asked
            by name is done all the same, and a pinned model that wants room may take another pinned one's.
        preload: models that are loaded when the daemon starts, in this order, and again where their worker died; they
            stay by their keep_alive. None is unloaded for them, but for pinned ones.
        draft_models: a draft model for single models, by id, that guesses for them whenever they are loaded.
        context_length: how many tokens prompt and answer may have together, for single models by id; it shortens what
            a model's own config says, and never lengthens it.
        memory_budget_bytes: bounds all loaded models together.
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
        max_clients: how many connections are taken at a time.
        subscriber_events, subscriber_bytes: how much may wait for one subscriber before it is told that it lags.
        event_log: how many events are kept for subscribers that resume.
        write_stall_s: a connection that takes nothing for so long is closed.
        drain_s: how long running requests may go on once the daemon is told to stop.
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
        slow_request_s: a request that takes so long gets a line in the log that says where the time went; 0 none.
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
    draft_models: dict[Name, Name] = {}
    context_length: dict[Name, Annotated[int, Meta(ge=8, le=16_777_216)]] = {}
    memory_budget_bytes: Annotated[int, Meta(ge=1)] = msgspec.field(default_factory=memory_budget)
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
    """The effective settings, each with its origin, and sentences about what was passed over."""

    settings: Settings
    origins: dict[str, Origin]
    warnings: list[str] = []


# Clients find the daemon without reading its configuration, so the file cannot move it.
_NOT_IN_FILE = frozenset({"home", "socket"})
# The settings that `mlxd serve` has flags for; the others are set by `--set name=value`.
_OWN_FLAGS = frozenset({"home", "socket", "log_level", "log_prompts"})
# Read by others: the lookup of home and socket, and the tools of this repository.
_OTHER_VARIABLES = frozenset({"MLXD_HOME", "MLXD_SOCKET"})


def load(env: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None) -> Loaded:
    """The settings for this environment and these flags.

    Args:
        env: the environment; os.environ where not given.
        flags: values by field name; None counts as not given. `home` and `socket` come before everything else.

    Raises:
        SettingsError: something stands there that is not a setting or not a value for it.
        mlxd_client.errors.SocketPathTooLong: MLXD_SOCKET is no path that a socket can have.
    """
    env = dict(os.environ if env is None else env)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name, variable in (("home", "MLXD_HOME"), ("socket", "MLXD_SOCKET")):
        if name in given:
            env[variable] = str(given[name])
    values: dict[str, object] = {"home": paths.home(env), "socket": paths.socket_path(env)}
    origins = {name: Origin("default") for name in _TYPES}
    origins |= {name: Origin("env", f"MLXD_{name.upper()}") for name in _NOT_IN_FILE if env.get(f"MLXD_{name.upper()}")}

    file = Path(str(values["home"])) / "config.toml"
    for name, value, origin in _from_file(file):
        values[name], origins[name] = _checked(name, value, origin, strict=True), origin
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
    return Loaded(Settings(**values), origins, warnings)  # type: ignore[arg-type]  # each was checked on its own


_TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}
# Those that are lists or tables; as one text they are JSON.
_JSON = frozenset(
    name
    for name, kind in _TYPES.items()
    if get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) in (dict, list)
)


def _checked(name: str, value: object, origin: Origin, *, strict: bool) -> object:
    """`value` as the type of setting `name`."""
    if name not in _TYPES:
        raise SettingsError(f"there is no setting {name!r} ({origin}){_near(name, _TYPES)}")
    try:
        return msgspec.convert(value, _TYPES[name], strict=strict)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.models[...].x`": the name is said already
        reason = re.sub(r" - at `.*\$\.?(.*)`$", lambda at: f" at {at[1]}" if at[1] else "", str(error))
        raise SettingsError(f"{name} cannot be {_short(value)} ({origin}): {reason[0].lower()}{reason[1:]}") from None


def unknown(name: str) -> SettingsError:
    return SettingsError(f"there is no setting {name!r}{_near(name, _TYPES)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(name: str, known: Mapping[str, object]) -> str:
    import difflib  # costs milliseconds, and only a mistake needs it

    matches = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _from_file(path: Path) -> list[tuple[str, object, Origin]]:
    """What config.toml sets, if it is there."""
    import tomllib

    try:
        text = path.read_text("utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} is no TOML: {error}") from None
    out: list[tuple[str, object, Origin]] = []
    for name, value in table.items():
        origin = Origin("file", f"{path}:{_line(text, name)}")
        if name in _NOT_IN_FILE:
            raise SettingsError(
                f"{name} cannot be set in a file ({origin}), since clients do not read it: use MLXD_{name.upper()}"
            )
        out.append((name, value, origin))
    return out


def _line(text: str, name: str) -> int:
    """The line that first mentions a top-level name, as key or table; 1 where it hides behind quotes."""
    found = re.search(rf"^[ \t]*\[?[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*[.=\]]", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


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


def _parsed(name: str, text: str, origin: Origin) -> object:
    """A variable's or flag's text as its value: lists as shell words or JSON, tables as JSON, the rest as it is."""
    if name in ("worker_command", "fetcher_command") and not text.lstrip().startswith("["):
        import shlex

        try:
            return shlex.split(text)
        except ValueError as error:
            raise SettingsError(f"{name} cannot be {_short(text)} ({origin}): {error}") from None
    if name in _JSON:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{name} cannot be {_short(text)} ({origin}): it is no JSON: {error}") from None
    return text
