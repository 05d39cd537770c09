"""Models between the hub and the disk: performs what the core decides on downloads and deletes, and asks the hub.

Decides nothing about states. Open downloads are written down, so that the next daemon goes on with them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mlxd_client import errors, types

from . import childwire as wire
from .children.death import Death
from .core import actions as do
from .core import events as ev
from .fetchers import FetcherLink, Fetchers
from .stateversion import json_version, refuse_newer
from .store import hub, remove
from .wholefiles import write_whole

if TYPE_CHECKING:
    from .server.runtime_api import Log
    from .settings import Settings
    from .store import Found, Store

__all__ = ["Downloads", "OpenJob", "Records"]

T = TypeVar("T")

# How long the hub may take to say what a model is; a person or a request waits.
ASK_S = 30.0
# For so long it is not asked the same again, where it answered, and where it refused or could not be reached.
ASKED_S = 60.0
REFUSED_S = 5.0
_ASKED_KEPT = 256
# How many fetchers ask at a time, and how many models may wait for that: each caller could otherwise start a process.
_ASKERS = 4
_ASKING = 64
# How many models are hashed at a time.
_VERIFIERS = 2


class OpenJob(msgspec.Struct, frozen=True, kw_only=True):
    """A download that has not ended; `started_at` in Unix seconds."""

    job: str
    model: str
    started_at: float
    repair: bool = False


RECORDS_VERSION = 2


class _Open(msgspec.Struct, frozen=True, kw_only=True):
    """The file of open downloads. Version 1 was the bare list."""

    version: int = RECORDS_VERSION
    downloads: list[OpenJob]


class Records:
    """The downloads that have not ended, in one small file. Written at once and as a whole: a daemon that is killed
    the moment after has them, and one that is killed meanwhile has those of before."""

    def __init__(self, path: Path, log: Log) -> None:
        self._path = path
        self._log = log
        self._open: dict[str, OpenJob] = {}
        self._another = False

    def let_go(self) -> None:
        """The file is another daemon's; until `take_back` nothing is written."""
        self._another = True

    def take_back(self) -> None:
        """It is this one's after all, and may have changed meanwhile."""
        self._another = False
        self._write()

    def refuse_newer(self) -> None:
        """Raises StateTooNew. To be called before anything is written."""
        refuse_newer(self._path, json_version(self._path), RECORDS_VERSION)

    def read(self) -> list[OpenJob]:
        """What an earlier daemon left open; nothing where the file is not there, or is no such file.

        Raises: StateTooNew.
        """
        self.refuse_newer()
        try:
            told = msgspec.json.decode(self._path.read_bytes(), type=_Open | list[OpenJob])
            found = told.downloads if isinstance(told, _Open) else told
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._log.warning("the list of open downloads cannot be read", reason=str(error))
            return []
        self._open = {job.job: job for job in found}
        return found

    def __contains__(self, job: str) -> bool:
        return job in self._open

    def keep(self, job: OpenJob) -> None:
        if self._open.get(job.job) != job:
            self._open[job.job] = job
            self._write()

    def repair(self, job: str) -> None:
        """It was asked to check what is there, too."""
        if (known := self._open.get(job)) is not None:
            self.keep(msgspec.structs.replace(known, repair=True))

    def drop(self, job: str) -> None:
        if self._open.pop(job, None) is not None:
            self._write()

    def _write(self) -> None:
        if self._another:
            return
        try:
            # Not durable: the loop would wait for the disk, and after a power cut a download is asked for again.
            write_whole(self._path, msgspec.json.encode(_Open(downloads=list(self._open.values()))), durable=False)
        except OSError as error:  # a full disk; the downloads go on, but a next daemon would not know of them
            self._log.warning("open downloads could not be written down", reason=str(error))


