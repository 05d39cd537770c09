"""What must hold of the core between any two events; the tests check it after each. Too slow to run always."""

from __future__ import annotations

from collections import Counter

from .batches import ENDED_BATCHES_KEPT
from .book import ENDED_JOBS_KEPT, REMAINS_KEPT
from .core import Core
from .jobs import BatchJob, DownloadJob, repo_of
from .records import ModelRecord


class InvariantBroken(AssertionError):
    """A bug in the core, named."""


def check(core: Core) -> None:
    """Raises InvariantBroken with the first thing that does not hold."""
    for record in core.models.values():
        _check_model(core, record)
        _check_files(core, record)
    _check_requests(core)
    _check_loads(core)
    _check_downloads(core)
    _check_jobs(core)
    _check_batches(core)


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise InvariantBroken(what)


def _check_model(core: Core, m: ModelRecord) -> None:
    state = m.lifecycle.state
    _hold((m.worker is not None) == (state in ("Loading", "Ready")), f"{m.id} is {state} with worker {m.worker}")
    _hold(m.worker is None or core._book.by_worker.get(m.worker) is m, f"{m.id}'s worker is not on the books")
    _hold(not m.running or state == "Ready", f"{m.id} runs requests while {state}")
    _hold(m.stopping is None or m.worker is not None, f"{m.id} is stopping without a worker")
    _hold(m.worker is not None or m.draft is None, f"{m.id} has a draft model and no worker")
    _hold(m.last_seq is None or m.worker is not None, f"{m.id} makes room without a worker")
    _hold(len(m.running) <= m.max_batch, f"{m.id} runs more than fits into a batch")
    _hold(m.running_by_client == Counter(r.client for r in m.running.values()), f"{m.id} miscounts its clients")
    # A leased model may still fail to load again after its worker died; what serves is never taken from a lease.
    _hold(not (m.stopping == "unloaded" and m.leases) or core.draining, f"{m.id} is stopping while leased")
    if m.serving and not m.running and not m.queue:
        _hold(m.idle_since is not None, f"{m.id} rests, but its idle timer does not run")
    if m.serving and m.last_seq is None and not m.recycling:
        others = [r for r in m.queue if not r.yields]
        _hold(not others or len(m.running) == m.max_batch, f"{m.id} lets requests wait beside free slots")
        quiet = all(r.priority == "batch" for r in m.running.values())
        _hold(not m.queue or not quiet or len(m.running) == m.max_batch, f"{m.id} lets items wait for nobody")
        urgent = m.queue.of_priority("interactive")
        stay = [r for r in m.running.values() if r.yields and r.ending is None]
        going = sum(r.ending is not None for r in m.running.values())
        _hold(not stay or urgent <= going, f"{m.id} lets interactive requests wait for batch jobs")
    if m.wanted and m.worker is None:
        _hold(m.id in core._book.pending, f"{m.id} is wanted, but is in no line")
    rules, preload = core._book.rules, m.id in core._book.rules.preload
    _hold((m.pinned, m.preload) == (m.id in rules.pinned, preload), f"{m.id} is not as the rules have it")
    _hold(m.preload or m.preload_at is None, f"{m.id} is to be preloaded, and no rule says so")
    _hold(not m.pinned or m.idle_deadline is None, f"{m.id} is pinned, and would go when idle")
    live = m.id in core._book.pending or (state == "Loading" and m.stopping is None)
    _hold((m.job is not None) == live, f"{m.id} is {state} with job {m.job}")


def _check_requests(core: Core) -> None:
    placed = Counter(r.rid for m in core.models.values() for r in m.queue)
    placed.update(rid for m in core.models.values() for rid in m.running)
    _hold(placed == Counter(list(core.requests)), "a request is lost, or in two places")
    goals = Counter(rid for m in core.models.values() for rid in m.goals)
    _hold(goals == Counter(list(core.goals)), "a goal is lost, or in two places")
    _hold(core.waiting <= max(core.limits.queue, core._book.overhang[0]), "more requests wait than are allowed to")


def _check_loads(core: Core) -> None:
    loaded = core._book.by_worker.values()
    lowered = sum(m.wanted_bytes for m in loaded) > core.limits.budget_bytes
    if lowered:
        staying = [m for m in loaded if m.stopping is None and m.last_seq is None]
        enough = sum(m.wanted_bytes for m in staying) <= core.limits.budget_bytes
        _hold(enough or all(m.leases for m in staying), "the loaded models take more than the budget, and none goes")
    for name in core._book.pending:
        m = core.models[name]
        _hold(m.worker is None and m.job is not None and m.job.state == "queued", f"{name} waits in line wrongly")
    urgent = any(core.models[name].urgent_load for name in core._book.pending)
    if not (urgent or lowered):
        asked = [m.id for m in core._book.by_worker.values() if m.last_seq is not None]
        _hold(not asked, f"{asked} are to make room, and nobody waits for any")
    if urgent:
        going = any(m.stopping is not None or m.last_seq is not None for m in core._book.by_worker.values())
        _hold(going or core._gauge.waited_for, "a load waits for room, and nothing is going to make any")


