"""How a child ended: the facts, a sentence for people, and the error that its requests get. Data only."""

from __future__ import annotations

import re
import signal as signals
from typing import Literal

import msgspec

from mlxd_client.errors import WorkerDied

__all__ = ["LAST_WORDS_BYTES", "Cause", "Death", "clean_last_words", "signal_name"]

LAST_WORDS_BYTES = 2048

Cause = Literal["exit", "signal", "hang", "garbage", "never_ready", "spawn_failed", "stopped"]


class Death(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The end of one child.

    Attributes:
        cause: why, in the supervisor's judgement. `exit` and `signal`: it went by itself, or by someone else's hand;
            `hang`, `garbage`, `never_ready`: the supervisor killed it for that; `stopped`: it was asked to go;
            `spawn_failed`: there never was a process.
        kind: what it was, e.g. `worker`.
        name: what it worked on, for people.
        pid: 0 where nothing was spawned.
        uptime_s: seconds from the spawn to the reaping.
        exit_code: where the process exited; absent where a signal ended it.
        signal: the name of the signal that ended it, e.g. `SIGSEGV`.
        detail: what the supervisor saw, e.g. which limit was missed. Empty where cause and status say it all.
        last_words: the end of what it wrote to stderr, at most 2 KiB, printable.
    """

    cause: Cause
    kind: str
    name: str
    pid: int = 0
    uptime_s: float = 0.0
    exit_code: int | None = None
    signal: str | None = None
    detail: str = ""
    last_words: str = ""

    @property
    def expected(self) -> bool:
        """Whether the daemon asked for it."""
        return self.cause == "stopped"

    def describe(self) -> str:
        """One sentence for people."""
        if self.cause == "spawn_failed":
            return f"the {self.kind} could not be started: {self.detail}"
        how = {
            "exit": f"exited with code {self.exit_code}",
            "signal": f"was ended by {self.signal}",
            "hang": "stopped responding and was killed",
            "garbage": "sent what is no message and was killed",
            "never_ready": "did not get ready in time and was killed",
            "stopped": "was stopped",
        }[self.cause]
        seen = f" ({self.detail})" if self.detail else ""
        return f"the {self.kind} (pid {self.pid}) {how}{seen} after {self.uptime_s:.1f} s"

    def to_error(self) -> WorkerDied:
        """The error for each request that the child took with it; details: cause, exit_code or signal, last_words."""
        details: dict[str, str | int] = {"cause": self.cause}
        if self.exit_code is not None:
            details["exit_code"] = self.exit_code
        if self.signal is not None:
            details["signal"] = self.signal
        if self.last_words:
            details["last_words"] = self.last_words
        return WorkerDied(self.describe(), **details)


def signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:  # real-time signals have no name of their own
        return f"SIG{number}"


_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")
_FATAL = "Fatal Python error"


def clean_last_words(raw: bytes, limit: int = LAST_WORDS_BYTES) -> str:
    """The last lines of `raw` in at most `limit` bytes of UTF-8, without control characters.

    Where the interpreter itself reported a fatal error, its report is kept from its first line instead: faulthandler
    prints the most recent call first, and a list of extension modules last, which would push out all else.
    """
    lines = [_clean_line(line) for line in raw.decode("utf-8", "replace").split("\n")]
    lines = [line for line in lines if line and not line.startswith("Extension modules:")]
    fatal = max((at for at, line in enumerate(lines) if line.startswith(_FATAL)), default=None)
    if fatal is not None:
        return "\n".join(lines[fatal:]).encode()[:limit].decode("utf-8", "ignore").rstrip()
    text = "\n".join(lines).encode()
    tail = text[-limit:]
    whole = tail.partition(b"\n")[2]
    if len(text) > limit and len(whole) >= limit // 2:  # better no first line than a part of it
        tail = whole
    return tail.decode("utf-8", "ignore")


def _clean_line(line: str) -> str:
    # A progress bar redraws its line: what stood last is what a person saw.
    shown = _ANSI.sub("", line).rstrip("\r").rpartition("\r")[2]
    return "".join(c if c.isprintable() else " " for c in shown.replace("\t", "    ")).rstrip()
