"""Which rows may begin, by what their caches will hold at most: a long prompt waits, or is refused, before it starts.

What a row will hold is known beforehand: its prompt and the tokens it may make, at what the model's caches take for a
token. First come, first served, interactive rows before batch ones. A row that fits may pass one that does not, but
only so often: then nobody passes it any more, what runs comes to an end, and there is room for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mlxd_client.errors import InsufficientMemory

from .lanecaches import Footprint, LaneKey

__all__ = ["Admission", "Waiting", "refusal"]

# How many rows may pass one that waits for memory.
MOST_PASSES = 8


class Foreseen(Protocol):
    """What the caches of all rows will come to hold, in bytes; with so many other rows of `more` tokens in lane `key`,
    if that is given."""

    def __call__(self, key: LaneKey | None = None, more: int = 0, rows: int = 1) -> int: ...


@dataclass(slots=True)
class Waiting:
    """A row that waits for memory.

    Attributes:
        length: tokens that it may come to, prompt and answer; `prompt` of them are its prompt.
        enter: puts it where it belongs.
        passed: how many rows went before it that came later.
        rows: how many it is, where one prompt is answered several times.
    """

    uid: int
    key: LaneKey
    footprint: Footprint
    length: int
    prompt: int
    urgent: bool
    enter: Callable[[], None]
    passed: int = 0
    rows: int = 1


@dataclass(slots=True)
class Admission:
    """The line of rows that wait for memory, first ones first.

    Attributes:
        limit_bytes: what the caches of all rows may hold together; 0 is no limit.
    """

    limit_bytes: int = 0
    line: list[Waiting] = field(default_factory=list)

    def fit(self, footprint: Footprint, prompt: int, wished: int, *, asked: bool, rows: int = 1) -> int:
        """How many tokens a row may make, or each of several alike.

        Args:
            prompt: tokens of the prompt.
            wished: how many it wants to make.
            asked: the request said so itself; else there may be fewer.

        Raises:
            InsufficientMemory: the row would not fit even if there were no other.
        """
        if not self.limit_bytes or footprint.bytes(rows, prompt + wished) <= self.limit_bytes:
            return wished
        most = min(wished, footprint.most_tokens(self.limit_bytes // rows) - prompt)
        if asked or most < 1:
            raise refusal(footprint, prompt, wished if asked else 1, self.limit_bytes, rows=rows)
        return most

    def add(self, row: Waiting) -> None:
        """Put a row into the line; the next `admit` may let it begin."""
        place = len(self.line)
        while row.urgent and place > 0 and not self.line[place - 1].urgent:
            place -= 1
        self.line.insert(place, row)

    def admit(self, foreseen: Foreseen) -> None:
        """Let begin whom there is room for now."""
        at = 0
        while at < len(self.line):
            row = self.line[at]
            if not self.limit_bytes or foreseen(row.key, row.length, row.rows) <= self.limit_bytes:
                del self.line[at]
                row.enter()
                for waiting in self.line[:at]:
                    waiting.passed += 1
            else:
                at += 1
            if any(waiting.passed >= MOST_PASSES for waiting in self.line[:at]):
                return

    def hopeless(self, foreseen: Foreseen) -> Waiting | None:
        """Take out the first row if it does not fit although nothing else is there: the limit has come down since."""
        if not self.line or not self.limit_bytes or foreseen():
            return None
        row = self.line[0]
        return self.line.pop(0) if row.footprint.bytes(row.rows, row.length) > self.limit_bytes else None

    def remove(self, uid: int) -> bool:
        before = len(self.line)
        self.line = [row for row in self.line if row.uid != uid]
        return len(self.line) < before


def refusal(footprint: Footprint, prompt: int, answer: int, limit_bytes: int, *, rows: int = 1) -> InsufficientMemory:
    needed = footprint.bytes(rows, prompt + answer)
    times = f", {rows} times," if rows > 1 else ""
    return InsufficientMemory(
        f"a prompt of {prompt} tokens with {answer} to come{times} needs {needed / 1e6:.1f} MB of KV cache; this model"
        f" may have {limit_bytes / 1e6:.1f} MB now",
        needed_bytes=needed, available_bytes=limit_bytes, prompt_tokens=prompt, max_tokens=answer,
    )  # fmt: skip
