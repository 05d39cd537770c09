"""The whole terminal, for as long as a command wants it: another screen, keys as they are pressed; and back again."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from .board import Line

__all__ = ["Screen", "keys"]

# What terminals send for the keys that have no character; the second form is that of application mode.
_SEQUENCES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left",
}  # fmt: skip


def keys(typed: str) -> list[str]:
    """The keys that a chunk of input stands for; sequences of other keys stand for nothing."""
    found, at = [], 0
    while at < len(typed):
        if typed[at] == "\x1b":
            if key := _SEQUENCES.get(typed[at : at + 3]):
                found.append(key)
            at += 1
            if at < len(typed) and typed[at] in "[O":  # CSI and SS3: parameters, then one final character
                at += 1
                while at < len(typed) and not "@" <= typed[at] <= "~":
                    at += 1
                at += 1
        else:
            found.append(typed[at])
            at += 1
    return found


class Screen:
    """`with Screen() as screen:` takes the terminal over; leaving gives it back as it was, whatever has happened.

    Line editing and echo are off, ctrl-C and ctrl-Z are what they always are.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._live: Live | None = None
        self._before: list[Any] | None = None
        self._input = sys.stdin.fileno()

    def __enter__(self) -> Self:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False)
        self._take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_back()

    def _take(self) -> None:
        from rich.live import Live

        self._before = termios.tcgetattr(self._input)
        tty.setcbreak(self._input)
        self._live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def _give_back(self) -> None:
        live, self._live = self._live, None
        before, self._before = self._before, None
        try:
            if live is not None:
                live.stop()
        finally:
            if before is not None:
                termios.tcsetattr(self._input, termios.TCSAFLUSH, before)  # what was typed ahead is not for the shell

    def suspend(self) -> None:
        """Give the terminal back, stop this process as ctrl-Z does, and take it again once that goes on."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        assert self._console is not None
        return self._console.size.width, self._console.size.height

    def show(self, lines: Sequence[Line]) -> None:
        from rich.text import Text

        assert self._live is not None
        text = Text(no_wrap=True, overflow="crop", end="")
        for number, line in enumerate(lines):
            if number:
                text.append("\n")
            for span in line:
                text.append(span.text, style=span.style or None)
        self._live.update(text, refresh=True)

    def typed(self) -> list[str]:
        """The keys that wait. Raises EOFError where the terminal is gone."""
        data = os.read(self._input, 1024)
        if not data:
            raise EOFError
        return keys(data.decode("utf-8", "ignore"))
