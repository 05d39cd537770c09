"""Models that are to be here: names become models on disk, fetched first where that is asked for or allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from mlxd_client import errors, types
from mlxd_client.types import UNSET

from .. import childwire as wire
from ..core import events as ev
from ..core.core import Core
from ..library import Library
from .goals import Goals
from .jobs import Jobs, Watcher

if TYPE_CHECKING:
    from ..server.runtime_api import Log
    from ..settings import Settings
    from ..store import Found


T = TypeVar("T")

# What a request says that wants the model without the adapter that it was loaded with.
NO_ADAPTER = "none"


class Supply:
    """The models of one daemon, loaded or not.

    Args:
        adapting: how many workers and requests have a model's id for an adapter.

    Attributes:
        library: knows names and the disk.
    """

    def __init__(
        self,
        settings: Settings,
        library: Library,
        core: Core,
        goals: Goals,
        jobs: Jobs,
        tell: Callable[[ev.Event], None],
        log: Log,
        *,
        adapting: Callable[[str], int],
    ) -> None:
        self.library = library
        self._settings = settings
        self._downloads = library.downloads
        self._core = core
        self._goals = goals
        self._jobs = jobs
        self._tell = tell
        self._log = log
        self._adapting = adapting
        self._looking: asyncio.Future[None] | None = None  # held, or it might be collected

    async def begin(self) -> None:
        """Learn what is there, and go on with the downloads that an earlier daemon had begun."""
        left = await self._downloads.begin()
        await self.library.scan()
        for one in left:
            self._log.info("going on with a download", model=one.model, job=one.job)
            self._tell(
                ev.Download(
                    self._goals.number(), 0, one.model, repair=one.repair, job=one.job, started_at=one.started_at
                )
            )

    def look_again(self) -> None:
        """Tell the core what the disk holds, in the background: the settings say other things of models than before."""
        self._looking = asyncio.ensure_future(self._scan())

    async def _scan(self) -> None:
        try:
            await self.library.scan()
        except Exception as error:  # whoever asks for models next hears of it
            self._log.error("looking for models failed", exc_info=error)

    # --- what is here ---------------------------------------------------------------------------------------------

    async def models(self, *, updates: bool = False) -> list[types.Model]:
        await self.library.scan()
        if updates:
            await self.library.look_for_updates()
        return self._core.snapshot().models

    async def model(self, ref: str) -> types.Model:
        try:
            return self._core.view(await self.library.resolve(ref))
        except errors.ModelNotFound:
            named = self._hub_model(ref)
            if named is None or named not in self._core.models:
                raise
            return self._core.view(named)  # it is on its way, or was

    async def plan(self, params: types.PlanParams) -> types.Plan:
        return await self.library.plan(params)

    async def catalog(self) -> types.CatalogResult:
        await self.library.scan()
        return await self.library.catalog()

    async def verify(self, ref: str) -> types.VerifyResult:
        named = self._hub_model(ref)
        record = self._core.models.get(named) if named is not None else None
        if record is not None and record.lifecycle.state == "Downloading":
            raise errors.ModelBusy(f"{record.id} is being downloaded", model=record.id)
        return await self.library.verify(ref)

    def _hub_model(self, ref: str) -> str | None:
        """The id of the model of the hub that `ref` may name."""
        try:
            return self._downloads.model_of(ref)
        except errors.RpcError:
            return None

    # --- what comes and goes --------------------------------------------------------------------------------------

    async def download(self, client: int, params: types.DownloadParams) -> str:
        revision = None if params.revision is UNSET else params.revision
        model = self._downloads.model_of(params.model, revision)
        if self._settings.download == "never":
            raise errors.Unsupported("downloads are turned off by the setting `download`", option="download")
        return await self._start_download(client, model, repair=params.repair)

    async def _start_download(self, client: int, model: str, *, repair: bool = False) -> str:
        job: str = await self._goals.reach(lambda rid: ev.Download(rid, client, model, repair=repair))
        if repair:
            self._downloads.records.repair(job)
        return job

    async def delete(self, client: int, ref: str) -> int:
        model = self._downloads.model_of(ref)
        if model not in self._core.models and not await self.library.on_disk(model):
            raise errors.ModelNotFound(f"there is no model {model} on this machine", model=model)
        if users := self._adapting(model):
            raise errors.ModelBusy(f"{model} is in use: {users} as adapter", model=model, adapting=users)
        freed: int = await self._goals.reach(lambda rid: ev.Delete(rid, client, model))
        return freed

    # --- for a request --------------------------------------------------------------------------------------------

    async def have(self, ref: str, watcher: Watcher | None = None) -> str:
        """The id of the model that `ref` names, fetched first where the settings allow that.

        Args:
            watcher: told how far the download is, 0 to 1.

        Raises:
            ModelNotFound, ModelInvalid: there is none, here or on the hub.
            ModelNotDownloaded: the hub has it, and fetching it is for the caller to ask for.
            RpcError: why it could not be fetched.
        """
        return await self._bring(ref, self.library.resolve, "model", watcher)

    async def expect(self, ref: str) -> str:
        """The id of the model that `ref` names, which is here or would be fetched for a request. Raises as `have`."""
        try:
            model = await self.library.resolve(ref)
        except errors.ModelNotFound:
            named = self._hub_model(ref)
            if named is None or "/" not in named or not self._fetches:
                return await self.have(ref)  # which says what there is to say
            return named
        if self._core.models[model].kind == "adapter":
            told = f"{model} is an adapter: name it as `adapter`, beside the model that it was made for"
            raise errors.ModelInvalid(told, model=model)
        return model

    async def expect_adapter(self, ref: str) -> None:
        """The same for an adapter. Raises as `adapter`."""
        try:
            await self.library.adapter(ref)
        except errors.ModelNotFound:
            named = self._hub_model(ref)
            if named is None or "/" not in named or not self._fetches:
                await self.adapter(ref)

    @property
    def _fetches(self) -> bool:
        """Whether requests bring the models that they want."""
        return self._settings.download == "auto" and not self._downloads.fetchers.offline

    async def _bring(
        self, ref: str, look: Callable[[str], Awaitable[T]], kind: Literal["model", "adapter"], watcher: Watcher | None
    ) -> T:
        """What `look` finds on disk, fetched first if need be. Raises as `have`."""
        try:
            return await look(ref)
        except errors.ModelNotFound as error:
            model = self._hub_model(ref)
            if model is None or "/" not in model or self._settings.download == "never":
                raise
            record = self._core.models.get(model)
            under_way = record is not None and record.lifecycle.state == "Downloading"
            if self._downloads.fetchers.offline and not under_way:
                raise
            if self._settings.download == "ask":
                raise await self._not_downloaded(model, error, kind) from None
            if kind == "adapter" and (await self.library.plan_download(model)).kind == "model":
                raise  # gigabytes that are no adapter
        job = await self._start_download(0, model)
        await self._jobs.follow(job, watcher)
        return await look(ref)

    async def _not_downloaded(
        self, model: str, otherwise: errors.ModelNotFound, kind: Literal["model", "adapter"]
    ) -> errors.RpcError:
        """The refusal of a request for what the hub has, with what fetching it would take."""
        try:
            plan = await self.library.plan_download(model)
        except errors.ModelNotFound:
            return otherwise
        except errors.QueueFull as error:
            return error
        except errors.RpcError as error:
            return errors.ModelNotFound(f"{error.message}; and {otherwise.message}", **otherwise.details)
        if kind != plan.kind:
            told = f"{model} is an adapter: name it as `adapter`, beside the model that it was made for"
            return otherwise if kind == "adapter" else errors.ModelInvalid(told, model=model)
        told = f"{model} is not on this machine, but the hub has it"
        return errors.ModelNotDownloaded(told, model=model, plan=msgspec.to_builtins(plan))

    async def have_draft(self, ref: str, model: str) -> Found:
        """The draft model that `ref` names. Raises what `have` does, and InvalidParams for what is none."""
        try:
            draft = await self.have(ref)
            if draft != model:
                found = await self.library.find(draft)
                if found.kind == "adapter":
                    raise errors.ModelInvalid("it is an adapter", model=draft)
                return found
        except errors.ModelInvalid as error:
            told = f"{ref} cannot be a draft model: {error.message}"
            raise errors.InvalidParams(told, **error.details | {"field": "draft_model"}) from None
        except errors.ModelNotFound as error:
            error.details["field"] = "draft_model"
            raise
        raise errors.InvalidParams("a model is no draft model of itself: it would only be slower", field="draft_model")

    async def adapter(self, ref: str, watcher: Watcher | None = None) -> wire.Adapter | None:
        """The adapter that `ref` names, None where that says that there is to be none; fetched first where the settings
        allow that. Raises as Store.adapter and `have` do."""
        if ref == NO_ADAPTER:
            return None
        try:
            found = await self._bring(ref, self.library.adapter, "adapter", watcher)
        except (errors.ModelNotFound, errors.ModelNotDownloaded) as error:
            error.details["field"] = "adapter"
            raise
        return wire.Adapter(id=found.adapter, path=found.path)
