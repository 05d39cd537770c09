"""`mlxd jobs`: what goes on in the daemon beyond single requests, and `mlxd jobs cancel`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect
from .exits import OK, USAGE

if TYPE_CHECKING:
    from mlxd_client.types import Job

    from .output import Output


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "jobs", jobs, "list downloads, loads and batch jobs, or cancel one",
        epilog="A cancelled download leaves what has come, and a later pull goes on from there, unless --discard is "
               "given.",
    )  # fmt: skip
    parser.add_argument("action", nargs="?", choices=("cancel",), help="cancel the job that is named after it")
    parser.add_argument("job", nargs="?", help="a job's id")
    parser.add_argument("--discard", action="store_true", help="with cancel: also remove what has been downloaded")
    parser.add_argument("-q", "--quiet", action="store_true", help="ids only, of those that have not ended")


def jobs(args: argparse.Namespace, output: Output) -> int:
    if args.action == "cancel":
        return _cancel(args, output)
    if args.discard:
        output.note("--discard goes with `mlxd jobs cancel JOB`")
        return USAGE
    with connect(args) as client:
        found = client.jobs()
    if output.json:
        output.document(found)
    elif args.quiet:
        for job in found:
            if job.state in ("queued", "running"):
                output.line(job.job)
    elif not found:
        output.line("there are no jobs")
    else:
        _show(found, output)
    return OK


def _cancel(args: argparse.Namespace, output: Output) -> int:
    if args.job is None:
        output.note("which job? `mlxd jobs` lists them")
        return USAGE
    with connect(args) as client:
        job = client.cancel_job(args.job, discard=args.discard)
    if output.json:
        output.document(job)
    elif job.state in ("done", "failed"):
        output.line(f"{job.job} had ended before: {job.state}")
    else:
        kept = "what had come is removed" if args.discard else "what has come stays for a later pull"
        output.line(f"{job.job} is cancelled" + (f"; {kept}" if job.kind == "download" else ""))
    return OK


def _show(found: list[Job], output: Output) -> None:
    from .output import bytes_text

    rows = []
    for job in found:
        done = "" if job.done_bytes is None else bytes_text(job.done_bytes)
        if job.total_bytes is not None:
            done = f"{done} of {bytes_text(job.total_bytes)}".strip()
        if job.total_items is not None:
            done = f"{job.done_items or 0:,} of {job.total_items:,} items"
        error = "" if job.error is None else f"{job.error.kind}: {job.error.message}"
        rows.append((job.job, job.kind, job.model or "-", state_text(job), done or "-", _when(job), error))
    header = ["JOB", "KIND", "MODEL", "STATE", "DONE", "BEGUN", "ERROR"]
    if not any(row[-1] for row in rows):
        header.pop()
        rows = [row[:-1] for row in rows]  # type: ignore[misc]  # one column less
    output.table(header, rows)


def state_text(job: Job) -> str:
    if job.state != "running":
        return job.state
    far = "" if job.progress is None else f" {job.progress:.0%}"
    return f"{job.phase or job.state}{far}"


def _when(job: Job) -> str:
    from .output import seconds_text

    return "-" if job.started_at is None else f"{seconds_text(time.time() - job.started_at)} ago"
