"""Jobs: what outlives the request that began it. State only; load jobs are decided on in line.py, downloads in
downloads.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxd_client.types import ErrorObject, Job

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


def repo_of(model: str) -> str:
    """The repository that a model's files come from: its revisions share files, and so what may be done with them."""
    return model.partition("@")[0]
