"""What a bug report holds: each part gathered by itself, stripped of secrets and of what people said, and packed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxd.redact import Redactor
    from mlxd.settings import Loaded
    from mlxd_client import Client

__all__ = ["gather", "pack"]

# Bounds of one part, of the end of the log that is looked at for crashes, and of how many of those are told.
_PART_BYTES = 1_000_000
_LOG_TAIL_BYTES = 4_000_000
_CRASHES = 50
# A daemon that does not answer for so long is part of the problem, and no reason to have no report.
PATIENCE_S = 10.0
_VARIABLES = ("MLXD_", "HF_", "MLX_", "METAL_", "OMP_", "OPENBLAS_", "PYTHON")
_MORE_VARIABLES = frozenset(
    {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "lang", "lc_all", "term", "no_color", "xdg_data_home",
     "xdg_cache_home", "xdg_runtime_dir", "notify_socket", "listen_fds"}
)  # fmt: skip


def gather(socket: str | None, lines: int) -> dict[str, bytes]:
    """Everything, by the name of its file; each of bounded size.

    Args:
        socket: where the daemon listens; None for where it always does.
        lines: how many of the log's last ones.
    """
    from mlxd import redact, settings
    from mlxd_client import paths

    redactor = redact.Redactor(redact.secrets_of(os.environ), os.path.expanduser("~"))
    made: dict[str, bytes] = {}

    def add(name: str, gather: Callable[[], Any]) -> None:
        """A part that fails says so, and costs no other part."""
        try:
            found = gather()
            part = found if isinstance(found, bytes) else _json(redactor.value(found))
        except Exception as error:
            part = _json({"missing": redactor.text(f"{type(error).__name__}: {error}")[:500]}, indent=None)
        made[name] = part if len(part) <= _PART_BYTES else part[:_PART_BYTES] + b"\n(cut off here)\n"

    add("versions.json", _versions)
    add("environment.json", _environment)
    add("settings.json", lambda: _settings(settings.load(), redactor))
    add("doctor.json", _findings)
    _add_daemon(socket, add)
    add("service.json", lambda: _service(settings.load()))
    log = settings.Settings(home=paths.home(), socket="/").log_file  # wherever settings are wrong, the log is not moved
    add("log.jsonl", lambda: _log(log, lines, redactor))
    add("crashes.json", lambda: _crashes(log))
    return made


def _json(value: Any, indent: int | None = 1) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _versions() -> dict[str, Any]:
    import platform
    from importlib.metadata import distributions

    import psutil

    packages = {str(found.metadata["Name"]): found.version for found in distributions() if found.metadata["Name"]}
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version, "executable": sys.executable,
        "os": [platform.system(), platform.release(), platform.machine()], "macos": platform.mac_ver()[0],
        "cpus": os.cpu_count(), "memory_bytes": memory.total, "available_bytes": memory.available,
        "swap_used_bytes": swap.used, "packages": dict(sorted(packages.items())),
    }  # fmt: skip


def _environment() -> dict[str, str]:
    """Variables that change what mlxd does; of all others not even the names."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) or name.lower() in _MORE_VARIABLES
    }


def _settings(loaded: Loaded, redactor: Redactor) -> bytes:
    """Each by its own name, so that what is known of that is heeded."""
    import msgspec

    values: dict[str, Any] = msgspec.to_builtins(loaded.settings)
    return _json(
        {
            name: {"value": redactor.value(value, name), "from": redactor.text(str(loaded.origins[name]))}
            for name, value in values.items()
        }
    )


def _findings() -> list[dict[str, str]]:
    from . import doctor

    return [finding._asdict() for finding in doctor.examine()]


def _service(loaded: Loaded) -> Any:
    import msgspec

    from mlxd.service.manager import manager_for
    from mlxd.service.spec import describe

    return msgspec.to_builtins(manager_for(describe(loaded.settings)).state())


def _add_daemon(socket: str | None, add: Callable[[str, Callable[[], Any]], None]) -> None:
    """What the daemon says of itself, where one runs."""
    import msgspec

    from mlxd_client import Client
    from mlxd_client.errors import ClientError

    asked: tuple[tuple[str, Callable[[Client], Any]], ...] = (
        ("status.json", lambda client: client.status()),
        ("stats.json", lambda client: client.stats()),
        ("models.json", lambda client: client.models()),
        ("stories.json", lambda client: client.stories()),
        ("jobs.json", lambda client: client.jobs()),
        ("caches.json", lambda client: client.cache()),
        ("daemon-settings.json", lambda client: client.config_get()),
    )
    client = Client(socket, name="mlxd-bug-report", start=False, reconnect=False, timeout_s=PATIENCE_S)
    with contextlib.closing(client):  # it connects with the first question, which may well fail
        away: list[ClientError] = []

        def asking(ask: Callable[[Client], Any]) -> Any:
            if away:  # one that did not answer once is not waited for again
                raise away[0]
            try:
                return msgspec.to_builtins(ask(client))
            except ClientError as error:
                away.append(error)
                raise

        for name, ask in asked:
            add(name, lambda ask=ask: asking(ask))  # type: ignore[misc]


# --- the log ------------------------------------------------------------------------------------------------------


def _log(path: Path, lines: int, redactor: Redactor) -> bytes:
    """The last lines, each as it may be told; what is no JSON is not known well enough to be told."""
    kept: list[bytes] = []
    size = 0
    newest_first = reversed(list(_entries(path))[-lines:]) if lines > 0 else ()
    for entry in newest_first:  # there may be no room for the oldest
        told = {"left_out": "a line that is no JSON"} if entry is None else redactor.value(entry)
        kept.append(json.dumps(told, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        size += len(kept[-1])
        if size > _PART_BYTES:
            kept.pop()
            break
    return b"".join(reversed(kept))


def _crashes(path: Path) -> list[dict[str, Any]]:
    """The last children that ended unasked, and how."""
    found = [
        entry
        for entry in _entries(path)
        if entry is not None and entry.get("event") in ("child ended", "worker ended", "fetcher ended")
        and entry.get("cause") != "stopped"
    ]  # fmt: skip
    return found[-_CRASHES:]


def _entries(path: Path) -> Iterator[dict[str, Any] | None]:
    """The log's last megabytes, over the last rotation too, a line at a time; None for one that is no JSON."""
    for line in _lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        yield entry if isinstance(entry, dict) else None


def _lines(path: Path) -> Iterable[bytes]:
    left, chunks = _LOG_TAIL_BYTES, []
    for part in (path, path.with_name(path.name + ".1")):
        try:
            with open(part, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - left))
                chunk = file.read(left)
        except FileNotFoundError:
            continue
        if size > left:
            chunk = chunk.partition(b"\n")[2]  # the rest of a line
        chunks.append(chunk)
        left -= len(chunk)
        if left <= 0:
            break
    return [line for chunk in reversed(chunks) for line in chunk.splitlines() if line.strip()]


def pack(parts: dict[str, bytes], stream: Any) -> None:
    """A gzipped tar archive that names neither its maker nor any folder of theirs."""
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, part in parts.items():
            entry = tarfile.TarInfo(f"mlxd-bug-report/{name}")
            entry.size, entry.mode, entry.mtime = len(part), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(part))
