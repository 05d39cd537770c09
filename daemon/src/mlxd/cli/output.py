"""What commands print: rich tables on a terminal, plain columns elsewhere, JSON where asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mlxd_client.errors import MlxdError

__all__ = ["STATE_STYLES", "Output", "bytes_text", "safe", "seconds_text"]

# Control characters could move the cursor or reprogram the terminal; models and file names may hold any.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def safe(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate(_CONTROLS)


class Output:
    """Where a command's results go.

    Attributes:
        json: machine-readable output was asked for.
        terminal: stdout is one, and people read it.
        watched: somebody looks at stderr.
        answered: somebody can be asked there, and type an answer.
    """

    def __init__(self, json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.json = json
        self.terminal = not json and self.out.isatty()
        self.watched = not json and self.err.isatty()
        self.answered = self.watched and sys.stdin is not None and sys.stdin.isatty()

    def document(self, value: Any) -> None:
        """One JSON document on a line of its own, at once."""
        import msgspec

        self.out.write(msgspec.json.encode(value).decode() + "\n")
        self.out.flush()

    def text(self, text: str) -> None:
        """Text as a model wrote it, without a newline, at once."""
        self.out.write(safe(text) if self.terminal else text)
        self.out.flush()

    def line(self, text: str = "") -> None:
        self.text(text + "\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
        """Columns under a header, unless that is empty; those in `right` are flush right."""
        rows = [[safe(cell) for cell in row] for row in rows]
        if self.terminal:
            self._rich_table(header, rows, right)
            return
        lines = [header, *rows] if header else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for row in lines:
            cells = (
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.line("  ".join(cells).rstrip())

    def _rich_table(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(header))
        for place, name in enumerate(header or rows[0]):
            table.add_column(name, justify="right" if place in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
        Console(file=self.out).print(table)

    def progress(self, text: str | None) -> None:
        """What is waited for, on a line that the next word replaces; None takes it away. Only people see it."""
        if self.terminal and self.err.isatty():
            self.err.write("\r\x1b[K" + (f"\x1b[2m{safe(text)}\x1b[0m" if text else ""))
            self.err.flush()

    def note(self, sentence: str) -> None:
        """A sentence beside the result, on stderr."""
        self.err.write(f"mlxd: {safe(sentence)}\n")
        self.err.flush()

    def ask(self, question: str) -> str:
        """What a person types, in lower case; nothing at the end of the input. Only where somebody answers."""
        self.err.write(safe(question) + " ")
        self.err.flush()
        typed = sys.stdin.readline()
        if not typed.endswith("\n"):
            self.err.write("\n")
        return typed.strip().lower()

    def error(self, error: MlxdError) -> None:
        """What went wrong, on stderr: one line, with the kind."""
        from mlxd_client.errors import RpcError

        from .exits import kind_of

        if self.json:
            import msgspec

            wire = error.to_wire() if isinstance(error, RpcError) else None
            wire = wire or {"message": str(error), "data": {"kind": kind_of(error)}}
            self.err.write(msgspec.json.encode({"error": wire}).decode() + "\n")
            self.err.flush()
        else:
            said = str(error.details.get("last_words", "")) if isinstance(error, RpcError) else ""
            words = f"; its last words: {said.splitlines()[-1]}" if said else ""
            self.note(f"{kind_of(error)}: {' '.join(str(error).split())}{words}")


# How a model's state is shown to people.
STATE_STYLES = {"Ready": "green", "Loading": "yellow", "Downloading": "yellow", "NotDownloaded": "dim"}


def bytes_text(size: int | None) -> str:
    """A size as people read it, in powers of ten as disks are sold: `4.2 GB`."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration as people read it: `4 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
