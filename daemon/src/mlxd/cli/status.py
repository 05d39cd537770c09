"""`mlxd status`: how the daemon is doing, on one page."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Commands, add_command, connect
from .exits import OK

if TYPE_CHECKING:
    from mlxd_client.types import Job, Model, Stats, Status, WorkerHealth

    from .output import Output

Rows = list[tuple[str, str]]


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    add_command(
        commands, "status", status, "show how the daemon is doing",
        epilog="With --json, the answer to `status` as on the wire. `mlxd stats` says more of requests and times, and "
               "`mlxd service status` of who starts the daemon.",
    )  # fmt: skip


def status(args: argparse.Namespace, output: Output) -> int:
    from mlxd_client.errors import MethodNotFound

    with connect(args) as client:
        answer = client.status()
        if output.json:
            output.document(answer)
            return OK
        models, jobs = client.models(), client.jobs()
        try:
            stats = client.stats()
        except MethodNotFound:  # an older daemon, about to be replaced by this version's
            stats = None
    rows = [*_daemon(answer), *_models(answer, stats, models), *_work(answer, stats, jobs)]
    if answer.config_error is not None:
        rows.append(("settings", f"{answer.config_error.message}; what the file said before stands"))
    output.table((), [*rows, *(("worker", _worker(worker)) for worker in answer.workers)])
    return OK


def _daemon(answer: Status) -> Rows:
    from .output import bytes_text, seconds_text

    memory = answer.memory
    by = ", started for its first client" if answer.activated else ""
    told = f"{bytes_text(answer.rss_bytes)} itself, models {bytes_text(memory.used_bytes)} of "
    told += bytes_text(memory.budget_bytes)
    if memory.available_bytes is not None:
        told += f"; the system has {bytes_text(memory.available_bytes)} left"
    rows = [
        ("mlxd", f"{answer.version}, process {answer.pid}, up {seconds_text(answer.uptime_s)}{by}"
                 + (", stopping" if answer.draining else "")),
        ("memory", told),
    ]  # fmt: skip
    pressure = memory.pressure
    if pressure.level != "normal":
        since = "" if pressure.since_at is None else f" for {seconds_text(time.time() - pressure.since_at)}"
        rows.append(("pressure", f"{pressure.level}{since}, by {pressure.source or 'the system'}"))
    return rows


def _models(answer: Status, stats: Stats | None, models: list[Model]) -> Rows:
    from .models import state_text, stays_text
    from .output import bytes_text

    rows = [("models", f"{answer.models.loaded} loaded of {answer.models.known} known")]
    rates = {} if stats is None else {of.model: of.now_tokens_per_s for of in stats.models}
    for model in models:
        if model.state in ("Loading", "Ready"):
            told = [state_text(model)]
            if held := model.footprint_bytes or model.memory_bytes:
                told.append(bytes_text(held))
            told.append(f"{model.active} running, {model.waiting} waiting")
            if rates.get(model.id, 0.0) >= 0.5:
                told.append(f"{rates[model.id]:.0f} tokens/s")
            if model.idle_unload_at is not None:
                told.append(f"unloads {stays_text(model, time.time())}")
            rows.append(("", f"{model.id}: {', '.join(told)}"))
    return rows


def _work(answer: Status, stats: Stats | None, jobs: list[Job]) -> Rows:
    from .jobs import state_text
    from .stats import totals

    told = f"{answer.queue.running} running, {answer.queue.waiting} waiting"
    if stats is not None:
        answered, failed, cancelled = totals(stats)
        told += f"; so far {answered} answered, {failed} failed, {cancelled} cancelled"
    rows = [("requests", told)]
    for job in jobs:
        if job.state in ("queued", "running"):
            rows.append(("job", f"{job.kind} of {job.model or job.job}: {state_text(job)}"))
    rows.append(("clients", f"{answer.clients}, of them {answer.subscribers} subscribed to events"))
    if stats is not None and stats.events.dropped:
        rows.append(("events", f"{stats.events.dropped} lost by subscribers that did not keep up"))
    if stats is not None and stats.log_lines_dropped:
        rows.append(("log", f"{stats.log_lines_dropped} lines could not be written"))
    return rows


def _worker(worker: WorkerHealth) -> str:
    from .output import seconds_text

    told = f"{worker.model}: died {'once' if worker.deaths == 1 else f'{worker.deaths} times'}"
    if worker.last_death is not None:
        told += f", last: {worker.last_death.message}"
    if worker.breaker != "closed":
        told += f"; not started again for {seconds_text((worker.retry_at or time.time()) - time.time())}"
    return told
