"""Downloads, deletes and updates in the core, case by case: what is done, what is told, and what the jobs say."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.book import ENDED_JOBS_KEPT, REMAINS_KEPT, REMAINS_S
from mlxd.core.downloads import OPEN_DOWNLOADS
from mlxd_client import errors
from support.core_bench import MODEL, WALL, Bench

MIB = 1024 * 1024


@pytest.fixture
def bench() -> Bench:
    return Bench()


DIED = errors.WorkerDied("killed by SIGKILL", cause="signal")


# --- one download -------------------------------------------------------------------------------------------------


def test_a_download_from_nothing_to_downloaded(bench: Bench) -> None:
    job = bench.download()
    assert job == "download-abc123-1"
    assert bench.names() == ["download_started", "download_progress"]
    start = bench.one(do.StartFetcher)
    assert (start.job, start.model, start.repair) == (job, MODEL, False)
    bench.tell(ev.FetchProgress(start.fetcher, "downloading", 25, 100, 5.0, 2))
    told = bench.job(job)
    assert (told.state, told.phase, told.done_bytes, told.total_bytes, told.rate_bytes_s, told.attempts) == (
        "running", "downloading", 25, 100, 5.0, 2
    )  # fmt: skip
    assert (told.kind, told.progress, told.started_at) == ("download", 0.25, WALL + 10)
    view = bench.view()
    assert (view.state, view.phase, view.progress, view.source) == ("Downloading", "downloading", 0.25, "hub")
    bench.fetched(start.fetcher)
    assert bench.names() == ["download_completed"]
    assert bench.one(do.StopFetcher).fetcher == start.fetcher
    done = bench.job(job)
    assert (done.state, done.progress, done.done_bytes, done.revision) == ("done", 1.0, 100, "r1")
    assert done.ended_at is not None
    assert done.phase is None
    view = bench.view()
    assert (view.state, view.phase, view.progress, view.size_bytes) == ("Downloaded", None, None, 2000)
    bench.gone(start.fetcher)
    assert bench.said == []


def test_load_jobs_keep_their_ids_beside_downloads(bench: Bench) -> None:
    bench.have()
    bench.download("org/other")
    bench.load()
    assert set(bench.core.jobs) == {"download-abc123-1", "load-abc123-1"}
    assert bench.core.load_s(MODEL) == 0.0


def test_who_asks_for_what_is_under_way_is_attached(bench: Bench) -> None:
    job = bench.download()
    assert bench.download(repair=True) == job
    assert bench.all(do.StartFetcher) == []


def test_downloads_wait_their_turn_first_come_first_served(bench: Bench) -> None:
    first = bench.fetch("org/1")
    bench.fetch("org/2")
    jobs = [bench.download(f"org/{n}") for n in (3, 4)]
    assert bench.all(do.StartFetcher) == []
    assert [bench.job(job).state for job in jobs] == ["queued", "queued"]
    assert (bench.view("org/3").state, bench.view("org/3").phase) == ("Downloading", "queued")
    bench.fetched(first)
    assert bench.all(do.StartFetcher) == [], "a fetcher counts until its process is gone"
    bench.gone(first)
    assert bench.one(do.StartFetcher).model == "org/3"


def test_two_revisions_of_one_repository_are_fetched_one_after_the_other(bench: Bench) -> None:
    fetcher = bench.fetch("org/model")
    bench.download("org/model@v1")
    bench.download("org/other")
    assert bench.one(do.StartFetcher).model == "org/other"
    bench.fetched(fetcher)
    bench.gone(fetcher)
    assert bench.one(do.StartFetcher).model == "org/model@v1"


def test_a_job_of_an_earlier_daemon_goes_on_under_its_name(bench: Bench) -> None:
    bench.tell(ev.Download(1, 0, MODEL, repair=True, job="download-old-7", started_at=5.0))
    assert bench.one(do.Started) == do.Started(1, "download-old-7")
    assert bench.one(do.StartFetcher).repair
    assert bench.job("download-old-7").started_at == pytest.approx(5.0)
    bench.tell(ev.Download(2, 0, "org/other", job="download-old-7", started_at=5.0))
    assert bench.one(do.Started).job == "download-abc123-1", "no two jobs have one name"


def test_the_line_of_downloads_has_an_end(bench: Bench) -> None:
    for n in range(OPEN_DOWNLOADS):
        bench.core.handle(ev.Download(n, 1, f"org/{n}"), bench.now)
    rid = bench.ask(lambda rid: ev.Download(rid, 1, MODEL))
    assert isinstance(bench.refused(rid), errors.QueueFull)
    assert MODEL not in bench.core.models
    assert bench.download("org/5"), "who attaches adds nothing"


@pytest.mark.parametrize("source", ["builtin", "path"])
def test_only_models_of_the_hub_are_downloaded_and_deleted(bench: Bench, source) -> None:
    bench.tell(ev.Found(MODEL, source, 10))
    assert isinstance(bench.refused(bench.ask(lambda rid: ev.Download(rid, 1, MODEL))), errors.Unsupported)
    assert isinstance(bench.refused(bench.delete()), errors.Unsupported)


def test_who_leaves_takes_no_download_along(bench: Bench) -> None:
    job = bench.download()
    bench.tell(ev.ClientGone(1))
    assert bench.all(do.StopFetcher) == []
    assert bench.job(job).state == "running"


# --- failing ------------------------------------------------------------------------------------------------------


def test_a_failed_download_stays_visible_for_a_while(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.FetchFailed(fetcher, errors.InsufficientDisk("4 GB are missing", missing_bytes=4)))
    assert bench.names() == ["error"]
    assert bench.one(do.StopFetcher).fetcher == fetcher
    (job,) = bench.core.jobs
    failed = bench.job(job)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error.kind == "insufficient_disk"
    bench.gone(fetcher)
    bench.tell(ev.Lost(MODEL))
    view = bench.view()
    assert view.state == "NotDownloaded"
    assert view.error == failed.error
    for event in (ev.Submit, ev.Ensure):
        rid = bench.ask(lambda rid, event=event: event(rid, 1, MODEL))
        assert isinstance(bench.refused(rid), errors.ModelNotFound)
    bench.now += REMAINS_S
    bench.tell(ev.Lost(MODEL))
    assert bench.names() == ["model_lost"]
    assert MODEL not in bench.core.models


def test_a_failed_download_may_be_tried_again(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.FetchFailed(fetcher, errors.DownloadFailed("gone")))
    bench.download()
    assert bench.view().error is None
    assert bench.all(do.StartFetcher) == [], "the old process is not gone yet"
    bench.gone(fetcher)
    assert bench.names() == ["download_progress"]
    assert bench.one(do.StartFetcher).model == MODEL


def test_a_failed_download_is_not_forgotten_before_its_process_is_gone(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.FetchFailed(fetcher, errors.DownloadFailed("gone")))
    bench.now += REMAINS_S
    bench.tell(ev.Lost(MODEL))
    for n in range(REMAINS_KEPT + 1):
        other = bench.fetch(f"org/{n}")
        bench.tell(ev.FetchFailed(other, errors.DownloadFailed("gone")))
        bench.gone(other)
    assert MODEL in bench.core.models
    bench.gone(fetcher)
    bench.tell(ev.Lost(MODEL))
    assert MODEL not in bench.core.models


def test_a_model_may_come_to_the_disk_by_other_means(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.FetchFailed(fetcher, errors.DownloadFailed("gone")))
    bench.have()
    assert bench.names() == ["model_found"]
    assert (bench.view().state, bench.view().error) == ("Downloaded", None)
    bench.gone(fetcher)
    assert bench.said == []


def test_only_so_many_failures_are_remembered(bench: Bench) -> None:
    for n in range(REMAINS_KEPT + 10):
        fetcher = bench.fetch(f"org/{n}")
        bench.tell(ev.FetchFailed(fetcher, errors.DownloadFailed("no such repository")))
        bench.gone(fetcher)
    assert len(bench.core.models) == REMAINS_KEPT
    assert "org/9" not in bench.core.models
    assert len(bench.core.jobs) == ENDED_JOBS_KEPT


def test_a_fetcher_that_dies_is_started_again_later_and_later(bench: Bench) -> None:
    fetcher = bench.fetch()
    (job,) = bench.core.jobs
    for wait in (1.0, 2.0):
        bench.gone(fetcher, DIED)
        assert (bench.job(job).state, bench.job(job).phase, bench.view().phase) == ("running", "retrying", "retrying")
        assert bench.core.next_deadline() == bench.now + wait
        bench.now += wait / 2
        bench.tell(ev.Tick())
        assert bench.said == []
        bench.now += wait / 2
        bench.tell(ev.Tick())
        fetcher = bench.one(do.StartFetcher).fetcher
    assert bench.job(job).attempts == 3
    bench.gone(fetcher, DIED)
    error = bench.view().error
    assert error is not None
    assert error.kind == "download_failed"
    assert error.details == {"model": MODEL, "attempts": 3, "last": "killed by SIGKILL"}
    assert bench.job(job).state == "failed"
    assert bench.core.next_deadline() is None


def test_a_fetcher_that_brought_something_has_the_deaths_counted_anew(bench: Bench) -> None:
    fetcher = bench.fetch()
    (job,) = bench.core.jobs
    bench.tell(ev.FetchProgress(fetcher, "downloading", 50 * MIB, 999 * MIB, 1.0, 1))  # lay there before
    for n in range(1, 8):
        bench.tell(ev.FetchProgress(fetcher, "downloading", (50 + 8 * n) * MIB, 999 * MIB, 1.0, 1))
        bench.gone(fetcher, DIED)
        assert bench.core.next_deadline() == bench.now + 1.0
        bench.now += 1.0
        bench.tell(ev.Tick())
        fetcher = bench.one(do.StartFetcher).fetcher
    for _ in range(2):
        bench.tell(ev.FetchProgress(fetcher, "downloading", (50 + 8 * 8 - 1) * MIB, 999 * MIB, 1.0, 1))
        bench.gone(fetcher, DIED)
        bench.now += 10
        bench.tell(ev.Tick())
        if bench.all(do.StartFetcher):
            fetcher = bench.one(do.StartFetcher).fetcher
    assert bench.job(job).state == "failed", "7 MiB are not enough, however often"


def test_a_download_keeps_its_place_while_it_waits_to_try_again() -> None:
    bench = Bench(downloads=1)
    fetcher = bench.fetch("org/1")
    bench.download("org/2")
    bench.gone(fetcher, DIED)
    assert bench.all(do.StartFetcher) == []
    bench.now += 1
    bench.tell(ev.Tick())
    assert bench.one(do.StartFetcher).model == "org/1"


# --- cancelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", [False, True])
def test_cancelling_what_waits_ends_it_at_once(discard: bool) -> None:
    bench = Bench(downloads=1)
    bench.fetch("org/1")
    job = bench.download()
    bench.tell(ev.CancelJob(job, discard))
    assert bench.job(job).state == "cancelled"
    assert bench.names() == ["download_cancelled"]
    assert bench.all(do.DiscardPartial) == [do.DiscardPartial(MODEL)] * discard
    bench.tell(ev.Lost(MODEL))
    assert MODEL not in bench.core.models


@pytest.mark.parametrize("discard", [False, True])
def test_cancelling_what_runs_ends_the_job_at_once_and_the_model_after_it(bench: Bench, discard: bool) -> None:
    fetcher = bench.fetch()
    (job,) = bench.core.jobs
    bench.tell(ev.CancelJob(job, discard))
    assert bench.one(do.StopFetcher).fetcher == fetcher
    assert bench.job(job).state == "cancelled"
    assert bench.view().state == "Downloading"
    assert bench.all(do.DiscardPartial) == []
    bench.fetched(fetcher)  # it had not heard yet
    bench.tell(ev.FetchProgress(fetcher, "downloading", 1, 2, 1.0, 1))
    assert bench.said == []
    bench.gone(fetcher)
    assert bench.names() == ["download_cancelled"]
    assert bench.view().state == "NotDownloaded"
    assert bench.all(do.DiscardPartial) == [do.DiscardPartial(MODEL)] * discard


def test_cancelling_what_waits_to_try_again_ends_it_at_once(bench: Bench) -> None:
    fetcher = bench.fetch()
    (job,) = bench.core.jobs
    bench.gone(fetcher, DIED)
    bench.tell(ev.CancelJob(job))
    assert bench.names() == ["download_cancelled"]
    assert bench.core.next_deadline() is None


def test_what_is_asked_for_meanwhile_starts_after_the_cancelled_one_is_gone(bench: Bench) -> None:
    fetcher = bench.fetch()
    (old,) = bench.core.jobs
    bench.tell(ev.CancelJob(old, discard=True))
    new = bench.download()
    assert new != old
    assert bench.job(new).state == "queued"
    assert bench.names() == [], "the model is still what it was"
    assert bench.view().phase == "planning"
    assert bench.all(do.StartFetcher) == []
    bench.gone(fetcher)
    assert bench.names() == ["download_cancelled", "download_started", "download_progress"]
    assert bench.one(do.StartFetcher).job == new
    assert bench.all(do.DiscardPartial) == [], "the newer wish goes on from what is there"


def test_what_an_ended_download_left_can_be_removed_later(bench: Bench) -> None:
    fetcher = bench.fetch()
    (job,) = bench.core.jobs
    bench.tell(ev.FetchFailed(fetcher, errors.DownloadFailed("gone")))
    bench.tell(ev.CancelJob(job, discard=True))
    assert bench.said == [], "its process may still write"
    bench.gone(fetcher)
    assert bench.one(do.DiscardPartial).model == MODEL
    bench.tell(ev.CancelJob(job, discard=True))
    assert bench.one(do.DiscardPartial).model == MODEL
    bench.download()
    bench.tell(ev.CancelJob(job, discard=True))
    assert bench.said == [], "another download goes on from there"


# --- updates ------------------------------------------------------------------------------------------------------


def test_an_update_changes_no_state_and_the_old_files_go_at_once_where_nobody_uses_them(bench: Bench) -> None:
    bench.have()
    bench.tell(ev.Newest(MODEL, "r1"))
    assert bench.names() == ["model_found"]
    assert bench.view().latest_revision == "r1"
    bench.download()
    assert bench.names() == ["download_started", "download_progress"]
    assert (bench.view().state, bench.view().phase) == ("Downloaded", "planning")
    bench.fetched(bench.one(do.StartFetcher).fetcher)
    assert bench.names() == ["download_completed"]
    assert bench.one(do.Prune) == do.Prune(MODEL, ("r0",))
    assert (bench.view().revision, bench.view().latest_revision) == ("r1", None)


def test_old_files_stay_until_the_worker_that_uses_them_is_gone(bench: Bench) -> None:
    bench.have(need=10)
    worker = bench.load()
    for revision, need in (("r1", 95), ("r2", 99)):
        fetcher = bench.fetch()
        bench.fetched(fetcher, revision, need)
        assert bench.all(do.Prune) == []
        assert (bench.view().state, bench.view().revision) == ("Ready", revision)
        bench.gone(fetcher)
    assert bench.core.used_bytes == 12, "the worker takes what the old files need"
    bench.tell(ev.WorkerExited(worker, DIED))
    assert bench.one(do.Prune) == do.Prune(MODEL, ("r0", "r1"))
    assert bench.core.models[MODEL].need_bytes == 99


def test_files_that_come_back_into_use_stay(bench: Bench) -> None:
    bench.have()
    worker = bench.load()
    for revision in ("r1", "r0"):
        fetcher = bench.fetch()
        bench.fetched(fetcher, revision)
        bench.gone(fetcher)
    bench.tell(ev.WorkerExited(worker, DIED))
    assert bench.one(do.Prune).revisions == ("r1",)


def test_what_an_update_replaces_is_what_was_there_when_it_began() -> None:
    bench = Bench(downloads=1)
    bench.have()
    other = bench.fetch("org/other")
    bench.download()
    bench.have(revision="r1")
    bench.fetched(other)
    bench.gone(other)
    bench.fetched(bench.one(do.StartFetcher).fetcher, "r2")
    assert bench.one(do.Prune).revisions == ("r1",)


def test_an_update_that_brings_nothing_new_removes_nothing(bench: Bench) -> None:
    bench.have(revision="r1")
    bench.fetched(bench.fetch(), "r1")
    assert bench.all(do.Prune) == []


def test_pinned_revisions_stay(bench: Bench) -> None:
    pinned = f"{MODEL}@v1"
    bench.have(pinned)
    bench.fetched(bench.fetch(pinned), "r1")
    assert bench.all(do.Prune) == []
    bench.tell(ev.Newest(pinned, "r9"))
    assert bench.view(pinned).latest_revision is None


def test_while_a_model_loads_its_phase_is_the_loads(bench: Bench) -> None:
    bench.have()
    fetcher = bench.fetch()
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL))
    worker = bench.one(do.StartWorker).worker
    bench.tell(ev.LoadProgress(worker, 0.5))
    bench.tell(ev.FetchProgress(fetcher, "downloading", 1, 10, 1.0, 1))
    assert (bench.view().phase, bench.view().progress) == ("loading", 0.5)
    assert bench.all(do.Publish)[-1].progress == 0.1
    bench.tell(ev.Loaded(worker, 12, 2048))
    assert (bench.view().phase, bench.view().progress) == ("downloading", 0.1)


def test_a_failed_update_leaves_the_model_as_it_is(bench: Bench) -> None:
    bench.have()
    bench.load()
    bench.tell(ev.FetchFailed(bench.fetch(), errors.VerificationFailed("rot")))
    assert bench.names() == ["error"]
    view = bench.view()
    assert (view.state, view.revision, view.phase) == ("Ready", "r0", None)
    assert view.error is not None


def test_a_cancelled_update_leaves_the_model_as_it_is(bench: Bench) -> None:
    bench.have()
    fetcher = bench.fetch()
    bench.tell(ev.CancelJob(next(iter(bench.core.jobs))))
    bench.gone(fetcher)
    assert bench.names() == ["download_cancelled"]
    assert (bench.view().state, bench.view().phase) == ("Downloaded", None)


def test_files_that_go_while_an_update_runs_make_it_a_download(bench: Bench) -> None:
    bench.have()
    fetcher = bench.fetch()
    bench.tell(ev.Lost(MODEL))
    assert bench.names() == ["model_lost", "download_started"]
    assert (bench.view().state, bench.view().revision) == ("Downloading", None)
    bench.fetched(fetcher)
    assert bench.view().state == "Downloaded"
    assert bench.one(do.Prune).revisions == ("r0",), "something of it may be left"


def test_what_is_left_of_lost_files_goes_with_the_download_that_succeeds_in_the_end(bench: Bench) -> None:
    bench.have()
    fetcher = bench.fetch()
    bench.tell(ev.Lost(MODEL))
    bench.tell(ev.CancelJob(next(iter(bench.core.jobs))))
    bench.download()
    bench.gone(fetcher)
    bench.fetched(bench.one(do.StartFetcher).fetcher)
    assert bench.one(do.Prune).revisions == ("r0",)


def test_what_the_disk_is_said_to_hold_does_not_count_while_it_downloads(bench: Bench) -> None:
    bench.download()
    bench.have()
    assert bench.said == []
    bench.tell(ev.Lost(MODEL))
    assert bench.said == []
    assert bench.view().state == "Downloading"


# --- deletes ------------------------------------------------------------------------------------------------------


def test_deleting_frees_the_disk_and_forgets_the_model(bench: Bench) -> None:
    bench.have()
    rid = bench.delete()
    assert bench.names() == ["deleting_started"]
    assert bench.one(do.DeleteFiles).model == MODEL
    assert bench.view().phase == "deleting"
    for event in (ev.Found(MODEL, "hub", 10, "r5"), ev.Lost(MODEL), ev.Newest(MODEL, "r6")):
        assert bench.tell(event) == [], "what the disk holds is in between"
    bench.tell(ev.FilesDeleted(MODEL, 1234))
    assert bench.names() == ["deleted", "model_lost"]
    assert bench.one(do.Deleted) == do.Deleted(rid, 1234)
    assert MODEL not in bench.core.models


def test_what_a_download_has_left_can_be_deleted(bench: Bench) -> None:
    rid = bench.delete("org/partial")
    assert bench.one(do.DeleteFiles).model == "org/partial"
    bench.tell(ev.FilesDeleted("org/partial", 5))
    assert bench.names() == ["deleted", "model_lost"]
    assert bench.one(do.Deleted) == do.Deleted(rid, 5)


def test_a_delete_that_fails_leaves_the_model(bench: Bench) -> None:
    bench.have()
    rid = bench.delete()
    bench.tell(ev.FilesDeleted(MODEL, 0, errors.PermissionDenied("read-only")))
    assert isinstance(bench.refused(rid), errors.PermissionDenied)
    assert bench.names() == ["error"]
    assert (bench.view().state, bench.view().phase) == ("Downloaded", None)
    bench.delete()
    assert bench.one(do.DeleteFiles).model == MODEL


def test_an_idle_worker_goes_before_the_files(bench: Bench) -> None:
    bench.have()
    worker = bench.load()
    bench.delete()
    assert bench.one(do.StopWorker).worker == worker
    assert bench.all(do.DeleteFiles) == []
    bench.tell(ev.WorkerExited(worker))
    assert bench.one(do.DeleteFiles).model == MODEL


def test_a_fetcher_that_is_done_goes_before_the_files(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.fetched(fetcher)
    bench.delete()
    assert bench.all(do.DeleteFiles) == []
    bench.gone(fetcher)
    assert bench.one(do.DeleteFiles).model == MODEL


def test_a_cancelled_download_can_be_deleted_before_it_is_gone(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.CancelJob(next(iter(bench.core.jobs))))
    bench.delete()
    bench.gone(fetcher)
    assert bench.names() == ["download_cancelled"]
    assert bench.one(do.DeleteFiles).model == MODEL


def downloads(bench: Bench) -> None:
    bench.download()


def updates(bench: Bench) -> None:
    bench.have()
    bench.download()


def is_fetched_elsewhere(bench: Bench) -> None:
    bench.have()
    bench.download(f"{MODEL}@v2")


def waits_for_room(bench: Bench) -> None:
    bench.have()
    bench.have("org/big", need=99)
    bench.load("org/big")
    bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))


def loads(bench: Bench) -> None:
    bench.have()
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL))


def runs(bench: Bench) -> None:
    bench.have()
    bench.load()
    bench.ask(lambda rid: ev.Submit(rid, 1, MODEL))


def is_leased(bench: Bench) -> None:
    bench.have()
    bench.load(lease="L")


def is_deleted(bench: Bench) -> None:
    bench.have()
    bench.delete()


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (downloads, ["downloading"]), (updates, ["downloading"]), (is_fetched_elsewhere, ["downloading"]),
        (waits_for_room, ["loading", "waiting"]), (loads, ["loading"]), (runs, ["active"]), (is_leased, ["leases"]),
        (is_deleted, ["deleting"]),
    ],
)  # fmt: skip
def test_a_model_in_use_is_not_deleted(bench: Bench, use: Callable[[Bench], None], told: Iterable[str]) -> None:
    use(bench)
    error = bench.refused(bench.delete())
    assert isinstance(error, errors.ModelBusy)
    assert sorted(key for key, n in error.details.items() if n and key != "model") == told
    assert bench.all(do.StopWorker) == []


@pytest.mark.parametrize("event", [ev.Submit, ev.Ensure, ev.Download])
def test_a_model_that_is_being_deleted_takes_no_work(bench: Bench, event) -> None:
    is_deleted(bench)
    assert isinstance(bench.refused(bench.ask(lambda rid: event(rid, 1, MODEL))), errors.ModelBusy)


def test_a_download_waits_until_another_revision_is_deleted(bench: Bench) -> None:
    bench.have()
    bench.delete()
    bench.download(f"{MODEL}@v1")
    assert bench.all(do.StartFetcher) == []
    bench.tell(ev.FilesDeleted(MODEL, 1))
    assert bench.one(do.StartFetcher).model == f"{MODEL}@v1"


def test_a_delete_is_finished_though_nobody_waits(bench: Bench) -> None:
    bench.have()
    worker = bench.load()
    rid = bench.delete()
    bench.tell(ev.Cancel(rid))
    assert isinstance(bench.refused(rid), errors.Cancelled)
    bench.tell(ev.WorkerExited(worker))
    bench.tell(ev.FilesDeleted(MODEL, 9))
    assert bench.all(do.Deleted) == []
    assert MODEL not in bench.core.models


# --- the end ------------------------------------------------------------------------------------------------------


def test_a_daemon_that_stops_leaves_its_downloads_to_the_next(bench: Bench) -> None:
    running, dying = bench.fetch("org/1"), bench.fetch("org/2")
    bench.download("org/3")
    bench.tell(ev.Drain())
    assert bench.core.quiet
    for event in (ev.Download, ev.Delete):
        rid = bench.ask(lambda rid, event=event: event(rid, 1, MODEL))
        assert isinstance(bench.refused(rid), errors.ShuttingDown)
    bench.gone(dying, DIED)
    assert bench.all(do.StartFetcher) == []
    assert bench.core.next_deadline() is None
    bench.tell(ev.Abort())
    assert bench.all(do.StopFetcher) == [do.StopFetcher(running)]
    bench.gone(running)
    assert bench.said == []
    assert [job.state for job in bench.core.jobs.values()] == ["running", "running", "queued"]
    for job in bench.core.jobs:
        assert bench.tell(ev.CancelJob(job, discard=True)) == [], "too late"


def test_an_abort_begins_no_delete(bench: Bench) -> None:
    bench.have()
    worker = bench.load()
    rid = bench.delete()
    bench.tell(ev.Abort())
    assert isinstance(bench.refused(rid), errors.ShuttingDown)
    bench.tell(ev.WorkerExited(worker))
    assert bench.all(do.DeleteFiles) == []


# --- planning -----------------------------------------------------------------------------------------------------


def test_room_is_planned_for_models_known_or_not(bench: Bench) -> None:
    for name, need in (("org/a", 30), ("org/b", 30), ("org/c", 30)):
        bench.now += 1
        bench.have(name, need=need)
        bench.load(name, lease="L" if name == "org/b" else None)
    assert bench.core.room_for("org/new", 5) == (70, True, [])
    assert bench.core.room_for("org/new", 50) == (70, True, ["org/a", "org/c"])
    assert bench.core.room_for("org/new", 71) == (70, False, [])
    assert bench.core.room_for("org/new", 1000) == (70, False, [])
    assert bench.core.room_for("org/b", 35) == (100, True, [])


def test_how_long_a_load_took_is_remembered_after_it(bench: Bench) -> None:
    bench.have()
    assert bench.core.load_s(MODEL) is None
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL))
    worker = bench.one(do.StartWorker).worker
    bench.now += 2.5
    bench.tell(ev.Loaded(worker, 12, 2048))
    bench.tell(ev.WorkerExited(worker, DIED))
    assert bench.core.load_s(MODEL) == 2.5
    assert bench.core.load_s("org/unknown") is None


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_is_on_the_disk_and_never_loaded(bench: Bench) -> None:
    fetcher = bench.fetch()
    bench.tell(ev.Fetched(fetcher, ev.Found(MODEL, "hub", 10, "r1", 2000, kind="adapter")))
    assert (bench.view().kind, bench.view().state, bench.view().revision) == ("adapter", "Downloaded", "r1")
    wishes: list[Callable[[int], ev.Event]] = [
        lambda rid: ev.Submit(rid, 1, MODEL),
        lambda rid: ev.Ensure(rid, 1, MODEL),
    ]
    for wish in wishes:
        rid = bench.ask(wish)
        failed = bench.one(do.Fail)
        assert (failed.rid, failed.error.kind) == (rid, "model_invalid")
        assert not bench.all(do.StartWorker)
    bench.gone(fetcher)
    # An update can make a model of it.
    bench.tell(ev.Found(MODEL, "hub", 10, "r2", 2000, 2048))
    assert bench.names() == ["model_found"]
    bench.load()
    assert (bench.view().kind, bench.view().state) == ("model", "Ready")
