"""What a running daemon does to let another take over from it, step by step, and to go on where that fails; and what
the other one does with it afterwards.

1. Start the new one and wait until it could take over; everything goes on meanwhile.
2. Stop what changes files, leave new connections and requests unread: nothing is accepted that the new one must know.
3. Let it take over. Once it serves, new work is refused with `reconnect`, connections close as their last answer is
   out, and models go as they become idle. Whatever fails before that is undone, and what waited unread is read.

Where the process has to stay the service manager's own (launchd follows a pid), the new one is only tried; then this
one ends, and the manager, whose socket keeps those who connect, starts the next.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxd_client.errors import RestartFailed
from mlxd_client.types import RestartResult

from .handover import Inherited, Predecessor, Successor

if TYPE_CHECKING:
    from .children.supervisor import Supervisor
    from .notify import Notifier
    from .runtime import Runtime
    from .server.listen import Listener
    from .server.runtime_api import Log
    from .server.server import Server
    from .settings import Settings

__all__ = ["Forerunner", "Succession"]

# How long the own fetchers and deletes may take to let go of the disk, and the new daemon to serve then.
_LET_GO_S = 15.0
_SERVE_S = 30.0


class Succession:
    """Of one daemon.

    Args:
        managed: a service manager started this daemon.
        stop: begins to end this daemon.

    Attributes:
        successor: serves already; None while nothing has taken over.
        under_way: another daemon is being started or has taken over.
    """

    def __init__(
        self,
        settings: Settings,
        listener: Listener,
        notifier: Notifier,
        server: Server,
        runtime: Runtime,
        log: Log,
        *,
        managed: bool,
        stop: Callable[[], object],
    ) -> None:
        self.successor: Successor | None = None
        self.under_way = False
        self._given_up = False
        self._settings = settings
        self._listener = listener
        self._notifier = notifier
        self._server = server
        self._runtime = runtime
        self._log = log
        self._managed = managed
        self._stop = stop
        self._task: asyncio.Task[RestartResult] | None = None

    async def restart(self) -> RestartResult:
        """Have another daemon take over. Whoever asks meanwhile gets the same answer; that one goes away is no reason
        to stop half-way. Raises RestartFailed: this daemon goes on."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._restart())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._task)

    async def give_up(self) -> None:
        """This daemon ends, maybe for another reason: no other is to take over from it any more."""
        self._given_up = True
        if self.successor is None and self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _restart(self) -> RestartResult:
        if self.under_way:
            raise RestartFailed("another daemon has taken over already")
        if self._given_up:
            raise RestartFailed("this daemon is ending")
        if self._keeps_pid and self._listener.path is not None:
            raise RestartFailed("a service manager runs this daemon and would not start the next: restart it there")
        self.under_way = True
        successor = None
        try:
            self._log.info("another daemon is started to take over")
            successor = await Successor.start(
                self._listener, Path(self._settings.home),
                dict(os.environ) | self._notifier.environment, managed=self._managed,
            )  # fmt: skip
            await successor.ready(self._settings.ready_s)
            if self._keeps_pid:
                return await self._make_way(successor)
            await self._hand_over(successor)
        except BaseException as error:
            self.under_way = False
            if successor is not None:
                await asyncio.shield(successor.discard())
            if isinstance(error, RestartFailed):
                self._log.error("no other daemon took over", reason=error.message)
            raise
        return self._gone_over(successor)

    @property
    def _keeps_pid(self) -> bool:
        """Whether this process has to be the service. systemd can be told of another; launchd cannot."""
        return self._managed and not self._notifier.heard

    async def _make_way(self, successor: Successor) -> RestartResult:
        await successor.discard()
        self._log.info("ends, for the next daemon to be started", version=successor.version)
        self._stop()
        return RestartResult(version=successor.version)

    async def _hand_over(self, successor: Successor) -> None:
        """Raises RestartFailed, with all as it was before."""
        try:
            try:
                await self._runtime.let_go(_LET_GO_S)
            except TimeoutError:
                raise RestartFailed(f"downloads and batch jobs did not stop within {_LET_GO_S:g} s") from None
            self._server.pause()
            await successor.take_over(self._runtime.held_bytes, self._runtime.loaded, _SERVE_S)
        except BaseException:
            await asyncio.shield(successor.discard())  # it must not serve beside this one
            self._listener.claim()
            await self._runtime.go_on()
            await self._server.resume()
            raise

    def _gone_over(self, successor: Successor) -> RestartResult:
        """From here on there is no way back."""
        self.successor = successor
        self._notifier.main_pid(successor.pid)
        self._listener.give_away()
        self._runtime.on_settled = lambda: successor.held(self._runtime.held_bytes)  # said only where it changed
        self._runtime.leave(reason="restart", version=successor.version, pid=successor.pid)
        self._server.leave()
        self._log.info("another daemon has taken over", pid=successor.pid, version=successor.version)
        self._stop()
        return RestartResult(version=successor.version, pid=successor.pid)


class Forerunner:
    """The daemon that this one took over from, until it has ended."""

    def __init__(
        self, predecessor: Predecessor, loaded: list[str], supervisor: Supervisor, runtime: Runtime, log: Log
    ) -> None:
        self._predecessor = predecessor
        self._loaded = loaded
        self._supervisor = supervisor
        self._runtime = runtime
        self._log = log

    @classmethod
    async def succeed(
        cls, inherited: Inherited, supervisor: Supervisor, runtime: Runtime, log: Log
    ) -> Forerunner | None:
        """Wait until it is this daemon's turn; None where it never is."""
        predecessor = await Predecessor.meet(inherited)
        go = await predecessor.go(runtime.version)
        if go is None:
            return None
        log.info("takes over", predecessor=go.pid, held_bytes=go.held_bytes)
        runtime.elsewhere(go.held_bytes)
        await supervisor.sweep(spare=go.pid)
        return cls(predecessor, go.loaded, supervisor, runtime, log)

    @property
    def runs(self) -> bool:
        return not self._predecessor.gone.is_set()

    def serving(self) -> None:
        """Say that this daemon serves: there is no way back."""
        self._predecessor.serving()

    async def follow(self) -> None:
        """Load what was loaded, as soon as there is room for it; then count with the memory that the other holds, and
        clear away what it may leave."""
        self._runtime.load_again(self._loaded)
        while self.runs:
            self._runtime.elsewhere(await self._predecessor.held())
        await self._supervisor.sweep()
        self._runtime.elsewhere(0)
        self._log.info("the daemon before this one has ended")

    async def end(self, patience_s: float) -> None:
        """It is not to outlive this one: a service manager would kill it."""
        if not self.runs:
            return
        self._predecessor.stop()
        try:
            async with asyncio.timeout(patience_s):
                await self._predecessor.gone.wait()
        except TimeoutError:
            self._log.warning("the daemon before this one does not end")
