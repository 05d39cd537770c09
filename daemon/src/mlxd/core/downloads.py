"""The line of downloads: which fetchers run, and what becomes of the models that they fetch.

How a download goes:
    1. It has a job at once, and waits: first come, first served, `limits.downloads` fetchers at a time. A fetcher
       counts until its process is gone, and a download keeps its place while it waits to start another fetcher. Two
       revisions of one repository share files, so that only one of them is fetched at a time.
    2. A model that is not here is Downloading from then on. One that is here stays as it is: that is an update, told
       by the same events.
    3. Its fetcher dies: another one is started, later each time, unless too many died in a row that brought nothing.
    4. It ends by Fetched, FetchFailed, too many deaths, or by being cancelled. Being cancelled ends the job at once;
       the model leaves Downloading when the process is gone, and what was asked for meanwhile starts after that.
    5. A daemon that stops ends no download: the next one goes on with it.
"""

from __future__ import annotations

from mlxd_client import errors
from mlxd_client.errors import RpcError

from . import actions as do
from . import events as ev
from .book import REMAINS_S, Book, error_object
from .jobs import DownloadJob, Fetcher, repo_of
from .records import ModelRecord

# Downloads that may be open at a time, waiting ones included; more are refused.
OPEN_DOWNLOADS = 256
# A fetcher that brought so much did its part, however it ended.
WORTH_BYTES = 8 * 1024 * 1024


