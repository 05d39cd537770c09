"""`mlxd top`: the daemon at work, live. Events redraw it at once; what no event tells is asked for each second."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from .common import Commands, add_command
from .exits import INTERRUPTED, OK

if TYPE_CHECKING:
    from mlxd_client import AsyncClient, AsyncEventStream

    from .board import Board
    from .output import Output
    from .screen import Screen

_REFRESH_S = 1.0
# A daemon that does not answer for so long is said to be away.
_PATIENCE_S = 2.0
# Events may come by the hundred a second, and nobody sees more than this.
_LEAST_BETWEEN_S = 0.1


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "top", top, "watch models, memory, requests and downloads, live",
        epilog="Keys: q leaves, the arrows choose a model, s sorts, u unloads the chosen one, a shows all models. Goes "
               "on by itself when the daemon restarts. Where there is no terminal, or with --json, it prints the state "
               "once.",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the state once, and leave")


def top(args: argparse.Namespace, output: Output) -> int:
    import asyncio

    seen = output.terminal and sys.stdin.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    return asyncio.run(_once(args, output) if args.once or not seen else _live(args))


def _client(args: argparse.Namespace, *, start: bool) -> AsyncClient:
    from mlxd import __version__
    from mlxd_client import AsyncClient

    return AsyncClient(args.socket, name="mlxd-top", version=__version__, start=start)


async def _once(args: argparse.Namespace, output: Output) -> int:
    from .board import Board

    board = Board()
    async with _client(args, start=not args.no_start) as client, client.events() as events:
        board.begin(events.snapshot)
        board.status, board.stats = await client.status(), await client.stats()
        if output.json:
            output.document({"status": board.status, "stats": board.stats, "snapshot": events.snapshot})
            return OK
    columns = int(os.environ.get("COLUMNS") or 0) or 120
    lines = board.lines(columns, 10_000, time.time())
    while lines and not lines[-1]:
        lines.pop()
    shown = lines[:-1]  # the last one is about keys
    while shown and not shown[-1]:
        shown.pop()
    for line in shown:
        output.line("".join(span.text for span in line).rstrip())
    return OK


async def _live(args: argparse.Namespace) -> int:
    """Subscribe first, so that what is wrong then is said on the screen that stays."""
    from .board import Board
    from .screen import Screen

    # Events go on over restarts. A daemon that is stopped on purpose is not started again by who watches it.
    async with (
        _client(args, start=not args.no_start).events() as events,
        _client(args, start=False) as client,
    ):
        with Screen() as screen:
            return await _Top(client, events, Board(), screen).run()


class _Top:
    """The tasks of one `mlxd top`."""

    def __init__(self, client: AsyncClient, events: AsyncEventStream, board: Board, screen: Screen) -> None:
        import asyncio

        self._client, self._events, self._board, self._screen = client, events, board, screen
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._news.set()
        self._left: asyncio.Future[int] = self._loop.create_future()
        self._unloads: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        import asyncio
        import signal

        self._loop.add_reader(sys.stdin.fileno(), self._on_input)
        for number, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, OK), (signal.SIGHUP, OK)):
            self._loop.add_signal_handler(number, self._leave, status)
        self._loop.add_signal_handler(signal.SIGWINCH, self._news.set)
        self._loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        tasks = [self._loop.create_task(work) for work in (self._watch(), self._refresh(), self._draw())]
        try:
            waited: list[asyncio.Future[Any]] = [self._left, *tasks]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # none ends by itself, but by what nobody expected
            return self._left.result()
        finally:
            self._loop.remove_reader(sys.stdin.fileno())
            for task in (*tasks, *self._unloads):
                task.cancel()
            await asyncio.gather(*tasks, *self._unloads, return_exceptions=True)

    def _leave(self, status: int) -> None:
        if not self._left.done():
            self._left.set_result(status)

    def _suspend(self) -> None:
        self._screen.suspend()
        self._news.set()

    # --- what is shown --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Events, over restarts."""
        self._board.begin(self._events.snapshot)
        async for event in self._events:
            self._board.apply(event)
            self._news.set()

    async def _refresh(self) -> None:
        """Figures that no event tells, and whether the daemon is there."""
        import asyncio

        from mlxd_client.errors import ConnectFailed, ConnectionLost, MlxdError

        while True:
            try:
                self._board.status = await self._client.status(wait_s=_PATIENCE_S)
                self._board.stats = await self._client.stats(wait_s=_PATIENCE_S)
                self._board.away = None
            except (ConnectFailed, ConnectionLost):
                self._board.away = "does not run; this goes on once it does"
            except MlxdError as error:
                self._board.away = f"does not answer: {error}"
            self._news.set()
            await asyncio.sleep(_REFRESH_S)

    async def _draw(self) -> None:
        import asyncio

        while True:
            await self._news.wait()
            self._news.clear()
            self._screen.show(self._board.lines(*self._screen.size, time.time()))
            await asyncio.sleep(_LEAST_BETWEEN_S)

    # --- keys -----------------------------------------------------------------------------------------------------

    def _on_input(self) -> None:
        try:
            typed = self._screen.typed()
        except (EOFError, OSError):
            self._leave(OK)
            return
        for key in typed:
            wish = self._board.key(key)
            if wish is not None and wish[0] == "quit":
                self._leave(OK)
            elif wish is not None:
                task = self._loop.create_task(self._unload(wish[1]))
                self._unloads.add(task)
                task.add_done_callback(self._unloads.discard)
        self._news.set()

    async def _unload(self, model: str) -> None:
        from mlxd_client.errors import MlxdError

        try:
            await self._client.unload(model)
            self._board.message = f"{model} is unloaded"
        except MlxdError as error:
            self._board.message = str(error)
        self._news.set()
