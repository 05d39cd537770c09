"""One daemon from start to exit: puts the parts together, listens for signals, ends everything in good order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from mlxd_client.errors import DaemonBusy, RestartFailed, Unsupported
from mlxd_client.types import RestartResult

from . import handover, logs
from .children.exitwatch import ExitWatch
from .children.supervisor import Supervisor
from .configuration import LOOK_S, Configuration
from .live import IdleExit, Live, child_settings, server_limits
from .notify import PATIENCE_S, Notifier
from .runtime import Runtime
from .server.activation import handed_over
from .server.listen import AlreadyRunning, Listener, ListenError, Removed, adopt, listen
from .server.server import Server
from .settings import Loaded
from .sidecar import Bridge
from .stateversion import StateTooNew
from .store import Store
from .succession import Forerunner, Succession

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_ALREADY_RUNNING = 8

# How long the last answers may take to reach standard output.
_LAST_WORDS_S = 1.0
# How long children get to go by themselves once the daemon has to end; then SIGTERM, then SIGKILL.
_LAST_GRACE_S = 0.5
# How often a service manager without a watchdog hears how things are.
_STATUS_S = 15.0
# How much longer the daemon before this one may take to end, once it was told to.
_PATIENCE_S = 2.0
# The most that macOS allows, and more than `max_clients` may need by default.
_OPEN_FILES = 10_240


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Who started the daemon, and what that means for its end.

    Attributes:
        managed: a service manager, which would start it again after a failure.
        stdio: an app, which speaks on standard input and output as on a connection; the daemon ends with it.
        parent_pid: a process, with which the daemon ends.
    """

    managed: bool = False
    stdio: bool = False
    parent_pid: int | None = None