class DownloadLine:
    """Starts and stops the fetchers of the book's models."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._waiting: dict[str, DownloadJob] = {}  # by job, oldest first
        self._retrying: dict[str, DownloadJob] = {}
        self._fetchers = 0
        self._aborted = self._held = False

    # --- wishes ---------------------------------------------------------------------------------------------------

    def download(self, event: ev.Download, now: float) -> None:
        record = self._book.models.get(event.model)
        refusal = self._refusal(event.model, record)
        if refusal is not None:
            self._book.fail(event.rid, refusal)
            return
        if record is None:
            record = self._book.new_model(event.model)
        if record.download is None:
            self._open(event, record, now)
        assert record.download is not None
        record.download.repair |= event.repair  # one that runs goes on as it was started
        self._book.out.append(do.Started(event.rid, record.download.job))

    def _refusal(self, model: str, record: ModelRecord | None) -> RpcError | None:
        if self._book.draining:
            return errors.ShuttingDown("the daemon is stopping and takes no new work")
        if record is not None and record.source != "hub":
            return errors.Unsupported("only models of the hub can be downloaded", model=model)
        if record is not None and record.deleting:
            return errors.ModelBusy(f"{model} is being deleted", model=model, deleting=1)
        if model not in self._book.downloads and len(self._book.downloads) >= OPEN_DOWNLOADS:
            return errors.QueueFull(f"{OPEN_DOWNLOADS} downloads are open already", model=model)
        return None

    def _open(self, event: ev.Download, record: ModelRecord, now: float) -> None:
        book = self._book
        name = event.job if event.job is not None and event.job not in book.jobs else book.new_download_id()
        began = now if event.started_at is None else event.started_at - book.wall
        old = record.leaving.job.old_revision if record.revision is None and record.leaving else record.revision
        job = DownloadJob(name, record.id, event.repair, began, old_revision=old)
        book.jobs[name] = self._waiting[name] = job
        record.download = book.downloads[record.id] = job
        book.publish_job(job)
        if record.leaving is None:  # else it is announced once that one is gone
            self._announce(record, now)

    def _announce(self, record: ModelRecord, now: float) -> None:
        record.error = None
        if record.lifecycle.state == "NotDownloaded":
            self._book.remains.pop(record.id, None)
            self._book.move(record, "download", now)
        else:
            self._book.publish("download_started", record)

    def cancel(self, job: DownloadJob, discard: bool, now: float) -> None:
        """Give up on a download, or on what an ended one has left."""
        if self._aborted:
            return
        if job.ended_at is None:
            record = self._book.models[job.model]
            self._let_go(record, job)
            self._book.close_job(job, "cancelled", now)
            if record.fetcher is not None and record.fetcher.job is job:
                self._stop(record.fetcher)
            elif record.leaving is None:
                self._left(record, now)
        if discard:
            self._discard(job.model)

    def _let_go(self, record: ModelRecord, job: DownloadJob) -> None:
        """The job is over: nothing may start for it any more."""
        record.download = None
        del self._book.downloads[record.id]
        self._waiting.pop(job.job, None)
        self._retrying.pop(job.job, None)

    def _left(self, record: ModelRecord, now: float) -> None:
        """A cancelled download is gone altogether; one that was asked for meanwhile takes its place."""
        next_one, record.download = record.download, None
        if record.lifecycle.state == "Downloading":
            self._book.move(record, "download_cancelled", now)
            self._book.remain(record, now)
        else:
            self._book.publish("download_cancelled", record)
        if next_one is not None:
            record.download = next_one
            self._announce(record, now)

    def _discard(self, model: str) -> None:
        """Remove what is left of the repository's downloads, once no process works on it; a newer wish keeps it."""
        repo = repo_of(model)
        if any(repo_of(name) == repo for name in self._book.downloads):
            return
        for fetcher in self._book.by_fetcher.values():
            if repo_of(fetcher.model) == repo:
                fetcher.discard = True
                return
        self._book.out.append(do.DiscardPartial(model))

    def _stop(self, fetcher: Fetcher) -> None:
        if not fetcher.stopping:
            fetcher.stopping = True
            self._book.out.append(do.StopFetcher(fetcher.number))

    # --- what fetchers do -----------------------------------------------------------------------------------------

    def fetch_progress(self, event: ev.FetchProgress, now: float) -> None:
        fetcher = self._heard(event.fetcher)
        if fetcher is None:
            return
        job = fetcher.job
        job.phase, job.rate_bytes_s = event.phase, event.rate_bytes_s
        job.done_bytes, job.total_bytes = event.done_bytes, event.total_bytes
        job.attempts = max(job.attempts, event.attempts)
        if job.mark_bytes is None:
            job.mark_bytes = event.done_bytes
        elif event.done_bytes - job.mark_bytes >= WORTH_BYTES:
            job.mark_bytes, job.starts = event.done_bytes, 1
        self._tell(job)

    def fetched(self, event: ev.Fetched, now: float) -> None:
        fetcher = self._heard(event.fetcher)
        if fetcher is None:
            return
        book, job, found = self._book, fetcher.job, event.found
        record = book.models[job.model]
        self._let_go(record, job)
        job.revision = found.revision
        job.done_bytes = job.total_bytes = job.total_bytes or found.size_bytes  # a quick one has told nothing
        record.error = None
        book.learn(record, found)
        self._replace(record, job.old_revision)
        if record.lifecycle.state == "Downloading":
            book.move(record, "downloaded", now)
            if record.preload:
                record.preload_at = now
        else:
            book.publish("download_completed", record)
        book.close_job(job, "done", now)
        self._stop(fetcher)

    def _replace(self, record: ModelRecord, old: str | None) -> None:
        """Take down the revision that an update has replaced. Pinned models stay what they are."""
        if "@" in record.id:
            return
        if old is not None and old != record.revision and old not in record.outdated:
            record.outdated.append(old)
            self._book.outdated[record.id] = None

    def fetch_failed(self, event: ev.FetchFailed, now: float) -> None:
        fetcher = self._heard(event.fetcher)
        if fetcher is not None:
            self._fail(fetcher.job, event.error, now)
            self._stop(fetcher)

    def _fail(self, job: DownloadJob, reason: RpcError, now: float) -> None:
        record = self._book.models[job.model]
        self._let_go(record, job)
        record.error = error_object(reason)
        if record.lifecycle.state == "Downloading":
            self._book.move(record, "download_failed", now)
            self._book.remain(record, now)
        else:
            self._book.publish("error", record, error=record.error)
        self._book.close_job(job, "failed", now, record.error)

    def fetcher_exited(self, event: ev.FetcherExited, now: float) -> None:
        fetcher = self._book.by_fetcher.pop(event.fetcher, None)
        if fetcher is None:
            return
        job, record = fetcher.job, self._book.models[fetcher.model]
        record.fetcher = None
        if self._aborted:
            return
        if job.state == "cancelled":
            self._left(record, now)
        elif job.ended_at is None and self._held:
            self._wait(job)
        elif job.ended_at is None:
            self._died(job, event.error, now)
        if fetcher.discard:
            self._discard(job.model)

    def _died(self, job: DownloadJob, error: RpcError | None, now: float) -> None:
        limits = self._book.limits
        told = "the fetcher ended" if error is None else error.message
        if job.starts >= limits.fetcher_starts:
            refusal = errors.DownloadFailed(
                f"the download of {job.model} failed {job.starts} times in a row without getting anywhere: {told}",
                model=job.model, attempts=job.starts, last=told,
            )  # fmt: skip
            self._fail(job, refusal, now)
            return
        job.phase, job.rate_bytes_s = "retrying", None
        job.retry_at = now + limits.fetcher_backoff_s * 2 ** (job.starts - 1)
        self._retrying[job.job] = job
        self._tell(job)

    def _wait(self, job: DownloadJob) -> None:
        """Put a download back into the line. It was not its fetcher's fault."""
        job.state = job.phase = "queued"
        job.starts, job.retry_at, job.rate_bytes_s = max(0, job.starts - 1), None, None
        self._waiting[job.job] = job
        self._tell(job)

    def _heard(self, number: int) -> Fetcher | None:
        """The fetcher, if what it says still counts: not once it was told to stop, or is gone."""
        fetcher = self._book.by_fetcher.get(number)
        return None if fetcher is None or fetcher.stopping else fetcher

    def _tell(self, job: DownloadJob) -> None:
        self._book.publish_job(job)
        self._book.publish("download_progress", self._book.models[job.model], progress=job.progress)

    # --- what the world says of models ----------------------------------------------------------------------------

    def newest(self, event: ev.Newest, now: float) -> None:
        record = self._book.models.get(event.model)
        if record is None or record.source != "hub" or "@" in record.id or record.revision is None or record.deleting:
            return
        latest = None if event.revision == record.revision else event.revision
        if latest != record.latest_revision:
            record.latest_revision = latest
            self._book.publish("model_found", record)

    def lost(self, record: ModelRecord, now: float) -> None:
        """The disk does not hold this model, which has no worker and waits for none."""
        book = self._book
        if record.lifecycle.state == "NotDownloaded":
            remembered = record.error is not None and now - book.remains[record.id] < REMAINS_S
            if record.fetcher is None and not remembered:
                book.lose(record)
        elif record.download is not None:  # its update has to bring everything now
            record.revision = record.latest_revision = record.size_bytes = record.context_length = record.error = None
            book.move(record, "lost", now)
            book.move(record, "download", now)
        elif record.fetcher is None:
            book.move(record, "lost", now)
            book.forget(record)

    # --- time, and the end ----------------------------------------------------------------------------------------

    @property
    def fetching(self) -> int:
        """How many fetchers there are, or are about to be again."""
        return len(self._book.by_fetcher) + len(self._retrying)

    def next_deadline(self) -> float | None:
        """When a fetcher has to be started again, on the clock of `now`."""
        if not self._retrying or self._book.draining:
            return None
        return min((job.retry_at for job in self._retrying.values() if job.retry_at is not None), default=None)

    def hold(self) -> None:
        """Stop all fetchers, and start none until `go_on`. The jobs stay open."""
        self._held = True
        for job in list(self._retrying.values()):
            del self._retrying[job.job]
            self._wait(job)
        for fetcher in self._book.by_fetcher.values():
            self._stop(fetcher)

    def go_on(self) -> None:
        self._held = False

    def abort(self) -> None:
        """Stop all fetchers and say nothing more: the jobs are the next daemon's."""
        self._aborted = True
        for fetcher in self._book.by_fetcher.values():
            self._stop(fetcher)

    def settle(self, now: float) -> None:
        """Start what may start, and let old revisions go that nobody uses."""
        if self._held:
            return
        if self._book.outdated and not self._aborted:
            self._prune()
        if self._book.draining or not (self._waiting or self._retrying):
            return
        for job in [j for j in self._retrying.values() if j.retry_at is not None and j.retry_at <= now]:
            del self._retrying[job.job]
            self._start(job)
        free = self._book.limits.downloads - self.fetching
        for job in list(self._waiting.values()):
            if free <= 0:
                break
            if not self._in_use(job.model):
                del self._waiting[job.job]
                self._start(job)
                free -= 1

    def _in_use(self, model: str) -> bool:
        """Whether something else works on the files of the model's repository, or is about to."""
        repo, book = repo_of(model), self._book
        at_work = [f.model for f in book.by_fetcher.values()] + [j.model for j in self._retrying.values()]
        return any(repo_of(name) == repo for name in (*at_work, *book.deleting))

    def _start(self, job: DownloadJob) -> None:
        record = self._book.models[job.model]
        self._fetchers += 1
        if job.starts == 0 and record.revision is not None:
            job.old_revision = record.revision
        job.starts += 1
        job.attempts = max(job.attempts, job.starts)
        job.state, job.phase, job.retry_at = "running", "planning", None
        record.fetcher = self._book.by_fetcher[self._fetchers] = Fetcher(self._fetchers, job)
        self._book.out.append(do.StartFetcher(self._fetchers, job.job, record.id, job.repair))
        self._tell(job)

    def _prune(self) -> None:
        book = self._book
        fetched = {repo_of(f.model) for f in book.by_fetcher.values() if f.job.state != "done"}
        for name in list(book.outdated):
            record = book.models[name]
            if record.worker is None and repo_of(name) not in fetched:
                old = tuple(revision for revision in record.outdated if revision != record.revision)
                record.outdated = []
                del book.outdated[name]
                if old:
                    book.out.append(do.Prune(name, old))