class Downloads:
    """The hub's side of one runtime.

    Attributes:
        records: the downloads that have not ended.
        fetched_bytes: what crossed the network so far, for those that failed, too.

    Args:
        store: finds models; asked on `disk`, one question at a time.
        tell: gives the core an event.
        note: tells the core where a model lies now, and returns the facts as its event.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fetchers: Fetchers,
        *,
        tell: Callable[[ev.Event], None],
        note: Callable[[Found], ev.Found],
        log: Log,
        loop: asyncio.AbstractEventLoop,
        disk: ThreadPoolExecutor,
    ) -> None:
        self.fetchers = fetchers
        self._settings = settings
        self._store = store
        self._tell = tell
        self._note = note
        self._log = log
        self._loop = loop
        self._disk = disk
        self._remover = ThreadPoolExecutor(1, "mlxd-remover")  # unlinking gigabytes takes a while
        self.records = Records(Path(settings.home) / "downloads.json", log)
        self.fetched_bytes = 0
        self._coming: dict[int, int] = {}  # by fetcher: what it has fetched so far
        self._links: dict[int, FetcherLink[wire.Fetched]] = {}
        self._asked: dict[tuple[str, int | None], tuple[float, wire.FetchPlan | errors.RpcError]] = {}
        self._asking: dict[tuple[str, int | None], asyncio.Task[wire.FetchPlan | errors.RpcError]] = {}
        self._askers, self._verifiers = asyncio.Semaphore(_ASKERS), asyncio.Semaphore(_VERIFIERS)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- names ----------------------------------------------------------------------------------------------------

    def model_of(self, ref: str, revision: str | None = None) -> str:
        """The id of the model of the hub that a caller names, with or without a revision.

        Raises:
            ModelNotFound: it can name nothing.
            Unsupported: it is a model that came with mlxd, or a folder.
            InvalidParams: two revisions are named.
        """
        named = self._store.hub_repo(ref)
        if named is None:
            name = self._store.aliases.get(ref, ref)
            if name.startswith(("/", "mlxd/")):
                raise errors.Unsupported(f"{name} is not a model of the hub", model=name)
            raise errors.ModelNotFound(f"{ref[:200]!r} is no name that a model of the hub can have", model=ref[:200])
        repo, found = named
        if revision is not None and not hub.is_revision(revision):
            raise errors.InvalidParams(f"{revision!r} is no name that a revision can have", field="revision")
        if revision is not None and found is not None and revision != found:
            raise errors.InvalidParams(f"{ref} names a revision already", field="revision")
        return hub.join_ref(repo, revision or found or hub.MAIN)

    def _where(self, model: str) -> wire.Where:
        repo, revision = hub.split_ref(model)
        return wire.Where(
            repo=repo, cache=str(self._store.cache), revision=revision or hub.MAIN, pin=revision is not None
        )

    # --- performing -----------------------------------------------------------------------------------------------

    def start(self, action: do.StartFetcher) -> None:
        settings, number = self._settings, action.fetcher
        fetch = wire.Fetch(
            where=self._where(action.model), connections=settings.download_connections,
            rate_bytes_s=settings.download_rate_bytes_s, floor_bytes_s=settings.download_floor_bytes_s,
            stall_s=settings.download_stall_s, repair=action.repair,
        )  # fmt: skip
        link = FetcherLink(
            "fetch", fetch, wire.Fetched,
            on_progress=lambda at: self._progressed(number, at),
            on_answer=lambda answer: self._answered(number, action.model, answer),
            on_exit=lambda death: self._exited(number, action.model, death),
        )  # fmt: skip
        self._links[number] = link
        self.fetchers.start(action.model, link)
        self._log.info("downloading", model=action.model, job=action.job, pid=link.child.pid if link.child else 0)

    def stop(self, action: do.StopFetcher) -> None:
        link = self._links.get(action.fetcher)
        if link is not None:
            self.fetchers.stop(link)

    def delete(self, action: do.DeleteFiles) -> None:
        repo, _, revision = action.model.partition("@")
        self._later(self._delete(action.model, repo, revision or hub.MAIN))

    async def _delete(self, model: str, repo: str, revision: str) -> None:
        try:
            freed = await self._removing(remove.delete, self._store.cache, repo, revision)
        except errors.RpcError as error:
            self._tell(ev.FilesDeleted(model, 0, error))
        except OSError as error:
            told = errors.PermissionDenied(f"{model} cannot be deleted: {error.strerror or error}", model=model)
            self._tell(ev.FilesDeleted(model, 0, told))
        except Exception as error:  # a bug; whoever waits must hear of it all the same
            self._log.error("deleting failed", model=model, exc_info=error)
            self._tell(ev.FilesDeleted(model, 0, errors.InternalError(f"deleting failed: {type(error).__name__}")))
        else:
            self._log.info("deleted", model=model, freed_bytes=freed)
            self._tell(ev.FilesDeleted(model, freed))

    def discard(self, action: do.DiscardPartial) -> None:
        repo = action.model.partition("@")[0]
        self._later(self._quietly(remove.discard, self._store.cache, repo))

    def prune(self, action: do.Prune) -> None:
        repo = action.model.partition("@")[0]
        self._later(self._quietly(remove.prune, self._store.cache, repo, action.revisions))

    async def _quietly(self, work: Callable[..., Any], *arguments: Any) -> None:
        """What nobody waits for; where it fails, it is space that is not free, and the log says why."""
        try:
            await self._removing(work, *arguments)
        except Exception as error:
            self._log.warning("files could not be removed", what=work.__name__, exc_info=error)

    def _removing(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._remover, work, *arguments)

    def _later(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what fetchers report -------------------------------------------------------------------------------------

    def _progressed(self, fetcher: int, at: wire.Fetching) -> None:
        phase: Any = at.phase
        self._coming[fetcher] = max(at.fetched_bytes, self._coming.get(fetcher, 0))
        self._tell(
            ev.FetchProgress(fetcher, phase, at.done_bytes, at.total_bytes, at.rate_bytes_s, max(1, at.attempts))
        )

    def _answered(self, fetcher: int, model: str, answer: wire.Fetched | errors.RpcError) -> None:
        if isinstance(answer, errors.RpcError):
            self._log.warning("download failed", model=model, kind=answer.kind, reason=answer.message)
            self._tell(ev.FetchFailed(fetcher, answer))
        else:
            self._coming.pop(fetcher, None)
            self.fetched_bytes += answer.fetched_bytes
            self._log.info("downloaded", model=model, revision=answer.commit, fetched_bytes=answer.fetched_bytes)
            self._later(self._arrived(fetcher, model))

    async def _arrived(self, fetcher: int, model: str) -> None:
        """The disk has the last word on whether it is there."""
        try:
            found = await self._loop.run_in_executor(self._disk, self._store.resolve, model)
        except errors.RpcError as error:
            self._tell(ev.FetchFailed(fetcher, error))
        except Exception as error:  # a bug; the job must not stay open for ever
            self._log.error("looking at a download failed", model=model, exc_info=error)
            self._tell(ev.FetchFailed(fetcher, errors.InternalError(f"looking failed: {type(error).__name__}")))
        else:
            self._tell(ev.Fetched(fetcher, self._note(found)))

    def _exited(self, fetcher: int, model: str, death: Death) -> None:
        self._links.pop(fetcher, None)
        self.fetched_bytes += self._coming.pop(fetcher, 0)  # it had no last word
        self.forget_plans(model)  # a part of it may be here by now
        if not death.expected:
            self._log.error("fetcher ended", model=model, cause=death.cause, told=death.describe())
        self._tell(ev.FetcherExited(fetcher, None if death.expected else death.to_error()))

    async def let_go(self) -> None:
        """Wait until nothing here changes files any more, and leave the list of downloads to another daemon."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self.records.let_go()

    # --- jobs that outlive the daemon -----------------------------------------------------------------------------

    def remember(self, job: types.Job) -> None:
        """Write down what the next daemon has to go on with. Called with every job that is published."""
        if job.ended_at is not None:
            self.records.drop(job.job)
        elif job.model is not None and job.job not in self.records:
            self.records.keep(OpenJob(job=job.job, model=job.model, started_at=job.started_at or time.time()))

    async def begin(self) -> list[OpenJob]:
        """Finish deletes that were cut short, and updates. Returns the downloads that an earlier daemon left open."""
        await self._quietly(remove.finish, self._store.cache)
        await self._quietly(remove.prune_replaced, self._store.cache)
        return [one for one in self.records.read() if self._is_sound(one)]

    def _is_sound(self, one: OpenJob) -> bool:
        try:
            return self.model_of(one.model) == one.model
        except errors.RpcError:
            self.records.drop(one.job)
            return False

    # --- asking ---------------------------------------------------------------------------------------------------

    async def plan(self, model: str, context_length: int | None = None) -> wire.FetchPlan:
        """What the hub says of a model; the same answer for a while, so that no caller can make it ask all the time.

        Raises:
            RpcError: the hub's refusal, DownloadFailed where it does not answer, QueueFull where too many ask.
        """
        key = (model, context_length)
        at, known = self._asked.get(key, (0.0, None))
        lasts_s = REFUSED_S if isinstance(known, errors.RpcError) else ASKED_S
        if known is None or self._loop.time() - at > lasts_s:
            if key not in self._asking:
                if len(self._asking) >= _ASKING:
                    raise errors.QueueFull("too many ask the hub already", retry_after_s=1.0)
                self._asking[key] = self._loop.create_task(self._ask_plan(key))
            known = await asyncio.shield(self._asking[key])  # others may wait for it, too
        if isinstance(known, errors.RpcError):
            raise type(known)(known.message, **known.details)
        return known

    async def _ask_plan(self, key: tuple[str, int | None]) -> wire.FetchPlan | errors.RpcError:
        model, context_length = key
        ask = wire.PlanFetch(where=self._where(model), context_length=context_length)
        answer: wire.FetchPlan | errors.RpcError
        try:
            async with self._askers:
                answer = await self.fetchers.ask(model, "plan", ask, wire.FetchPlan, timeout_s=ASK_S)
        except errors.RpcError as error:
            answer = error
        finally:
            del self._asking[key]
        if len(self._asked) >= _ASKED_KEPT:
            self._asked.clear()
        self._asked[key] = (self._loop.time(), answer)
        return answer

    def forget_plans(self, model: str) -> None:
        """What is on disk of it has changed."""
        for key in [key for key in self._asked if key[0] == model]:
            del self._asked[key]

    async def newest(self, repos: Iterable[str]) -> dict[str, str]:
        """The newest revision of each, of those that the hub knows; {} where it cannot be asked."""
        params = {"repos": list(repos), "cache": str(self._store.cache)}
        if not params["repos"] or self.fetchers.offline:
            return {}
        try:
            async with self._askers:
                answer = await self.fetchers.ask("the hub", "latest", params, dict[str, Any], timeout_s=ASK_S)
        except errors.RpcError as error:
            self._log.warning("the hub could not be asked for revisions", reason=error.message)
            return {}
        return msgspec.convert(answer.get("commits", {}), dict[str, str])

    async def verify(self, snapshot: str) -> list[types.BadFile]:
        """Hash what lies there; takes as long as reading it."""
        async with self._verifiers:
            answer = await self.fetchers.ask(snapshot, "verify", wire.Verify(snapshot=snapshot), wire.Verified)
        return answer.bad_files

    def close(self) -> None:
        self._remover.shutdown(wait=False, cancel_futures=True)
