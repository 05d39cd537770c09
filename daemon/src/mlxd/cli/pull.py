"""Staying with a download until it has ended: its events, ctrl-C, and a daemon that goes away meanwhile."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import connect

if TYPE_CHECKING:
    from mlxd_client import Client
    from mlxd_client.sync import EventStream
    from mlxd_client.types import Event, Job, Snapshot

    from .bar import Display
    from .output import Output

__all__ = ["fetch"]

# A daemon that dies so often without getting any further in between is not started again.
_DEATHS = 3
# How long ctrl-C waits for the daemon to say that a download has ended.
_CANCEL_S = 10.0
_ENDED = ("done", "failed", "cancelled")


def fetch(
    args: argparse.Namespace, output: Output, model: str, *, revision: str | None = None, repair: bool = False
) -> Job:
    """Have a model downloaded, show how far it is, and return the job once it is done.

    The goal is stated again to a daemon that has taken over, or had to be started again: it goes on with what the last
    one had begun.

    Raises:
        RpcError: what the download failed with; Cancelled where somebody else ended it; ShuttingDown where the daemon
            was told to stop meanwhile.
        ConnectionLost, ConnectFailed: the daemon went away, again and again or for good.
        KeyboardInterrupt: ctrl-C, after the question what to do.
    """
    from mlxd_client.errors import ConnectionLost, ShuttingDown

    from .bar import display

    deaths, furthest = 0, -1
    watch: Watch | None = None
    shown = display(output)
    with connect(args) as client:
        while True:
            try:
                job = client.job(client.download(model, revision=revision, repair=repair))
                watch = Watch(client, job, shown)
                return _outcome(watch.end(args), output)
            except ConnectionLost:
                done = -1 if watch is None else watch.job.done_bytes or 0
                deaths, furthest = 1 if done > furthest else deaths + 1, max(furthest, done)
                if deaths > _DEATHS or args.no_start:
                    raise
                output.note("the daemon went away; it is started again, and goes on")
            except ShuttingDown as error:
                if not error.reconnect:
                    raise
            except KeyboardInterrupt:
                if watch is not None:
                    _interrupted(client, watch.job, output)
                raise


class Watch:
    """One download as its events tell it.

    Attributes:
        job: as it is now.
    """

    def __init__(self, client: Client, job: Job, shown: Display) -> None:
        self.job = job
        self._client = client
        self._shown = shown

    def end(self, args: argparse.Namespace) -> Job:
        """Follow the job until it has ended. Raises ConnectionLost, ShuttingDown."""
        # Events of a connection that is not renewed: whether the daemon shall be started again is decided elsewhere.
        topics = ["jobs", "download_progress", "daemon_stopping"]
        try:
            with connect(args, reconnect=False).events(topics=topics) as events:
                self._follow(events)
        finally:
            self._shown.close()
        return self.job

    def _follow(self, events: EventStream) -> None:
        if events.snapshot is not None:
            self._start_over(events.snapshot)
        while self.job.state not in _ENDED:
            self._shown.show(self.job)
            event = events.get()
            if event is not None:
                self._take(event)

    def _start_over(self, snapshot: Snapshot) -> None:
        """Take the job from a whole state. One that is not in there has ended, and is asked for."""
        found = next((job for job in snapshot.jobs if job.job == self.job.job), None)
        self.job = found or self._client.job(self.job.job)
        if snapshot.stopping and self.job.state not in _ENDED:
            raise _stopping(taken_over=False)

    def _take(self, event: Event) -> None:
        if event.snapshot is not None:
            self._start_over(event.snapshot)
        elif event.name == "daemon_stopping":
            raise _stopping(taken_over=(event.details or {}).get("reason") == "restart")
        elif event.job is not None:
            if event.job.job == self.job.job:
                self.job = event.job
        elif event.name == "download_progress" and event.model_id == self.job.model and event.progress is not None:
            self.job = _further(self.job, event.progress)


def _further(job: Job, progress: float) -> Job:
    """The job, as far as its model's event says that it is."""
    import msgspec

    done = job.done_bytes if job.total_bytes is None else int(job.total_bytes * progress)
    return msgspec.structs.replace(job, progress=progress, done_bytes=done)


def _stopping(*, taken_over: bool) -> Exception:
    from mlxd_client.errors import ShuttingDown

    if taken_over:
        return ShuttingDown("another daemon goes on with the download", reconnect=True)
    return ShuttingDown("the daemon was told to stop; the download goes on when it runs again")


def _outcome(job: Job, output: Output) -> Job:
    """The job, if it is done. Raises what ended it else."""
    from mlxd_client import errors

    if job.state == "done":
        return job
    if output.json:
        output.document(job)
    if job.state == "cancelled" or job.error is None:
        raise errors.Cancelled(f"the download of {job.model} was cancelled", job=job.job)
    made = errors.BY_KIND.get(job.error.kind, errors.RpcError)(job.error.message)
    made.details = job.error.details
    if type(made) is errors.RpcError:
        made.kind = job.error.kind
    raise made


def _interrupted(client: Client, job: Job, output: Output) -> None:
    """Ctrl-C: whether the download ends too. Where nobody can be asked, and after a second one, it goes on."""
    answer = ""
    if output.answered:
        try:
            answer = output.ask("\nCancel the download (c), or leave it running in the daemon (Enter)?")
        except KeyboardInterrupt:
            output.err.write("\n")
    if answer in ("c", "cancel"):
        _cancel(client, job, output)
    elif not output.json:
        output.note(
            f"{job.model} is downloaded further in the daemon: `mlxd pull {job.model}` shows it again, "
            f"`mlxd jobs cancel {job.job}` ends it"
        )


def _cancel(client: Client, job: Job, output: Output) -> None:
    from mlxd_client.errors import RequestTimeout

    ended = client.cancel_job(job.job)
    if ended.state not in _ENDED:
        try:
            ended = client.wait_job(job.job, wait_s=_CANCEL_S)
        except RequestTimeout:
            output.note("the daemon takes its time to end the download; `mlxd jobs` tells when it has")
            return
    if ended.state == "done":
        output.note(f"{job.model} was there already: nothing was left to cancel")
    else:
        output.note("the download is cancelled; what has come stays, and a later pull goes on from there")
