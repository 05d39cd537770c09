"""Models that the settings want loaded: they are looked for, fetched where that is allowed, and named to the core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mlxd_client import errors

from ..core import events as ev
from ..core.book import error_object
from .supply import Supply

if TYPE_CHECKING:
    from ..server.runtime_api import Log


class Preloads:
    """Those that are being looked for.

    Args:
        publish: tells the subscribers: see EventLog.publish.
    """

    def __init__(
        self,
        supply: Supply,
        tell: Callable[[ev.Event], None],
        publish: Callable[..., Any],
        log: Log,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._supply = supply
        self._tell = tell
        self._publish = publish
        self._log = log
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun: frozenset[str] = frozenset()

    def begin(self, refs: Iterable[str]) -> None:
        """Have those of these loaded that were not among them before, in order, in the background. What fails is logged
        and told to subscribers."""
        before, self._begun = self._begun, frozenset(refs)
        for ref in dict.fromkeys(refs):
            if ref in before:
                continue
            task = self._loop.create_task(self._preload(ref))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _preload(self, ref: str) -> None:
        try:
            model = await self._supply.have(ref)
        except errors.RpcError as error:
            self._log.warning("preload", model=ref, kind=error.kind, reason=error.message)
            self._publish("error", model_id=ref, error=error_object(error))
        except Exception as error:  # a bug, or a disk that fails in a new way; it must be known all the same
            self._log.error("preload", model=ref, exc_info=error)
        else:
            self._tell(ev.Preload(model))

    def abort(self) -> None:
        for task in self._tasks:
            task.cancel()
