"""Jobs: what outlives the request that began it. State only; load jobs are decided on in line.py, downloads in
downloads.py, batch jobs in batches.py."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from mlxd_client.types import ErrorObject, Job

# How long a batch job waits at first for what it lacks, in seconds.
FIRST_WAIT_S = 0.5

JobState = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(slots=True)
class LoadJob:
    """One load, from the wish to its end. `wanted`: somebody asked for it by name, so that it outlives its caller."""

    job: str
    model: str
    wanted: bool
    started_at: float
    state: JobState = "queued"
    progress: float | None = None
    error: ErrorObject | None = None
    ended_at: float | None = None
    announced: bool = False  # whether subscribers were told that it waits for memory

    def view(self, wall: float) -> Job:
        """The job for the wire; `wall` turns the core's clock into Unix seconds."""
        ended = None if self.ended_at is None else self.ended_at + wall
        return Job(
            job=self.job, kind="load", state=self.state, model=self.model, progress=self.progress,
            error=self.error, started_at=self.started_at + wall, ended_at=ended,
        )  # fmt: skip


@dataclass(slots=True)
class DownloadJob:
    """One download, from the wish to its end, over as many fetchers as it takes.

    Attributes:
        old_revision: what the disk held before it, where it held any.
        starts: fetchers started since the last one that brought something, itself counted.
        mark_bytes: how far it was when `starts` was last counted anew; None before the first report.
        retry_at: when the next fetcher is due, on the core's clock, while it waits for that.
    """

    job: str
    model: str
    repair: bool
    started_at: float
    old_revision: str | None = None
    state: JobState = "queued"
    phase: str = "queued"
    done_bytes: int | None = None
    total_bytes: int | None = None
    rate_bytes_s: float | None = None
    attempts: int = 1
    revision: str | None = None
    error: ErrorObject | None = None
    ended_at: float | None = None
    starts: int = 0
    mark_bytes: int | None = None
    retry_at: float | None = None

    @property
    def progress(self) -> float | None:
        if self.state == "done":
            return 1.0
        if not self.total_bytes or self.done_bytes is None:
            return None
        return min(1.0, self.done_bytes / self.total_bytes)

    def view(self, wall: float) -> Job:
        """The job for the wire; `wall` turns the core's clock into Unix seconds."""
        live = self.ended_at is None
        return Job(
            job=self.job, kind="download", state=self.state, model=self.model, progress=self.progress,
            attempts=self.attempts, phase=self.phase if live else None, done_bytes=self.done_bytes,
            total_bytes=self.total_bytes, rate_bytes_s=self.rate_bytes_s if live else None, revision=self.revision,
            error=self.error, started_at=self.started_at + wall,
            ended_at=None if self.ended_at is None else self.ended_at + wall,
        )  # fmt: skip


@dataclass(slots=True)
class Fetcher:
    """One process that fetches, until it is gone. `discard`: what it leaves of the download is to be removed then."""

    number: int
    job: DownloadJob
    stopping: bool = False
    discard: bool = False

    @property
    def model(self) -> str:
        return self.job.model


@dataclass(slots=True)
class BatchJob:
    """One batch job. Times are on the core's clock.

    Attributes:
        open: it still takes items, and has not been started.
        total, done, failed: items; those that are recorded; those of them that are errors.
        shown: how subscribers know it.
        ready: items that were read and do not run: place and tries so far.
        cursor: up to where items were read; `exhausted` says that there are no more.
        strikes: how often in a row its model could not be had.
        retry_at: until when it waits, for the reason in `error`.
        closing: it is to end so, once that is recorded.
        run: rises with whatever makes answers to earlier reads worthless.
        served: its place among the jobs whose items run in turn.
        client: the number that its items are asked under; those of connections are positive.
    """

    job: str
    total: int
    created_at: float
    model: str | None = None
    name: str | None = None
    state: JobState = "running"
    open: bool = False
    done: int = 0
    failed: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    error: ErrorObject | None = None
    shown: Job | None = None
    shown_at: float | None = None
    ready: deque[tuple[int, int]] = field(default_factory=deque)
    cursor: tuple[int, int] = (0, -1)
    reading: bool = False
    exhausted: bool = False
    strikes: int = 0
    wait_s: float = FIRST_WAIT_S
    retry_at: float | None = None
    closing: Literal["cancelled", "failed"] | None = None
    run: int = 0
    served: int = 0
    client: int = 0

    @property
    def live(self) -> bool:
        """Its items are to run."""
        return self.ended_at is None and not self.open and self.closing is None

    @property
    def may_run(self) -> bool:
        """Its items may be begun now."""
        return self.live and self.retry_at is None

    def view(self, wall: float) -> Job:
        """The job as it was told last; `wall` turns the core's clock into Unix seconds."""
        assert self.shown is not None
        return self.shown

    def seen(self, wall: float, fault: ErrorObject | None) -> Job:
        """The job as it is."""
        error = self.error if self.ended_at is not None or fault is None else fault
        phase = None
        if self.ended_at is None:
            phase = "open" if self.open else "cancelling" if self.closing else "waiting" if error else None
        progress = self.done / self.total if self.total else None
        return Job(
            job=self.job, kind="batch", state=self.state, model=self.model, name=self.name, phase=phase,
            progress=1.0 if self.state == "done" else progress, total_items=self.total, done_items=self.done,
            failed_items=self.failed, error=error,
            started_at=(self.created_at if self.started_at is None else self.started_at) + wall,
            ended_at=None if self.ended_at is None else self.ended_at + wall,
        )  # fmt: skip


def repo_of(model: str) -> str:
    """The repository that a model's files come from: its revisions share files, and so what may be done with them."""
    return model.partition("@")[0]
