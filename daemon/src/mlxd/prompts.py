"""What is kept of prompts, over all models: in the workers' memory, as they tell, and on disk, in promptfiles.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mlxd_client import errors, types

from . import childwire as wire
from . import promptfiles
from .workers import WorkerLink, settle

if TYPE_CHECKING:
    from .server.runtime_api import Log
    from .settings import Settings

__all__ = ["Prompts", "ask"]

T = TypeVar("T")

# How long a worker has to say what it keeps, while it may be at a long step; else what it said last is told.
TELL_S = 1.0


class Prompts:
    """Looking at the disk, and removing, happens on a thread.

    Args:
        links: gives the workers whose models are loaded.
    """

    def __init__(
        self, settings: Settings, links: Callable[[], Iterable[WorkerLink]], log: Log, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.root = Path(settings.home) / "cache" / "prompts"
        self._settings = settings
        self._links = links
        self._log = log
        self._loop = loop
        self._disk = ThreadPoolExecutor(1, "mlxd-prompts")
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def budget_bytes(self) -> int:
        """For all entries on disk; nothing goes there from where nothing is kept in memory."""
        return self._settings.prompt_disk_cache_bytes if self._settings.prompt_cache_bytes else 0

    def refuse_newer(self) -> None:
        """Raises StateTooNew where a newer mlxd keeps prompts here."""
        promptfiles.refuse_newer_files(self.root)

    def begin(self) -> None:
        """See to it, some time, that what an earlier daemon has left keeps to the budget of this one."""
        self._later("trim", promptfiles.trim, self.root, self.budget_bytes)

    def forget(self, model: str) -> None:
        """A model is deleted: what was kept of its prompts goes, too."""
        self._later("clear", promptfiles.clear, self.root, model)

    def _later(self, what: str, work: Callable[..., Any], *arguments: Any) -> None:
        task = self._loop.create_task(self._quietly(what, work, *arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, what: str, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            await self._on_disk(work, *arguments)
        except Exception as error:
            self._log.warning("the prompt cache on disk could not be looked after", what=what, exc_info=error)

    def _on_disk(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._disk, work, *arguments)

    # --- what is there --------------------------------------------------------------------------------------------

    async def list(self) -> types.CacheResult:
        """Raises PermissionDenied: the disk cannot be looked at."""
        try:
            found = await self._on_disk(promptfiles.usage, self.root)
        except OSError as error:
            raise _denied("looked at", error) from None
        links = [link for link in self._links() if link.loaded is not None]
        stats = dict(zip([link.model for link in links], await asyncio.gather(*map(self._stats, links)), strict=True))
        models = {}
        for use in found:
            if use.entries:
                models[use.model] = types.ModelCache(
                    model=use.model,
                    disk=types.CacheOnDisk(entries=use.entries, bytes=use.bytes, last_used_at=use.used_at),
                )
        for model, told in stats.items():
            if told is not None:
                self._add_memory(models.setdefault(model, types.ModelCache(model=model)), told)
        return types.CacheResult(
            models=sorted(models.values(), key=lambda one: one.model),
            disk_bytes=sum(use.bytes for use in found),
            memory_budget_bytes=self._settings.prompt_cache_bytes,
            disk_budget_bytes=self.budget_bytes,
        )

    def _add_memory(self, cache: types.ModelCache, told: wire.PromptCacheStats) -> None:
        cache.memory = types.CacheInMemory(
            hits=told.hits, misses=told.misses, saved_tokens=told.saved_tokens, bytes=told.bytes
        )
        if cache.disk is not None or told.disk_failures:
            disk = cache.disk = cache.disk or types.CacheOnDisk()
            disk.hits, disk.saved_tokens, disk.failures = told.disk_hits, told.disk_tokens, told.disk_failures

    async def _stats(self, link: WorkerLink) -> wire.PromptCacheStats | None:
        """What a worker keeps now, or said last that it keeps."""
        try:
            async with asyncio.timeout(TELL_S):
                told = await ask(link, "cache", {})
        except (TimeoutError, errors.RpcError):
            return link.prompt_cache
        return msgspec.convert(told, wire.PromptCacheStats) if told else None

    # --- forgetting -----------------------------------------------------------------------------------------------

    async def clear(self, model: str | None) -> types.ClearCacheResult:
        """Forget what is kept, of one model or of all. Workers go first, so that none writes what it still had.

        Raises PermissionDenied: something could not be removed.
        """
        links = [link for link in self._links() if link.loaded is not None and model in (None, link.model)]
        cleared = [each for each in await asyncio.gather(*map(self._clear, links)) if each is not None]
        try:
            freed = await self._on_disk(promptfiles.clear, self.root, model)
        except OSError as error:
            raise _denied("removed", error) from None
        memory = sum(each.memory_bytes for each in cleared)
        return types.ClearCacheResult(memory_bytes=memory, disk_bytes=freed + sum(each.disk_bytes for each in cleared))

    async def _clear(self, link: WorkerLink) -> wire.Cleared | None:
        try:
            return msgspec.convert(await ask(link, "clear", {}), wire.Cleared)
        except (errors.WorkerDied, errors.MethodNotFound):
            return None  # gone with all that it kept in memory, or one that keeps nothing

    async def has(self, model: str) -> bool:
        """Whether disk keeps anything of a model, which itself may be gone."""
        try:
            return any(use.model == model for use in await self._on_disk(promptfiles.usage, self.root))
        except OSError:
            return False

    def close(self) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)


async def ask(link: WorkerLink, method: str, params: Any, characters: int = 0) -> Any:
    """Ask a worker and wait for its answer; whoever stops waiting takes the question back. Raises RpcError."""
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    request_id = link.ask(method, params, lambda told: settle(answered, told), characters=characters)
    try:
        return await answered
    except asyncio.CancelledError:
        link.give_up(request_id)
        raise


def _denied(what: str, error: OSError) -> errors.PermissionDenied:
    return errors.PermissionDenied(f"the prompt cache on disk cannot be {what}: {error.strerror or error}")
