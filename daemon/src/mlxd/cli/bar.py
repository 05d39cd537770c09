"""How far a download is: a bar where somebody looks, now and then a line where nobody does, nothing beside JSON."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from .output import bytes_text, safe, seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress

    from mlxd_client.types import Job

    from .output import Output

__all__ = ["Display", "display", "figures_of", "fraction_of", "phase_of"]

_PHASES = {
    "queued": "waiting for its turn",
    "planning": "asking the hub",
    "downloading": "downloading",
    "verifying": "verifying",
    "retrying": "retrying",
}
_STEP = 10  # percent between two lines


class Display(Protocol):
    def show(self, job: Job) -> None:
        """Take the job as it is now."""

    def close(self) -> None:
        """Leave the terminal as it was. May be called again."""


def display(output: Output) -> Display:
    if output.json:
        return Nothing()
    if output.watched and os.environ.get("TERM") not in (None, "", "dumb", "unknown"):
        return Bar(output)
    return Lines(output)


class Nothing:
    def show(self, job: Job) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """One line, drawn anew with each event; no clock and no thread draws it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._progress: Progress | None = None

    def show(self, job: Job) -> None:
        progress = self._progress or self._start(job)
        fraction = fraction_of(job)
        progress.update(
            progress.task_ids[0], completed=fraction or 0.0, total=None if fraction is None else 1.0,
            phase=phase_of(job), far="" if fraction is None else f"{fraction:.0%}", told="  ".join(figures_of(job)),
        )  # fmt: skip
        progress.refresh()

    def _start(self, job: Job) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        def column(field: str, style: str = "") -> TextColumn:
            return TextColumn(f"{{task.fields[{field}]}}", markup=False, style=style or "none")

        console = Console(file=self._output.err)
        console.print(safe(job.model or job.job), markup=False, highlight=False)
        self._progress = Progress(
            column("phase", "bold"), BarColumn(bar_width=None), column("far"), column("told"), console=console,
            auto_refresh=False, transient=True, expand=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._progress.add_task("", phase="", far="", told="", total=None)
        self._progress.start()
        return self._progress

    def close(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()


class Lines:
    """A line at the start, at each tenth, and where files had to be fetched again."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._told: tuple[int, int] | None = None

    def show(self, job: Job) -> None:
        step = int((fraction_of(job) or 0.0) * 100 + 1e-9) // _STEP
        if self._told is None:
            self._output.note(f"downloading {job.model or 'a model'}: job {job.job}")
        elif step <= self._told[0] and job.attempts <= self._told[1]:
            return
        else:
            tenth = [] if fraction_of(job) is None else [f"{step * _STEP}%"]
            self._output.note(", ".join([phase_of(job), *tenth, *figures_of(job)]))
        self._told = (step, job.attempts)

    def close(self) -> None:
        pass


def fraction_of(job: Job) -> float | None:
    """How much of it is done, 0 to 1; None as long as nobody knows how much it is."""
    if job.total_bytes and job.done_bytes is not None:
        return min(1.0, job.done_bytes / job.total_bytes)
    return job.progress


def phase_of(job: Job) -> str:
    phase = job.phase or ("downloading" if job.kind == "download" and job.state != "queued" else job.state)
    attempt = f", attempt {job.attempts}" if job.attempts > 1 else ""
    return _PHASES.get(phase, safe(phase)) + attempt


def figures_of(job: Job) -> list[str]:
    """Bytes of bytes, bytes a second, and the time left; of a batch job its items; as far as they are known."""
    told = []
    if job.total_items is not None:
        told.append(f"{job.done_items or 0:,} of {job.total_items:,} items")
        if job.failed_items:
            told.append(f"{job.failed_items} failed")
    if job.done_bytes is not None and job.total_bytes:
        told.append(f"{bytes_text(job.done_bytes)} of {bytes_text(job.total_bytes)}")
        if job.rate_bytes_s and job.phase == "downloading":
            told.append(f"{bytes_text(int(job.rate_bytes_s))}/s")
            told.append(f"{seconds_text(max(0, job.total_bytes - job.done_bytes) / job.rate_bytes_s)} left")
    return told
