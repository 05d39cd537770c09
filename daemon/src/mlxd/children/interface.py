"""What the supervisor takes and whom it calls back: spec, settings, handler. No behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..childwire import Heartbeat, Ready

if TYPE_CHECKING:
    from .child import Child
    from .death import Death

__all__ = ["ChildHandler", "ChildSettings", "ChildSpec", "Log"]


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One child to start.

    Attributes:
        kind: `worker` or `fetcher`; what logs and errors call it.
        name: what it works on, for people.
        argv: the command; the supervisor appends `--fd N`, the number of the child's end of the pipe.
        env: changes to the curated environment, made last; None removes a variable.
    """

    kind: str
    name: str
    argv: Sequence[str]
    env: Mapping[str, str | None] = {}


class ChildSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on every child; seconds and bytes.

    Attributes:
        ready_s: from spawn to the ready frame. Generous: a cold import of mlx on a busy machine takes its time.
        heartbeat_s: the longest silence of a ready child, and the longest it may leave its pipe unread.
        stop_grace_s: from `stop` to SIGTERM.
        term_grace_s: from SIGTERM to SIGKILL.
        eof_grace_s: how long a process may live on after its pipe has closed.
        send_buffer_bytes: how much may wait for a child that does not read.
    """

    ready_s: float = 60.0
    heartbeat_s: float = 15.0
    stop_grace_s: float = 5.0
    term_grace_s: float = 2.0
    eof_grace_s: float = 0.5
    send_buffer_bytes: int = 64 * 1024 * 1024


class ChildHandler(Protocol):
    """Whom a child reports to. All calls come on the loop, one at a time, and should be short.

    Order: at most one `on_ready`, before any message or heartbeat; then messages in the order they were sent; then
    exactly one `on_exit`, the last call of all, also where nothing could be spawned. None is made inside `spawn`.
    What a handler raises is logged and goes no further; a child whose message cannot be handled is killed as `garbage`.
    """

    def on_ready(self, child: Child, ready: Ready, /) -> None: ...

    def on_message(self, child: Child, message: dict[str, Any], /) -> None:
        """A response, `progress`, `step`, or a notification that this version does not know."""

    def on_heartbeat(self, child: Child, heartbeat: Heartbeat, /) -> None: ...

    def on_exit(self, child: Child, death: Death, /) -> None: ...


class Log(Protocol):
    """The part of a structlog logger that is used here: an event and its fields."""

    def debug(self, event: str, /, **fields: Any) -> Any: ...

    def info(self, event: str, /, **fields: Any) -> Any: ...

    def warning(self, event: str, /, **fields: Any) -> Any: ...

    def error(self, event: str, /, **fields: Any) -> Any: ...