def serve(loaded: Loaded, launch: Launch | None = None) -> int:
    """Run a daemon with these settings until it is told to stop. Returns the process's exit status.

    The socket is there as soon as requests are answered; whoever starts a daemon may wait for it.
    """
    settings = loaded.settings
    launch = launch or Launch()
    notifier = Notifier()
    sock = None
    inherited = handover.inherited()
    try:
        home = Path(settings.home)
        if inherited is not None:
            listener = inherited.listener
        else:
            sock = handed_over()
            listener = listen(home, Path(settings.socket)) if sock is None else adopt(sock, home)
    except ListenError as error:
        if launch.managed:
            return give_up(str(error), notifier, sock)
        print(f"mlxd: {error}", file=sys.stderr)
        return EXIT_ALREADY_RUNNING if isinstance(error, AlreadyRunning) else EXIT_FAILED
    files = _allow_many_files()
    _return_large_blocks()
    installed = logs.configure(settings.log_file, level=settings.log_level, prompts=settings.log_prompts)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Daemon(loaded, files, installed, listener, notifier, launch).run(inherited))
            _heed_no_signal(runner.get_loop())
    except StateTooNew as error:
        logs.get("mlxd").error("state is too new", path=str(error.path), reason=str(error))
        if launch.managed and inherited is None:
            return give_up(str(error), notifier, listener.sock)
        print(f"mlxd: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        listener.close()
        installed.close()
    return EXIT_OK


def give_up(reason: str, notifier: Notifier | None = None, sock: socket.socket | None = None) -> int:
    """End in good order where starting again would change nothing, as with a wrong configuration.

    The manager is told that all went well, for it would try again and again; and those who wait on its socket are hung
    up on, for each of them would be a reason to start again.
    """
    print(f"mlxd: {reason}", file=sys.stderr, flush=True)
    if handover.expected():  # the daemon that this one was to take over from goes on
        return EXIT_FAILED
    notifier = notifier or Notifier()
    notifier.ready()
    notifier.status(f"not running: {reason}")
    with contextlib.suppress(OSError, ListenError):
        sock = sock or handed_over()
        if sock is not None:
            sock.setblocking(False)
            while True:
                sock.accept()[0].close()
    notifier.stopping()
    return EXIT_OK


def _heed_no_signal(loop: asyncio.AbstractEventLoop) -> None:
    """All is done but leaving: whoever asks for that once more would get another exit status for it."""
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # the loop leaves them to the system for a moment
    for number in numbers:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _allow_many_files() -> int:
    """Each client is one, and macOS gives a process 256 unless it asks for more. Returns how many there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return _OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def _return_large_blocks() -> None:
    """Keep glibc from holding on to what one large request took: its thresholds for giving memory back otherwise grow
    with the largest block that was ever freed. See mallopt(3); elsewhere there is nothing to set."""
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold, size = -1, -3, 128 * 1024
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, size)
        libc.mallopt(mmap_threshold, size)


class _Daemon:
    """The parts of one running daemon."""

    def __init__(
        self, loaded: Loaded, files: int, installed: logs.Logs, listener: Listener, notifier: Notifier, launch: Launch
    ) -> None:
        self._loaded = loaded
        self._settings = loaded.settings
        self._launch = launch
        self._files = files
        self._logs = installed
        self._listener = listener
        self._notifier = notifier
        self._log = logs.get("mlxd")
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._forerunner: Forerunner | None = None
        self._succession: Succession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_terminal = os.isatty(2)

    async def run(self, inherited: handover.Inherited | None = None) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        limits = server_limits(settings, self._files)
        supervisor = Supervisor(
            Path(settings.home) / "run", log=logs.get("mlxd.children"), settings=child_settings(settings)
        )
        runtime = Runtime(
            settings, Store(settings.aliases), supervisor, logs.get("mlxd.runtime"), limits=limits, loop=loop
        )
        runtime.on_shutdown = self._stop.set
        runtime.activated = self._listener.path is None
        runtime.log_lines_dropped = lambda: self._logs.dropped
        live = Live(settings, self._files, self._logs, supervisor, runtime)
        configuration = Configuration(self._loaded, runtime.events.publish, live.take_over, logs.get("mlxd.settings"))
        server = live.server = Server(
            runtime, runtime.events, log=logs.get("mlxd.server"), limits=limits, configuration=configuration
        )
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, configuration)
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._do(self._restart_by_signal(runtime)))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        runtime.refuse_newer_state()
        if inherited is None:
            await supervisor.sweep()
        else:
            self._forerunner = await Forerunner.succeed(inherited, supervisor, runtime, self._log)
            if self._forerunner is None:
                return
        await runtime.begin()
        await server.start(self._listener)
        if self._forerunner is not None:
            self._forerunner.serving()
            self._listener.claim()  # not before: the other one would go on, and have no socket, if this one failed
            self._do(self._forerunner.follow())
        self._offer(server, runtime)
        if self._listener.path is None:
            live.idle_exit = IdleExit(server, runtime, settings, self._stop.set, kept=lambda: self._succeeds)
        else:
            self._do(self._keep_socket(server))
        configuration.begin()
        self._log.info("daemon started", version=runtime.version, epoch=runtime.epoch, socket=settings.socket)
        self._notifier.ready()
        bridge = await self._open_stdio(server) if self._launch.stdio else None
        watch = self._watch_parent(self._launch.parent_pid) if self._launch.parent_pid is not None else None
        signs = loop.create_task(self._give_signs(runtime)) if self._notifier.heard else None
        await self._stop.wait()
        configuration.close()
        await self._end(server, runtime)
        for task in self._tasks:
            task.cancel()
        if signs is not None:
            signs.cancel()
        if watch is not None:
            loop.remove_reader(watch.fileno)
            watch.close()
        if bridge is not None:
            bridge.finish(_LAST_WORDS_S)

    async def _open_stdio(self, server: Server) -> Bridge:
        """Serve whoever started this process on its standard input and output."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        await server.take(ours)
        return Bridge(theirs, lambda: loop.call_soon_threadsafe(self._stop.set))

    def _watch_parent(self, pid: int) -> ExitWatch | None:
        """Stop when a process ends that is not ours to wait for."""
        try:
            watch = ExitWatch(pid)
        except OSError as error:  # it is gone already
            self._log.warning("the parent cannot be watched", pid=pid, reason=str(error))
            self._stop.set()
            return None
        asyncio.get_running_loop().add_reader(watch.fileno, self._parent_gone, pid)
        return watch

    def _parent_gone(self, pid: int) -> None:
        self._log.info("the parent has ended", pid=pid)
        self._stop.set()

    async def _give_signs(self, runtime: Runtime) -> None:
        """For the service manager: signs of life where it wants them, from the loop that does the work, and a line for
        people."""
        watchdog_s = self._notifier.watchdog_s
        while True:
            if watchdog_s is not None:
                self._notifier.alive()
            self._notifier.status(_status_line(runtime))
            await asyncio.sleep(_STATUS_S if watchdog_s is None else watchdog_s / 2)

    async def _keep_socket(self, server: Server) -> None:
        """See to it that clients find this daemon as long as it runs: one whose socket was removed would keep the next
        from starting, and one whose folder was removed would hold its models for nobody."""
        failed = False
        while True:
            await asyncio.sleep(LOOK_S)
            if self._stop.is_set():
                return
            if self._succession is not None and self._succession.under_way:
                continue
            try:
                if self._listener.renew():
                    await server.move(self._listener)
                    self._log.warning("the socket had been removed, and is there again")
                failed = False
            except (Removed, AlreadyRunning) as error:
                self._log.error("the daemon cannot be found any more", reason=str(error))
                if not self._launch.stdio:  # whoever speaks there has found it
                    self._stop.set()
                return
            except ListenError as error:
                if not failed:
                    self._log.error("the socket was removed, and cannot be made again yet", reason=str(error))
                failed = True

    def _on_signal(self, name: str) -> None:
        """The first asks for a drain, the next one cuts it short."""
        self._log.info("signal", name=name)
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _on_hangup(self, configuration: Configuration) -> None:
        """Read the settings anew; but where the terminal has gone in which the daemon runs, it goes, too."""
        if self._on_terminal and not os.isatty(2):
            self._on_signal("SIGHUP")
        else:
            configuration.on_signal()

    # --- another daemon before or after this one ------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background, until this daemon ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _succeeds(self) -> bool:
        """Whether the daemon before this one still runs."""
        return self._forerunner is not None and self._forerunner.runs

    def _offer(self, server: Server, runtime: Runtime) -> None:
        """Let others take over, unless this daemon is an app's own and ends with that."""
        launch = self._launch
        if launch.stdio or launch.parent_pid is not None:
            return
        self._succession = succession = Succession(
            self._settings, self._listener, self._notifier, server, runtime, self._log,
            managed=launch.managed, stop=self._stop.set,
        )  # fmt: skip

        async def restart() -> RestartResult:
            if self._succeeds:
                raise RestartFailed("the daemon before this one still has requests to answer; try again later")
            return await succession.restart()

        def make_room() -> None:
            if succession.under_way or self._succeeds:
                raise DaemonBusy("the daemon is in use: another one takes over", requests=0, leases=0, jobs=0)
            self._listener.hide()
            runtime.leave(reason="make_room")
            server.leave()
            self._stop.set()

        runtime.on_restart = restart
        if not launch.managed:  # a manager would start the same again
            runtime.on_make_room = make_room

    async def _restart_by_signal(self, runtime: Runtime) -> None:
        try:
            await runtime.restart()
        except (RestartFailed, Unsupported) as error:
            self._log.error("not restarted", reason=error.message)

    # --- the end --------------------------------------------------------------------------------------------------

    async def _end(self, server: Server, runtime: Runtime) -> None:
        """Drain, answer everybody, end the children; only then may the next daemon have the socket's lock.

        1. Another daemon serves already: there is time, unless that one ends or wants to. Who connected after it died
           is told to try again.
        2. Another one will be started: who connects waits for it, and is told to.
        3. Else clients learn that this one ends.
        The daemon before this one, should it still run, is told to end too, and is waited for.
        """
        succession, settings = self._succession, self._settings
        if succession is not None:
            await succession.give_up()
        successor = None if succession is None else succession.successor
        before: list[Awaitable[None]] = []
        if self._forerunner is not None:
            before = [self._forerunner.end(settings.drain_s + _LAST_GRACE_S + _PATIENCE_S)]
        ended = asyncio.gather(*before)
        if successor is not None:
            hurry = successor.wished_away(self._hurry, settings.drain_s)
            await _race(server.drained(settings.handover_s), hurry)
            if successor.gone and self._listener.path is not None:
                await server.take_waiting()
        else:
            self._notifier.stopping(settings.drain_s + PATIENCE_S)
            if self._listener.path is None and self._launch.managed:
                server.leave()
            server.begin_drain()
            await _race(self._drained(server, runtime), self._hurry.wait())
            self._listener.hide()
            if server.moved and self._listener.path is not None:
                await server.take_waiting()
        runtime.abort()
        await asyncio.gather(server.close(), runtime.close(_LAST_GRACE_S), ended)
        self._log.info("daemon stopped")

    async def _drained(self, server: Server, runtime: Runtime) -> None:
        await runtime.drain(self._settings.drain_s)
        if server.moved:  # connections wait for their own answers
            await server.drained(self._settings.drain_s)


async def _race(one: Awaitable[object], other: Awaitable[object]) -> None:
    """Wait for either of them, and end both."""
    waits: list[asyncio.Future[object]] = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)


def _status_line(runtime: Runtime) -> str:
    core = runtime.core
    loaded = sum(model.lifecycle.state == "Ready" for model in core.models.values())
    return f"{loaded} models loaded, {core.running} requests running, {core.waiting} waiting"
