"""The error tree: one class per kind of failure, its code, and the way to and from the wire.

    MlxdError
    ├── RpcError                      the daemon answered with an error object
    │   ├── ParseError          -32700  bytes that are no frame; the connection closes after it
    │   ├── InvalidRequest      -32600  a frame that is no request; the connection goes on
    │   ├── MethodNotFound      -32601
    │   ├── InvalidParams       -32602  details.field names the culprit
    │   ├── InternalError       -32603  a bug in the daemon
    │   ├── Cancelled           -32800
    │   ├── ModelNotFound       -32001  no such model, alias or folder
    │   ├── ModelInvalid        -32002  the folder is there but is no usable model
    │   ├── ModelBusy           -32003
    │   ├── QueueFull           -32004  details.retry_after_s hints when to come back
    │   ├── InsufficientDisk    -32005
    │   ├── InsufficientMemory  -32006  details: needed_bytes, available_bytes, and who holds the rest
    │   ├── WorkerDied          -32007  details: cause, exit_code or signal, last_words
    │   ├── DeadlineExceeded    -32008  details.phase says where the time went
    │   ├── Unsupported         -32009  details.option: asked for, and cannot be honoured
    │   ├── ContextExceeded     -32010  details: prompt_tokens, context_length
    │   ├── LoadFailed          -32011
    │   ├── DownloadFailed      -32012
    │   ├── VerificationFailed  -32013
    │   ├── ShuttingDown        -32014  the daemon takes no new work; details.reconnect: a new connection finds one
    │   │                               that does, and nothing was done of this request
    │   ├── NotFound            -32015  no such job, lease or subscription
    │   ├── PermissionDenied    -32016
    │   ├── ModelNotDownloaded  -32017  the hub has it; details.plan says what fetching it would take
    │   ├── MemoryPressure      -32018  the machine is short of memory; batch work is to come again, see retry_after_s
    │   ├── DaemonBusy          -32019  details: requests, leases, jobs; it was to end only if it had none
    │   ├── RestartFailed       -32020  no other daemon took over; the one that was asked goes on
    │   └── InvalidSettings     -32021  config.toml cannot be used; details: setting, place
    └── ClientError                   raised on this side of the socket
        ├── ConnectFailed               nobody listens there, and nothing could be started
        ├── ConnectionLost              the connection ended while a reply was awaited
        ├── RequestTimeout              no reply within the caller's own time limit
        ├── SocketPathTooLong           the platform's limit for a socket's path; set MLXD_SOCKET to a shorter one
        └── ProtocolError               the peer sent what is no frame or no message (also raised by codec.py)

`kind` is the stable name that programs compare; codes are stable too; messages are for people and may change.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BY_CODE",
    "BY_KIND",
    "Cancelled",
    "ClientError",
    "ConnectFailed",
    "ConnectionLost",
    "ContextExceeded",
    "DaemonBusy",
    "DeadlineExceeded",
    "DownloadFailed",
    "InsufficientDisk",
    "InsufficientMemory",
    "InternalError",
    "InvalidParams",
    "InvalidRequest",
    "InvalidSettings",
    "LoadFailed",
    "MemoryPressure",
    "MethodNotFound",
    "MlxdError",
    "ModelBusy",
    "ModelInvalid",
    "ModelNotDownloaded",
    "ModelNotFound",
    "NotFound",
    "ParseError",
    "PermissionDenied",
    "ProtocolError",
    "QueueFull",
    "RequestTimeout",
    "RestartFailed",
    "RpcError",
    "ShuttingDown",
    "SocketPathTooLong",
    "Unsupported",
    "VerificationFailed",
    "WorkerDied",
    "from_wire",
]


class MlxdError(Exception):
    """Base of everything that this package raises on purpose."""


class RpcError(MlxdError):
    """An error that crossed, or is about to cross, the wire.

    Attributes:
        code: the JSON-RPC number.
        kind: the stable name, e.g. `model_not_found`.
        message: a sentence for people.
        details: further facts, plain JSON values; keys depend on the kind.
    """

    code: int = -32000
    kind: str = "error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def to_wire(self) -> dict[str, Any]:
        """The JSON-RPC error object: {code, message, data: {kind, details?}}."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.details:
            data["details"] = self.details
        return {"code": self.code, "message": self.message, "data": data}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, kind={self.kind!r}, details={self.details!r})"


