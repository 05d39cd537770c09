"""Models that are to be loaded, with all that is wanted beside them: for a while, or as long as somebody holds them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from .. import childwire as wire
from ..core import events as ev
from ..core.core import Core
from ..library import draft_bytes
from ..personas import beginning
from ..prompts import ask
from ..workers import settle
from .crew import Crew
from .goals import Goals
from .supply import Supply

if TYPE_CHECKING:
    from ..settings import Settings
    from ..store import Found


class Holding:
    """Loading and letting go, as callers ask for it.

    Args:
        epoch: names this run of the daemon, and its leases.
    """

    def __init__(
        self,
        settings: Settings,
        core: Core,
        goals: Goals,
        supply: Supply,
        crew: Crew,
        tell: Callable[[ev.Event], None],
        loop: asyncio.AbstractEventLoop,
        *,
        epoch: str,
    ) -> None:
        self._settings = settings
        self._core = core
        self._goals = goals
        self._supply = supply
        self._crew = crew
        self._tell = tell
        self._loop = loop
        self._epoch = epoch
        self._leases = itertools.count(1)

    async def load(self, client: int, params: types.LoadParams) -> types.Model:
        system, own = beginning(params, self._settings.personas)
        adapter = None if params.adapter is UNSET else await self._supply.adapter(params.adapter)
        if system is not None and not self._settings.prompt_cache_bytes:
            raise errors.Unsupported("no prompts are kept, by the setting `prompt_cache_bytes`", option="system")
        other = None if own is None else await self._supply.adapter(own)
        model = await self._supply.have(params.model)
        keep_alive = None if params.keep_alive is UNSET else params.keep_alive
        draft = None if params.draft_model is UNSET else await self._supply.have_draft(params.draft_model, model)
        room = 0 if draft is None else draft_bytes(draft)
        # It cannot go before all that was asked for is there.
        lease = None if params.adapter is UNSET and system is None else self._new_lease()
        try:
            view: types.Model = await self._goals.reach(
                lambda rid: ev.Ensure(
                    rid, client, model, lease=lease, keep_alive_s=keep_alive, draft_bytes=room, asking=True
                )
            )
            if draft is not None:
                view = await self._attach(client, model, draft)
            if lease is None:
                return view
            if params.adapter is not UNSET:
                await self._adapt(model, adapter)
            if system is not None:
                await self._prewarm(model, system, self._crew.link(model).adapter if own is None else other)
        finally:
            if lease is not None:
                self._tell(ev.Release(client, lease))
        return self._core.view(model)

    async def unload(self, ref: str) -> types.Model:
        model = await self._supply.library.resolve(ref)
        view: types.Model = await self._goals.reach(lambda rid: ev.Unload(rid, 0, model))
        return view

    # --- what a model is loaded with ------------------------------------------------------------------------------

    async def _adapt(self, model: str, adapter: wire.Adapter | None) -> None:
        """Have requests of a model that is Ready get an adapter that name none."""
        adapted: asyncio.Future[Any] = self._loop.create_future()
        link = self._crew.link(model)
        link.adapt(adapter, lambda answer: settle(adapted, answer))
        await adapted
        self._tell(ev.Adapted(link.worker, None if adapter is None else adapter.id))

    async def _prewarm(self, model: str, system: str, adapter: wire.Adapter | None) -> None:
        """Have the beginning of prompts with this system turn kept."""
        link = self._crew.link(model)
        path = None if adapter is None else adapter.path
        await ask(link, "prewarm", wire.Prewarm(system=system, adapter=path), len(system))
        link.prewarmed.add(hash((path, system)))
        self._tell(ev.Prewarmed(link.worker, len(link.prewarmed)))

    async def _attach(self, client: int, model: str, draft: Found) -> types.Model:
        """Have a draft model guess for a model that is Ready."""
        worker = self._core.models[model].worker
        if worker is None:
            raise errors.WorkerDied("the model was unloaded meanwhile", cause="stopped", model=model)
        await self._goals.reach(lambda rid: ev.Attach(rid, client, worker, draft_bytes(draft)))
        attached: asyncio.Future[wire.Attached] = self._loop.create_future()
        self._crew.attach(worker, draft, lambda answer: settle(attached, answer))
        await attached
        return self._core.view(model)

    # --- leases ---------------------------------------------------------------------------------------------------

    def _new_lease(self) -> str:
        return f"{self._epoch[:6]}-{next(self._leases)}"

    async def acquire(
        self, client: int, ref: str, *, keep_alive_s: float | None = None, asking: bool = False
    ) -> types.Lease:
        """`asking`: it is for a question to the worker, which must be answered before that may be recycled."""
        model = await self._supply.have(ref)
        lease = self._new_lease()
        try:
            view = await self._goals.reach(
                lambda rid: ev.Ensure(rid, client, model, lease=lease, keep_alive_s=keep_alive_s, asking=asking)
            )
        except asyncio.CancelledError:
            self._tell(ev.Release(client, lease))
            raise
        return types.Lease(lease=lease, model=view)

    def release(self, client: int, lease: str) -> None:
        if not any(m.leases.get(lease) == client for m in self._core.models.values()):
            raise errors.NotFound("this connection holds no such lease", lease=lease)
        self._tell(ev.Release(client, lease))
