"""What is installed as a service: which command, for which home, with which of the caller's variables."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mlxd_client import paths
from mlxd_client.errors import MlxdError

from ..notify import PATIENCE_S
from ..settings import Settings
from ..wholefiles import write_whole

__all__ = ["ServiceError", "ServiceSpec", "describe", "write_private"]

# What a shell may have set and a service manager does not know. Tokens stay out: they have files of their own.
_KEPT = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "XDG_DATA_HOME", "XDG_CACHE_HOME")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class ServiceError(MlxdError):
    """The service manager refused, or there is none; the message says what to do."""


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    name: of the service, unlike that of any other home's.
    command: absolute, with its arguments.
    environment: what the service gets beside the manager's own.
    home, socket, log_file: absolute paths.
    stop_s: how long the daemon may take to stop, in whole seconds.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    home: str
    socket: str
    log_file: str
    stop_s: int

    @property
    def program(self) -> list[str]:
        """The command without what `mlxd` itself is told."""
        return self.command[: self.command.index("serve")]


def describe(settings: Settings, env: Mapping[str, str] | None = None) -> ServiceSpec:
    """The service for these settings, as the caller's environment has them.

    Raises:
        ServiceError: a path or variable holds what no service manager could take.
    """
    env = os.environ if env is None else env
    default = {name: value for name, value in env.items() if name not in ("MLXD_HOME", "MLXD_SOCKET")}
    own = settings.home == paths.home(default) and settings.socket == paths.socket_path(default)
    digest = hashlib.sha256(os.fsencode(f"{settings.home}\0{settings.socket}")).hexdigest()[:8]
    kept = {name: value for name, value in env.items() if value and (name in _KEPT or name.lower() in _PROXIES)}
    kept |= {name: value for name, value in env.items() if value and name.startswith("MLXD_")}
    if not own:
        kept |= {"MLXD_HOME": settings.home, "MLXD_SOCKET": settings.socket}
    spec = ServiceSpec(
        name="mlxd" if own else f"mlxd-{digest}",
        command=[sys.executable, "-m", "mlxd", "serve", "--managed"],
        environment=dict(sorted(kept.items())),
        home=settings.home,
        socket=settings.socket,
        log_file=str(settings.log_file),
        stop_s=int(settings.drain_s) + PATIENCE_S,
    )
    for text in (*spec.command, *spec.environment, *spec.environment.values(), spec.home, spec.socket):
        if not text.isprintable():
            raise ServiceError(f"{text!r} holds characters that no service manager takes")
    return spec


def write_private(path: Path, content: bytes) -> bool:
    """Write a file of the user's, whole or not at all. Returns whether it is new or different."""
    try:
        if path.read_bytes() == content:
            return False
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, mode=0o644, durable=False, shared=True)
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from None
    return True
