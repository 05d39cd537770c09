"""What a daemon's parts make of the settings, at its start and whenever they change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from . import logs
from .children.interface import ChildSettings
from .children.supervisor import Supervisor
from .runtime import Runtime
from .server.limits import ServerLimits
from .server.server import Server
from .settings import Settings

__all__ = ["IdleExit", "Live", "child_settings", "server_limits"]

# How long a child has to end after SIGTERM, before SIGKILL.
_TERM_GRACE_S = 1.0
# What clients leave for the daemon's own needs: logs, folders of models, three for each child.
_OWN_FILES = 96


class Live:
    """Brings changed settings to those who do not read them where they need them.

    Attributes:
        server, idle_exit: as soon as they are there.
    """

    def __init__(
        self, settings: Settings, files: int, installed: logs.Logs, supervisor: Supervisor, runtime: Runtime
    ) -> None:
        self.server: Server | None = None
        self.idle_exit: IdleExit | None = None
        self._settings = settings
        self._files = files
        self._logs = installed
        self._supervisor = supervisor
        self._runtime = runtime

    def take_over(self, names: frozenset[str]) -> None:
        """The settings of these names are others than before."""
        settings = self._settings
        self._logs.set_level(settings.log_level)
        self._logs.set_prompts(settings.log_prompts)
        self._supervisor.settings = child_settings(settings)
        limits = server_limits(settings, self._files)
        self._runtime.events.limits = limits
        if self.server is not None:
            self.server.limits = limits
        if self.idle_exit is not None and "idle_exit_s" in names:
            self.idle_exit.anew()
        self._runtime.reconfigure(names)


class IdleExit:
    """Ends a daemon that nobody needs, where a service manager holds its socket and starts it for the next client.

    Args:
        kept: whether something else needs it.

    Looks whenever a client comes or goes and whenever the core has settled; between those nothing runs.
    """

    def __init__(
        self,
        server: Server,
        runtime: Runtime,
        settings: Settings,
        stop: Callable[[], object],
        *,
        kept: Callable[[], bool] = lambda: False,
    ) -> None:
        self._server, self._runtime, self._settings, self._stop = server, runtime, settings, stop
        self._kept = kept
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False
        self._stay: asyncio.Task[None] | None = None
        server.on_clients = runtime.on_settled = self._look
        self._look()

    def anew(self) -> None:
        """The time has changed: count from now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._look()

    @property
    def _needless(self) -> bool:
        return not self._kept() and self._server.deserted and self._runtime.idle

    def _look(self) -> None:
        idle_s = self._settings.idle_exit_s
        if self._leaving:
            return
        if not (idle_s > 0 and self._needless):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(idle_s, self._leave)

    def _leave(self) -> None:
        """Whoever connects from here on waits in the manager's socket for the next daemon. Who was accepted in this
        turn of the loop is heard of in the next one only, but before what is put in there now."""
        self._leaving = True
        self._server.stop_accepting()
        asyncio.get_running_loop().call_soon(self._go)

    def _go(self) -> None:
        if self._needless:
            self._stop()
            return
        self._stay = asyncio.get_running_loop().create_task(self._server.accept())
        self._stay.add_done_callback(self._stayed)

    def _stayed(self, resumed: asyncio.Task[None]) -> None:
        self._leaving, self._timer = False, None
        if not resumed.cancelled() and resumed.exception() is not None:
            self._stop()  # nobody can come any more; the manager starts another
        else:
            self._look()


def child_settings(settings: Settings) -> ChildSettings:
    """The bounds of children, as far as they are settings."""
    return ChildSettings(ready_s=settings.ready_s, heartbeat_s=settings.heartbeat_s, term_grace_s=_TERM_GRACE_S)


def server_limits(settings: Settings, files: int) -> ServerLimits:
    """The server's bounds, as far as they are settings. `files` descriptors are there for clients and all else."""
    return ServerLimits(
        in_flight=settings.requests_in_flight,
        queue=settings.queue_limit,
        connections=max(1, min(settings.max_clients, files - _OWN_FILES)),
        subscriber_events=settings.subscriber_events,
        subscriber_bytes=settings.subscriber_bytes,
        ring_events=settings.event_log,
        write_stall_s=settings.write_stall_s,
    )
