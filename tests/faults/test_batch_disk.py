"""A disk that fills up while a batch job runs: an honest pause, nothing torn, all others served, and on by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxd_client.errors import InsufficientDisk, ModelBusy
from mlxd_client.sync import EventStream
from mlxd_client.types import Job
from support.daemon import PATIENCE_S, Daemon, until
from support.tmpfs import Tmpfs

SIZE = 20_000


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tmpfs]:
    """A small file system that daemons have their folders on."""
    with Tmpfs(24 * 1024 * 1024) as disk, monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(disk.folder))
        yield disk


def told(events: EventStream, job: str, phase: str) -> Job:
    """Read events until the job is in this phase."""
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None, "the stream was closed"
        if event.job is not None and (event.job.job, event.job.phase) == (job, phase):
            return event.job


def test_it_waits_and_goes_on_by_itself(disk: Tmpfs) -> None:
    texts = ["piece0", *(f"{n:02}" + "x" * SIZE for n in range(100))]
    daemon = Daemon(bad_child="worker", steps=True, batch_slots=1, log_level="error")
    with daemon, daemon.client() as client, client.events() as events:
        job = client.submit_items({"method": "process", "params": {"prompt": text}} for text in ["!slow 1", *texts[1:]])
        until(events, "queue", active=1)
        disk.leave(0)
        daemon.step(0)
        waiting = told(events, job.job, "waiting")
        assert waiting.error is not None
        assert waiting.error.kind == "insufficient_disk"
        assert waiting.state == "running"
        assert client.process("still here").text == "still here"
        with pytest.raises(InsufficientDisk):
            client.submit_items({"method": "process", "params": {"prompt": "x" * SIZE}} for _ in range(200))
        have = [result.index for result in client.results(job.job)]
        assert have == list(range(len(have)))
        disk.relax()
        ended = client.wait_job(job.job, wait_s=PATIENCE_S)
        assert (ended.state, ended.done_items, ended.failed_items, ended.error) == ("done", 101, 0, None)
        assert [result.result.text for result in client.results(job.job) if result.result] == texts


def test_what_ends_begins_anew_only_once_that_is_recorded(disk: Tmpfs) -> None:
    daemon = Daemon(bad_child="worker", steps=True, batch_slots=1, log_level="error")
    with daemon, daemon.client() as client, client.events() as events, ThreadPoolExecutor() as beside:
        job = client.submit_batch([{"method": "process", "params": {"prompt": text}} for text in ("!slow 1", "b")]).job
        until(events, "queue", active=1)
        disk.leave(0)
        daemon.step(0)
        told(events, job, "waiting")
        cancelling = beside.submit(client.cancel_job, job)
        told(events, job, "cancelling")
        with pytest.raises(ModelBusy, match="about to end"):
            client.start_batch(job)
        assert cancelling.result(PATIENCE_S).phase == "cancelling"
        disk.relax()
        assert client.wait_job(job, wait_s=PATIENCE_S).state == "cancelled"
        assert client.start_batch(job).state == "running"
        assert client.wait_job(job, wait_s=PATIENCE_S).state == "done"
        assert [result.result.text for result in client.results(job) if result.result] == ["piece0", "b"]


def test_the_oldest_ended_job_goes_when_the_budget_is_used_up() -> None:
    daemon = Daemon(bad_child="worker", batch_disk_bytes=1_000_000)
    with daemon, daemon.client() as client:
        jobs = []
        for _ in range(6):
            items = [{"method": "process", "params": {"prompt": "x" * SIZE}} for _ in range(10)]
            jobs.append(client.wait_job(client.submit_batch(items).job, wait_s=PATIENCE_S).job)
        kept = [job.job for job in client.batches()]
        assert kept == jobs[-2:]  # prompts and answers of one are 400 kB
        assert len(list(client.results(kept[-1]))) == 10
