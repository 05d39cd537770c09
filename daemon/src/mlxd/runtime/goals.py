"""What callers want and wait for: told to the core under a number, reached or refused under it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from mlxd_client import errors

from ..core import events as ev


class Goals:
    """All goals that are open."""

    def __init__(self, tell: Callable[[ev.Event], None], loop: asyncio.AbstractEventLoop) -> None:
        self._tell = tell
        self._rids = itertools.count(1)
        self._loop = loop
        self._open: dict[int, asyncio.Future[Any]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def number(self) -> int:
        """A number for the core to know a request by, be it a goal or not."""
        return next(self._rids)

    async def reach(self, goal: Callable[[int], ev.Event]) -> Any:
        """Tell the core a goal and wait for it; whoever stops waiting gives it up. Raises RpcError."""
        rid = self.number()
        waiter: asyncio.Future[Any] = self._loop.create_future()
        self._open[rid] = waiter
        self._tell(goal(rid))
        try:
            return await waiter
        except asyncio.CancelledError:
            self._tell(ev.Cancel(rid))
            raise

    def reached(self, rid: int, answer: Any) -> None:
        waiter = self._open.pop(rid, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def failed(self, rid: int, error: errors.RpcError) -> None:
        waiter = self._open.pop(rid, None)
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
