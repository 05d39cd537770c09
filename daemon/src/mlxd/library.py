"""What the daemon knows of the models on disk: names become ids and folders, and the core hears what the disk holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from .core import events as ev
from .downloads import Downloads
from .fetchers import Fetchers
from .store import hub, layout
from .store.folder import RESERVED_TOKENS, WORKER_BYTES

if TYPE_CHECKING:
    from .core.core import Core
    from .server.runtime_api import Log
    from .settings import Settings
    from .store import Found, FoundAdapter, Store

__all__ = ["Library", "draft_bytes"]

_SPELLINGS = 4096
# KV caches grow by so many tokens at a time.
_GROWTH_TOKENS = 256


class Library:
    """Models by name. Looking at the disk happens on a thread, one question at a time.

    Attributes:
        downloads: what moves models from the hub to the disk, and removes them.
        paths: where each known model lies, by id.
        kv_bytes: what the KV cache of the conversation takes that a load reserves memory for; 0 where a model's folder
            does not say what a token takes.
        drafts: the draft models that the settings give to models, by the model's id, as far as they are here.
    """

    def __init__(
        self, settings: Settings, store: Store, fetchers: Fetchers, core: Core, tell: Callable[[ev.Event], None],
        log: Log, loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.paths: dict[str, str] = {}
        self.drafts: dict[str, Found] = {}
        self.kv_bytes: dict[str, int] = {}
        self._settings = settings
        self._store = store
        self._core = core
        self._tell = tell
        self._loop = loop
        self._disk = ThreadPoolExecutor(1, "mlxd-disk")
        self._ids: dict[str, str] = {}  # what callers say → the model's id
        self.downloads = Downloads(
            settings, store, fetchers, tell=tell, note=self._facts, log=log, loop=loop, disk=self._disk
        )

    async def scan(self) -> None:
        """Tell the core what the disk holds now."""
        known = list(self._core.models)
        found = await self._loop.run_in_executor(self._disk, self._look, known)
        for one in found:
            self._tell(self._facts(one))
        for model in set(known).difference(one.model for one in found):
            self._tell(ev.Lost(model))

    def _look(self, known: list[str]) -> list[Found]:
        """All models that the store lists, and those of the known ones that it does not list but still has."""
        found = self._store.scan()
        for model in set(known).difference(one.model for one in found):
            with contextlib.suppress(errors.ModelNotFound, errors.ModelInvalid):
                found.append(self._store.resolve(model))
        for one in found:
            self._look_for_draft(one)
        return found

    def _resolve(self, ref: str) -> Found:
        found = self._store.resolve(ref)
        self._look_for_draft(found)
        return found

    def _look_for_draft(self, found: Found) -> None:
        """Find the draft model that the settings give to a model. One that is not here is done without."""
        ref = self._settings.draft_models.get(found.model)
        if ref is not None:
            self.drafts.pop(found.model, None)
            with contextlib.suppress(errors.ModelNotFound, errors.ModelInvalid):
                draft = self._store.resolve(ref)
                if draft.kind == "model":
                    self.drafts[found.model] = draft

    def _facts(self, found: Found) -> ev.Found:
        """What the core has to know of a model that was found on disk; where it lies is remembered here."""
        self.paths[found.model] = found.path
        tokens = min(found.context_length, RESERVED_TOKENS) + _GROWTH_TOKENS
        self.kv_bytes[found.model] = found.kv_token_bytes * tokens
        self.downloads.forget_plans(found.model)
        draft = self.drafts.get(found.model)
        need_bytes = found.memory_bytes + (0 if draft is None else draft_bytes(draft))
        context: int | None = None
        if found.kind == "model":
            context = min(found.context_length, self._settings.context_length.get(found.model, found.context_length))
        return ev.Found(
            found.model, found.source, need_bytes, found.revision, found.size_bytes, context, found.kind,
        )  # fmt: skip

    # --- names ----------------------------------------------------------------------------------------------------

    def known(self, ref: str) -> str | None:
        """The id that `ref` stands for, if that model is loaded or about to be: then the disk need not be asked."""
        model = self._ids.get(ref)
        record = None if model is None else self._core.models.get(model)
        return None if record is None or record.worker is None else model

    def take_aliases(self) -> None:
        """Take over the aliases that the settings have now."""
        self._store.aliases = dict(self._settings.aliases)
        self._ids.clear()

    def id_of(self, ref: str) -> str:
        """The id that a model has or would have which the settings name so, be it here or not."""
        name = self._store.aliases.get(ref, ref)
        return os.path.realpath(name) if name.startswith("/") else name

    async def resolve(self, ref: str) -> str:
        """The id of the model that `ref` names, which the disk holds, whole. Raises ModelNotFound, ModelInvalid."""
        known = self.known(ref)
        return known if known is not None else (await self.find(ref)).model

    async def find(self, ref: str) -> Found:
        """The same, with what the disk says of it."""
        try:
            found = await self._loop.run_in_executor(self._disk, self._resolve, ref)
        except (errors.ModelNotFound, errors.ModelInvalid):
            self._tell(ev.Lost(self._ids.pop(ref, ref)))
            raise
        self._tell(self._facts(found))
        if len(self._ids) >= _SPELLINGS:
            self._ids.clear()  # spellings come from clients; what is forgotten is asked for again
        self._ids[ref] = found.model
        return found

    async def adapter(self, ref: str) -> FoundAdapter:
        """The adapter that `ref` names. Raises as Store.adapter does."""
        return await self._loop.run_in_executor(self._disk, self._store.adapter, ref)

    # --- what models take -----------------------------------------------------------------------------------------

    async def plan(self, params: types.PlanParams) -> types.Plan:
        """What having and running a model would take."""
        revision = None if params.revision is UNSET else params.revision
        context = None if params.context_length is UNSET else params.context_length
        ref = params.model if revision is None else self.downloads.model_of(params.model, revision)
        try:
            found = await self.find(ref)
        except errors.ModelNotFound as error:
            return await self.plan_download(self._of_hub(ref, error), context)
        tokens = min(found.context_length, RESERVED_TOKENS if context is None else context)
        reserved = min(found.context_length, RESERVED_TOKENS)
        return await self._planned(
            found.model, found.revision, 0, found.weights_bytes, found.kv_token_bytes * tokens,
            found.memory_bytes + found.kv_token_bytes * (tokens - reserved), found.kind,
        )  # fmt: skip

    def _of_hub(self, ref: str, otherwise: errors.ModelNotFound) -> str:
        """The id of what is not on disk, where the hub may have it."""
        try:
            return self.downloads.model_of(ref)
        except errors.RpcError:
            raise otherwise from None

    async def plan_download(self, model: str, context_length: int | None = None) -> types.Plan:
        """The plan of a model that the hub is asked for. Raises what Downloads.plan does."""
        plan = await self.downloads.plan(model, context_length)
        return await self._planned(
            model, plan.commit, plan.download_bytes, plan.resident_bytes, plan.kv_bytes, plan.memory_bytes, plan.kind
        )

    async def _planned(
        self, model: str, revision: str | None, download: int, weights: int, kv: int, memory: int,
        kind: Literal["model", "adapter"],
    ) -> types.Plan:  # fmt: skip
        free = await self._loop.run_in_executor(self._disk, layout.disk_free, self._store.cache)
        missing = max(0, download + layout.RESERVE_BYTES - free) if download else 0
        available, fits, evicts = self._core.room_for(model, memory)
        return types.Plan(
            model=model, revision=revision, download_bytes=download, disk_free_bytes=free, weights_bytes=weights,
            kv_bytes=kv, memory_bytes=memory, memory_available_bytes=available, fits=fits, evicts=evicts,
            load_s=self._core.load_s(model), kind=kind, disk_missing_bytes=missing,
        )  # fmt: skip

    # --- what the disk and the hub say ------------------------------------------------------------------------------

    async def verify(self, ref: str) -> types.VerifyResult:
        """Compare every file with what it should hold."""
        try:
            path = (await self.find(ref)).path
        except (errors.ModelNotFound, errors.ModelInvalid) as error:
            snapshot = await self._loop.run_in_executor(self._disk, self._broken, ref)
            if snapshot is None:
                raise
            bad = await self.downloads.verify(snapshot)
            told = str(error.details.get("file", "config.json"))
            return types.VerifyResult(ok=False, bad_files=bad or [types.BadFile(file=told, reason="missing")])
        bad = await self.downloads.verify(path)
        return types.VerifyResult(ok=not bad, bad_files=bad)

    def _broken(self, ref: str) -> str | None:
        """The folder of a model of the hub that is there and cannot be used."""
        named = self._store.hub_repo(ref)
        if named is None:
            return None
        found = hub.find_snapshot(hub.repo_folder(self._store.cache, named[0]), named[1] or hub.MAIN)
        return None if found is None else str(found)

    async def on_disk(self, model: str) -> bool:
        """Whether any file of this model of the hub is here, if only a part."""
        folder = hub.repo_folder(self._store.cache, model.partition("@")[0])
        return await self._loop.run_in_executor(self._disk, os.path.isdir, folder)

    async def look_for_updates(self) -> None:
        """Ask the hub for the newest revision of each model that follows it."""
        models = [m.id for m in self._core.models.values() if m.source == "hub" and "@" not in m.id and m.revision]
        for model, revision in (await self.downloads.newest(models)).items():
            if model in self._core.models:
                self._tell(ev.Newest(model, revision))

    async def catalog(self) -> types.CatalogResult:
        """The recommended models, as they stand on this machine."""
        from . import catalog  # read when somebody asks: few do

        budget = self._core.limits.budget_bytes
        entries = []
        for entry in catalog.load(self._settings.catalog):
            record = self._core.models.get(entry.model)
            entry.state = "NotDownloaded" if record is None else record.lifecycle.state
            entry.fits = entry.memory_bytes <= budget
            entries.append(entry)
        return types.CatalogResult(entries=entries, memory_bytes=budget)

    def close(self) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)
        self.downloads.close()


def draft_bytes(draft: Found) -> int:
    """What a draft model takes in the worker of another one."""
    return draft.memory_bytes - WORKER_BYTES
