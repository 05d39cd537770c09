"""mlxd's client: `Client` blocks, `AsyncClient` awaits, both speak to the user's daemon over its Unix socket.

Names are imported when they are first used, so that a program pays for the shell it takes and not for the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aio import AsyncClient, AsyncEventStream, AsyncModelLease, AsyncStream
    from .errors import (
        Cancelled,
        ClientError,
        ConnectFailed,
        ConnectionLost,
        MlxdError,
        ProtocolError,
        RequestTimeout,
        RpcError,
    )
    from .images import image
    from .mirror import Mirror
    from .paths import home, socket_path
    from .sync import Client, EventStream, ModelLease, Stream
    from .types import CatalogResult, Completion, Event, Job, Message, Model, Plan, Snapshot, Status, VerifyResult

__all__ = [
    "AsyncClient",
    "AsyncEventStream",
    "AsyncModelLease",
    "AsyncStream",
    "Cancelled",
    "CatalogResult",
    "Client",
    "ClientError",
    "Completion",
    "ConnectFailed",
    "ConnectionLost",
    "Event",
    "EventStream",
    "Job",
    "Message",
    "Mirror",
    "MlxdError",
    "Model",
    "ModelLease",
    "Plan",
    "ProtocolError",
    "RequestTimeout",
    "RpcError",
    "Snapshot",
    "Status",
    "Stream",
    "VerifyResult",
    "home",
    "image",
    "socket_path",
]

_HOMES = {
    "aio": ("AsyncClient", "AsyncEventStream", "AsyncModelLease", "AsyncStream"),
    "errors": (
        "Cancelled",
        "ClientError",
        "ConnectFailed",
        "ConnectionLost",
        "MlxdError",
        "ProtocolError",
        "RequestTimeout",
        "RpcError",
    ),
    "images": ("image",),
    "mirror": ("Mirror",),
    "paths": ("home", "socket_path"),
    "sync": ("Client", "EventStream", "ModelLease", "Stream"),
    "types": (
        "CatalogResult",
        "Completion",
        "Event",
        "Job",
        "Message",
        "Model",
        "Plan",
        "Snapshot",
        "Status",
        "VerifyResult",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
