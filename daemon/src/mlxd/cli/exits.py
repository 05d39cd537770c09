"""Exit codes that scripts can rely on, and which failure has which. The table in docs/cli.md says the same."""

from __future__ import annotations

from mlxd_client.errors import (
    ClientError,
    ConnectFailed,
    ConnectionLost,
    MlxdError,
    ProtocolError,
    RequestTimeout,
    RpcError,
)

OK = 0
FAILED = 1
USAGE = 2
NO_DAEMON = 3
NO_MODEL = 4
CANCELLED = 5
BUSY = 6
TIMEOUT = 7
ALREADY_RUNNING = 8  # only serve: see mlxd.app
MODEL_FAILED = 9
DOWNLOAD_FAILED = 10
NO_SPACE = 11
BAD_FILES = 12
NOT_ALLOWED = 13
NOT_DOWNLOADED = 14
INTERRUPTED = 130
BROKEN_PIPE = 141

BY_KIND: dict[str, int] = {
    "parse_error": FAILED,
    "invalid_request": FAILED,
    "method_not_found": FAILED,
    "invalid_params": USAGE,
    "internal_error": FAILED,
    "cancelled": CANCELLED,
    "model_not_found": NO_MODEL,
    "model_invalid": NO_MODEL,
    "model_busy": BUSY,
    "queue_full": BUSY,
    "insufficient_disk": NO_SPACE,
    "insufficient_memory": BUSY,
    "daemon_busy": BUSY,
    "restart_failed": FAILED,
    "memory_pressure": BUSY,
    "worker_died": MODEL_FAILED,
    "deadline_exceeded": TIMEOUT,
    "unsupported": USAGE,
    "context_exceeded": USAGE,
    "load_failed": MODEL_FAILED,
    "download_failed": DOWNLOAD_FAILED,
    "verification_failed": BAD_FILES,
    "shutting_down": BUSY,
    "not_found": FAILED,
    "permission_denied": NOT_ALLOWED,
    "model_not_downloaded": NOT_DOWNLOADED,
    # On this side of the socket.
    "connect_failed": NO_DAEMON,
    "connection_lost": NO_DAEMON,
    "timeout": TIMEOUT,
    "protocol_error": FAILED,
    "client_error": FAILED,
    "invalid_settings": USAGE,
}

_CLIENT_KINDS: tuple[tuple[type[ClientError], str], ...] = (
    (ConnectFailed, "connect_failed"),
    (ConnectionLost, "connection_lost"),
    (RequestTimeout, "timeout"),
    (ProtocolError, "protocol_error"),
)


def kind_of(error: MlxdError) -> str:
    """The stable name of a failure; those of this side of the socket have none on the wire."""
    if isinstance(error, RpcError):
        return error.kind
    found = next((kind for cls, kind in _CLIENT_KINDS if isinstance(error, cls)), None)
    return found or ("client_error" if isinstance(error, ClientError) else "invalid_settings")


def code_of(error: MlxdError) -> int:
    return BY_KIND.get(kind_of(error), FAILED)