def _check_files(core: Core, m: ModelRecord) -> None:
    """What a model has to do with the disk: its download, its fetcher, its being deleted."""
    book, state, aborted = core._book, m.lifecycle.state, core._downloads._aborted
    _hold(book.downloads.get(m.id) is m.download, f"{m.id}'s download is not on the books")
    _hold(m.fetcher is None or book.by_fetcher.get(m.fetcher.number) is m.fetcher, f"{m.id}'s fetcher is unknown")
    _hold((m.id in book.remains) == (state == "NotDownloaded" and not m.deleting), f"{m.id}, {state}, remains wrongly")
    if state == "Downloading" and not aborted:
        _hold(m.download is not None or m.leaving is not None, f"{m.id} is Downloading, and nothing downloads it")
    _hold(state != "NotDownloaded" or m.download is None, f"{m.id} has a download and is not Downloading")
    _hold(m.later is None or m.worker is not None, f"{m.id} puts off its new needs for no worker")
    _hold(bool(m.outdated) == (m.id in book.outdated), f"{m.id}'s outdated revisions are not on the books")
    if m.outdated and not (aborted or core._downloads._held):
        fetched = any(repo_of(f.model) == repo_of(m.id) for f in book.by_fetcher.values())
        _hold(m.worker is not None or fetched, f"{m.id} keeps outdated revisions for nobody")
    _hold(m.deleting == (m.id in book.deleting), f"{m.id}'s being deleted is not on the books")
    _hold(m.deleting or not any(g.kind == "delete" for g in m.goals.values()), f"{m.id}: a delete is forgotten")
    if m.deleting:
        _hold(not m.busy and not m.leases and m.download is None, f"{m.id} is deleted while in use")
        _hold(m.worker is None or m.stopping is not None, f"{m.id} is deleted beside a worker that stays")
    if book.deleting.get(m.id):
        _hold(m.worker is None and m.fetcher is None, f"{m.id}'s files are removed beside a process")


def _check_downloads(core: Core) -> None:
    book, line = core._book, core._downloads
    _hold(all(core.models[f.model].fetcher is f for f in book.by_fetcher.values()), "a fetcher belongs to no model")
    _hold(line.fetching <= max(core.limits.downloads, book.overhang[1]), "too many fetchers")
    repos = Counter(repo_of(f.model) for f in book.by_fetcher.values())
    repos.update(repo_of(j.model) for j in line._retrying.values())
    _hold(all(n == 1 for n in repos.values()), "two fetchers work on one repository")
    for name, said in book.deleting.items():
        _hold(not said or repo_of(name) not in repos, f"{name}'s files are removed while its repository is fetched")
    for job in book.downloads.values():
        fetcher = core.models[job.model].fetcher
        places = [job.job in line._waiting, job.job in line._retrying, fetcher is not None and fetcher.job is job]
        _hold(sum(places) == 1 or (line._aborted and not any(places)), f"{job.job} is in {sum(places)} places")
        _hold((job.state == "queued") == (job.job in line._waiting), f"{job.job} is {job.state} in the wrong place")
        _hold((job.retry_at is not None) == (job.job in line._retrying), f"{job.job} is due without waiting")
    _hold({j.job for j in (*line._waiting.values(), *line._retrying.values())} <= set(core.jobs), "a job is unknown")
    if line.fetching < core.limits.downloads and not (core.draining or line._held):
        idle = [job.job for job in line._waiting.values() if not line._in_use(job.model)]
        _hold(not idle, f"{idle} wait beside a free place")


def _check_jobs(core: Core) -> None:
    for job in core.jobs.values():
        if isinstance(job, BatchJob):
            continue
        if job.ended_at is None:
            m = core.models[job.model]
            held = m.download if isinstance(job, DownloadJob) else m.job
            _hold(held is job, f"{job.job} is open, and its model does not know of it")
        else:
            _hold(job.state in ("done", "failed", "cancelled"), f"{job.job} has ended {job.state}")
            _hold((job.state == "failed") == (job.error is not None), f"{job.job} is {job.state} with {job.error}")
    ended = sum(job.ended_at is not None for job in core.jobs.values() if not isinstance(job, BatchJob))
    fetching = max(core.limits.downloads, core._book.overhang[1])
    _hold(ended <= ENDED_JOBS_KEPT and len(core._book.remains) <= REMAINS_KEPT + fetching, "all is kept")


def _check_batches(core: Core) -> None:
    line, limits = core._batches, core.limits
    jobs = {name: job for name, job in core.jobs.items() if isinstance(job, BatchJob)}
    _hold(
        all(jobs.get(name) is job and job.ended_at is None for name, job in line._jobs.items()), "an ended job is open"
    )
    _hold(all(job.ended_at is not None for job in line._kept.values()), "an open job counts as ended")
    _hold(line.held or len(line._kept) <= ENDED_BATCHES_KEPT, "ended jobs are kept for ever")
    _hold(all(j.ended_at is not None or name in line._jobs for name, j in jobs.items()), "an open job is forgotten")
    _hold(len(line.flights) <= limits.batch_slots, "too many items run")
    alone = [flight for flight in line.flights.values() if flight.alone]
    _hold(not alone or len(line.flights) == 1, "a suspect does not run alone")
    _hold(len(line.flights) + len(line.unrecorded) < 2 * limits.batch_slots, "too many items are not recorded")
    waiting = [*line.flights.values(), *(flight for _, flight in line._suspects)]
    _hold(all(flight.job.live for flight in waiting), "an item of a job that does not run waits or runs")
    for job in jobs.values():
        _hold(job.failed <= job.done <= job.total, f"{job.job} has recorded {job.done} of {job.total} items")
        _hold(job.live or not job.ready, f"{job.job} has items ready, and does not run")
        _hold(job.shown is not None, f"{job.job} was never shown")
        _hold(len(places := line.places(job)) == len(set(places)), f"an item of {job.job} is in two places")
    if line.fault is None and not (core.draining or line.held or alone):
        due = any(at <= line._now and flight.job.may_run for at, flight in line._suspects)
        able = [job.job for job in line._jobs.values() if job.ready and job.may_run]
        busy = len(line.flights) >= limits.batch_slots or len(line.unrecorded) >= limits.batch_slots
        _hold(not able or busy or (due and line.flights), f"{able} have items ready beside free slots")
