"""What `mlxd top` shows: the daemon's state as lines of a given width, and what keys change of it. No IO, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlxd_client.mirror import Mirror

from .bar import figures_of, fraction_of, phase_of
from .models import stays_text
from .output import STATE_STYLES, bytes_text, seconds_text
from .stats import totals

if TYPE_CHECKING:
    from mlxd_client.types import Event, Job, Model, ModelStats, Snapshot, Stats, Status

__all__ = ["Board", "Line", "Span"]

_LEAST_MODEL = 12  # a model's name keeps so many columns; others go before that
_BAR = 20


class Span(NamedTuple):
    text: str
    style: str = ""


Line = list[Span]


class Row(NamedTuple):
    """One model, with what was measured of it, if anything."""

    model: Model
    stats: ModelStats | None


class Column(NamedTuple):
    """`rank`: the highest goes first where there is no room."""

    title: str
    rank: int
    cell: Callable[[Row, float], str]
    right: bool = True


class Board:
    """The state of one `mlxd top`.

    Attributes:
        mirror: the models and jobs, kept current by events.
        status, stats: as the daemon said last; None before that.
        away: why the daemon cannot be reached; None while it can.
        message: what came of the last key.
    """

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.status: Status | None = None
        self.stats: Stats | None = None
        self.away: str | None = None
        self.message = ""
        self._sort = 0
        self._all = False
        self._chosen: str | None = None
        self._asked: str | None = None  # the model that is to be unloaded, once that is confirmed

    def begin(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.mirror.replace(snapshot)

    def apply(self, event: Event) -> None:
        self.mirror.apply(event)

    # --- keys -----------------------------------------------------------------------------------------------------

    def key(self, key: str) -> tuple[str, str] | None:
        """Take a key. Returns what is to be done, if anything: ("quit", "") or ("unload", model)."""
        asked, self._asked, self.message = self._asked, None, ""
        if asked is not None:
            if key == "y":
                return "unload", asked
            self.message = "nothing was unloaded"
            return None
        if key == "q":
            return "quit", ""
        if key in ("up", "down", "k", "j"):
            self._choose(-1 if key in ("up", "k") else 1)
        elif key in ("s", "right", "left"):
            self._sort = (self._sort + (-1 if key == "left" else 1)) % len(_SORTS)
        elif key == "a":
            self._all = not self._all
        elif key == "u":
            self._ask_unload()
        return None

    def _choose(self, step: int) -> None:
        names = [row.model.id for row in self.rows()]
        if names:
            at = names.index(self._chosen) + step if self._chosen in names else 0
            self._chosen = names[max(0, min(at, len(names) - 1))]

    def _ask_unload(self) -> None:
        chosen = self.mirror.models.get(self._chosen or "")
        if chosen is None:
            self.message = "choose a model first, with the arrows"
        elif chosen.state != "Ready":
            self.message = f"{chosen.id} is not loaded"
        else:
            self._asked = chosen.id

    # --- what is shown --------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The models that are shown, in order: those that hold memory or are about to; all, where that was asked."""
        measured = {of.model: of for of in self.stats.models} if self.stats is not None else {}
        rows = [
            Row(model, measured.get(model.id))
            for model in self.mirror.models.values()
            if self._all or model.state in ("Loading", "Ready", "Downloading") or model.phase is not None
        ]
        return sorted(rows, key=lambda row: (*_SORTS[self._sort][1](row), row.model.id))

    def lines(self, width: int, height: int, now: float) -> list[Line]:
        """The screen; `now` in Unix seconds. Never more lines than `height`, nor longer than `width`."""
        head, jobs, keys = self._head()[: 3 if height >= 9 else 1], self._jobs(), self._foot()
        room = max(1, height - len(head) - len(keys) - 2)
        jobs = jobs[: max(1, room // 2)] if jobs else []
        table = _table(self.rows(), width, max(1, room - len(jobs)), now, self._chosen)
        lines = [*head, [], *table, *([[]] if jobs else []), *jobs]
        lines = lines[: max(1, height - len(keys))]
        lines += [[] for _ in range(height - len(lines) - len(keys))]
        return [_cut(line, width) for line in [*lines, *keys]][:height]

    def _head(self) -> list[Line]:
        if self.away is not None:
            return [[Span("mlxd", "bold"), Span(f"  {_plain(self.away)}", "bold red")]]
        status = self.status
        if status is None:
            return [[Span("mlxd", "bold"), Span("  asking …")]]
        stopping = [Span("  stopping", "bold yellow")] if self.mirror.stopping else []
        first = [
            Span("mlxd", "bold"), Span(f" {_plain(status.version)}  up {seconds_text(status.uptime_s)}"),
            Span(f"  {_several(status.clients, 'client')}"),
            Span(f"  {bytes_text(status.rss_bytes)} itself  process {status.pid}", "dim"), *stopping,
        ]  # fmt: skip
        return [first, self._memory(status), self._requests(status)]

    def _memory(self, status: Status) -> Line:
        memory = status.memory
        share = memory.used_bytes / memory.budget_bytes if memory.budget_bytes else 0.0
        line = [
            Span("memory    "), *_bar(share),
            Span(f"  {bytes_text(memory.used_bytes)} of {bytes_text(memory.budget_bytes)} for models"),
        ]  # fmt: skip
        level = self.mirror.memory_pressure
        return line + ([] if level == "normal" else [Span(f"  pressure: {_plain(level)}", "bold red")])

    def _requests(self, status: Status) -> Line:
        line = [Span("requests  "), Span(f"{status.queue.running} running, {status.queue.waiting} waiting")]
        if self.stats is not None:
            answered, failed, _ = totals(self.stats)
            rate = sum(of.now_tokens_per_s for of in self.stats.models)
            line += [Span(f"  {rate:.0f} tokens/s", "bold"), Span(f"  {answered} answered")]
            line += [Span(f", {failed} failed", "red" if failed else "dim")]
        return line

    def _jobs(self) -> list[Line]:
        shown = [job for job in self.mirror.jobs.values() if job.kind != "load"]
        return [_job(job) for job in sorted(shown, key=lambda job: (job.started_at or 0.0, job.job))]

    def _foot(self) -> list[Line]:
        if self._asked is not None:
            return [[Span(f"unload {_plain(self._asked)}? ", "bold"), Span("y: yes, any other key: no")]]
        if self.message:
            return [[Span(_plain(self.message), "bold")]]
        keys = ("q", "quit"), ("↑↓", "choose"), ("s", f"sort by {_SORTS[self._sort][0]}"), ("u", "unload")
        line = [span for key, does in keys for span in (Span(key, "bold"), Span(f" {does}  ", "dim"))]
        return [[*line, Span("a", "bold"), Span(" fewer" if self._all else " all", "dim")]]


# --- the table ----------------------------------------------------------------------------------------------------


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def _first(row: Row, which: str) -> str:
    of = row.stats.first_token_s if row.stats is not None else None
    return "-" if of is None else _ms(getattr(of, which))


def _rate(row: Row, which: str) -> str:
    rate = getattr(row.stats, which) if row.stats is not None else 0.0
    return f"{rate:.0f}" if rate >= 0.5 else "-"


def _state(row: Row, now: float) -> str:
    model = row.model
    phase = model.phase if model.phase is not None and model.phase != "loading" else None
    told = f"{model.state}, {phase}" if phase is not None else model.state
    return told if model.progress is None else f"{told} {model.progress:.0%}"


_COLUMNS: tuple[Column, ...] = (
    Column("STATE", 1, _state, right=False),
    Column("MEMORY", 2, lambda row, now: bytes_text(row.model.footprint_bytes or row.model.memory_bytes)),
    Column("RUN", 3, lambda row, now: str(row.model.active)),
    Column("WAIT", 3, lambda row, now: str(row.model.waiting)),
    Column("TOK/S", 4, lambda row, now: _rate(row, "now_tokens_per_s")),
    Column("10 S", 7, lambda row, now: _rate(row, "recent_tokens_per_s")),
    Column("FIRST P50", 5, lambda row, now: _first(row, "p50")),
    Column("P95", 6, lambda row, now: _first(row, "p95")),
    Column("UNLOADS", 8, lambda row, now: stays_text(row.model, now), right=False),
)

_SORTS: tuple[tuple[str, Callable[[Row], tuple[float, ...]]], ...] = (
    ("name", lambda row: ()),
    ("memory", lambda row: (-(row.model.memory_bytes or 0),)),
    ("requests", lambda row: (-row.model.active - row.model.waiting,)),
    ("tokens/s", lambda row: (-(row.stats.now_tokens_per_s if row.stats is not None else 0.0),)),
)


def _table(rows: Sequence[Row], width: int, most: int, now: float, chosen: str | None) -> list[Line]:
    """A header and at most `most` - 1 models; columns that have no room are left out."""
    if not rows:
        return [[Span("no model is loaded", "dim")]]
    columns = list(_COLUMNS)
    cells = {column.title: [column.cell(row, now) for row in rows] for column in columns}
    widths = {column.title: max(len(column.title), *map(len, cells[column.title])) for column in columns}
    names = [_plain(row.model.id) for row in rows]
    longest = max(_LEAST_MODEL, *map(_cells, names))

    def left() -> int:
        return width - sum(widths[column.title] + 2 for column in columns)

    while columns and left() < min(longest, max(_LEAST_MODEL, width // 3)):
        columns.remove(max(columns, key=lambda column: column.rank))
    name_width = max(1, min(longest, left()))
    header = [Span(_fit("MODEL", name_width))]
    header += [Span("  " + _pad(column.title, widths[column.title], column.right)) for column in columns]
    lines = [[Span(span.text, "bold") for span in header]]
    begin = _window([row.model.id for row in rows], chosen, most - 1)
    for place, row in list(enumerate(rows))[begin : begin + most - 1]:
        line = [Span(_fit(names[place], name_width))]
        for column in columns:
            style = STATE_STYLES.get(row.model.state, "") if column.title == "STATE" else ""
            line.append(Span("  " + _pad(cells[column.title][place], widths[column.title], column.right), style))
        lines.append([Span(span.text, "reverse") for span in line] if row.model.id == chosen else line)
    return lines


def _window(names: list[str], chosen: str | None, most: int) -> int:
    """Where to begin, so that the chosen one is seen."""
    return max(0, names.index(chosen) - most + 1) if chosen in names else 0


def _job(job: Job) -> Line:
    fraction = fraction_of(job)
    line = [Span(f"{_plain(job.name or job.model or job.job)}  "), *_bar(fraction or 0.0)]
    line += [Span("" if fraction is None else f" {fraction:.0%}"), Span(f"  {phase_of(job)}", "dim")]
    return [*line, Span("".join(f"  {figure}" for figure in figures_of(job)))]


def _bar(share: float) -> Line:
    full = round(max(0.0, min(1.0, share)) * _BAR)
    style = "green" if share < 0.8 else "yellow" if share < 0.95 else "red"
    return [Span("[" + "#" * full, style), Span("." * (_BAR - full), "dim"), Span("]", style)]


def _plain(text: str) -> str:
    """Without whatever could move the cursor: names may hold anything."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _several(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _fit(text: str, width: int) -> str:
    """Exactly so many columns: what is too long loses its middle, since names differ at both ends."""
    from rich.cells import set_cell_size

    if _cells(text) > width > 3:
        keep = width - 1
        text = text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]
    return set_cell_size(text, width)


def _cut(line: Line, width: int) -> Line:
    """No longer than `width` columns."""
    from rich.cells import set_cell_size

    out: Line = []
    for span in line:
        size = _cells(span.text)
        if size > width:
            out.append(Span(set_cell_size(span.text, max(0, width)), span.style))
            break
        out.append(span)
        width -= size
    return out