class ParseError(RpcError):
    code, kind = -32700, "parse_error"


class InvalidRequest(RpcError):
    code, kind = -32600, "invalid_request"


class MethodNotFound(RpcError):
    code, kind = -32601, "method_not_found"


class InvalidParams(RpcError):
    code, kind = -32602, "invalid_params"


class InternalError(RpcError):
    code, kind = -32603, "internal_error"


class Cancelled(RpcError):
    code, kind = -32800, "cancelled"


class ModelNotFound(RpcError):
    code, kind = -32001, "model_not_found"


class ModelInvalid(RpcError):
    code, kind = -32002, "model_invalid"


class ModelBusy(RpcError):
    code, kind = -32003, "model_busy"


class QueueFull(RpcError):
    code, kind = -32004, "queue_full"


class InsufficientDisk(RpcError):
    code, kind = -32005, "insufficient_disk"


class InsufficientMemory(RpcError):
    code, kind = -32006, "insufficient_memory"


class WorkerDied(RpcError):
    code, kind = -32007, "worker_died"


class DeadlineExceeded(RpcError):
    code, kind = -32008, "deadline_exceeded"


class Unsupported(RpcError):
    code, kind = -32009, "unsupported"


class ContextExceeded(RpcError):
    code, kind = -32010, "context_exceeded"


class LoadFailed(RpcError):
    code, kind = -32011, "load_failed"


class DownloadFailed(RpcError):
    code, kind = -32012, "download_failed"


class VerificationFailed(RpcError):
    code, kind = -32013, "verification_failed"


class ShuttingDown(RpcError):
    code, kind = -32014, "shutting_down"

    @property
    def reconnect(self) -> bool:
        """Whether nothing was done of the request, and a new connection finds a daemon that does it."""
        return self.details.get("reconnect") is True


class NotFound(RpcError):
    code, kind = -32015, "not_found"


class PermissionDenied(RpcError):
    code, kind = -32016, "permission_denied"


class ModelNotDownloaded(RpcError):
    code, kind = -32017, "model_not_downloaded"


class MemoryPressure(RpcError):
    code, kind = -32018, "memory_pressure"


class DaemonBusy(RpcError):
    code, kind = -32019, "daemon_busy"


class RestartFailed(RpcError):
    code, kind = -32020, "restart_failed"


class InvalidSettings(RpcError):
    code, kind = -32021, "invalid_settings"


class ClientError(MlxdError):
    """A failure on this side of the socket; nothing is known of the daemon's view."""


class ConnectFailed(ClientError):
    """Nobody listens on the socket, and nothing was, or could be, started."""


class ConnectionLost(ClientError):
    """The connection ended while a reply was awaited; the request may or may not have run."""


class RequestTimeout(ClientError):
    """No reply within the caller's own limit; the request was cancelled on the way out."""


class SocketPathTooLong(ClientError, ValueError):
    """A path that no Unix socket can have on this platform."""


class ProtocolError(ClientError):
    """Bytes that are no frame, or a frame that is no message. The stream cannot be read further."""


def _leaves(cls: type[RpcError]) -> list[type[RpcError]]:
    return [leaf for sub in cls.__subclasses__() for leaf in (sub, *_leaves(sub))]


BY_CODE: dict[int, type[RpcError]] = {cls.code: cls for cls in _leaves(RpcError)}
BY_KIND: dict[str, type[RpcError]] = {cls.kind: cls for cls in _leaves(RpcError)}


def from_wire(error: dict[str, Any]) -> RpcError:
    """Rebuild the error that the peer sent; an unknown kind becomes a plain RpcError that keeps its code and kind.

    Args:
        error: a decoded JSON-RPC error object. Missing or odd members are tolerated: the peer may be newer.
    """
    data = error.get("data")
    data = data if isinstance(data, dict) else {}
    details = data.get("details")
    code, kind = error.get("code"), data.get("kind")
    cls = BY_KIND.get(kind) if isinstance(kind, str) else None
    if cls is None and isinstance(code, int):
        cls = BY_CODE.get(code)
    made = (cls or RpcError)(str(error.get("message", "unknown error")))
    made.details = details if isinstance(details, dict) else {}
    if cls is None:
        made.code = code if isinstance(code, int) else RpcError.code
        made.kind = kind if isinstance(kind, str) else RpcError.kind
    return made
