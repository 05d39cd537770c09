"""Every setting of the daemon in one typed struct, and what holds of each: its type, and when a change takes effect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from mlxd_client.errors import MlxdError
from mlxd_client.types import Applies, Persona, Template

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
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
    from ..measure import this_system

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


# Their types, by their names.
TYPES: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}


# Those that are lists or tables; as one text they are JSON.
def plain(kind: Any) -> Any:
    """A type without its bounds, and without what it holds."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(kind) or kind


JSON = frozenset(name for name, kind in TYPES.items() if plain(kind) in (dict, list))
# What the entries of those are that are tables.
ENTRIES: dict[str, Any] = {name: get_args(kind)[1] for name, kind in TYPES.items() if get_origin(kind) is dict}

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
APPLIES: dict[str, Applies] = {name: _APPLIES.get(name, "now") for name in TYPES}
LIVE = frozenset(name for name, when in APPLIES.items() if when != "restart")
# They name what is run. An app that may talk to the daemon, but is kept by the system from starting programs of its
# own, must not do so by way of the daemon: whoever changes them has to be able to write the file.
NOT_BY_CLIENTS = frozenset({"worker_command", "fetcher_command", "blas"})
# Clients find the daemon without reading its configuration, so the file cannot move it.
NOT_IN_FILE = frozenset({"home", "socket"})
