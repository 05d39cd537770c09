"""Prompts that wait for another one, which begins like them and is being read: what it computes will serve them, too.

Read side by side they would each compute the same and share the device for it. So one waits where the other has no
more left to read than WORTH times what it saves: then it is done no later, and everybody else sooner.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .prefix import PrefixTree, common

__all__ = ["LEAST", "Reuse", "Waits"]

# Fewer tokens that are shared are not worth a wait, nor to be at hand before the answer is done.
LEAST = 64
WORTH = 2


@dataclass(slots=True)
class Reuse:
    """How a row's prompt makes use of the prompt cache.

    Attributes:
        namespace: nothing is shared between different ones.
        cuts: after how many tokens its reading pauses, so that what was computed can be kept.
        cached: how many tokens were there already; known once its reading begins.
        begun: caches, and how many tokens they hold, where a part of the prompt was read outside the batch.
        urgent: it waits for nobody who is not.
    """

    namespace: bytes
    cuts: tuple[int, ...] = ()
    cached: int = 0
    begun: tuple[list[Any], int] | None = None
    urgent: bool = True


@dataclass(slots=True)
class _Read:
    tokens: array[int]
    reuse: Reuse


class Waits:
    """Who is read, and who waits for whom. Rows are as they lie in a BatchGenerator's queue: the uid, then the
    segments of the prompt, then what does not matter here."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._reads: dict[int, _Read] = {}  # from when they may begin to their first token
        self._held: list[tuple[int, Any]] = []  # (uid that it waits for, row)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def reading(self) -> bool:
        return bool(self._reads)

    def free(self, queue: deque[Any]) -> None:
        """Put those back at the head of a queue that waited enough."""
        free = [row for uid, row in self._held if uid not in self._reads]
        if free:
            self._held = [(uid, row) for uid, row in self._held if uid in self._reads]
            queue.extendleft(reversed(free))

    def sort(self, queue: deque[Any], count: int, reuses: dict[int, Reuse], left: Callable[[int], int | None]) -> None:
        """Take out of the first `count` rows of a queue those that should wait.

        Args:
            reuses: by uid, of rows that use the prompt cache.
            left: how many tokens of a row are still to be read; None where that has not begun.
        """
        at = 0
        while at < min(count, len(queue)):
            row = queue[at]
            reuse = reuses.get(row[0])
            if reuse is None or row[0] in self._reads:
                at += 1
                continue
            tokens = array("I", [token for segment in row[1] for token in segment])
            other = self._find(tokens, reuse, left)
            if other is None:
                self._reads[row[0]] = _Read(tokens, reuse)
                at += 1
            else:
                self._held.append((other, row))
                del queue[at]

    def _find(self, tokens: array[int], reuse: Reuse, left: Callable[[int], int | None]) -> int | None:
        """The uid of a row that is worth waiting for."""
        kept: int | None = None
        for uid, read in self._reads.items():
            if read.reuse.namespace != reuse.namespace or (reuse.urgent and not read.reuse.urgent):
                continue
            shared = min(common(read.tokens, tokens, 0), len(tokens) - 1)
            if self._tree.marked:
                shared = max((cut for cut in read.reuse.cuts if cut <= shared), default=0)
            if shared < LEAST:
                continue
            kept = self._tree.peek(reuse.namespace, tokens, len(tokens) - 1) if kept is None else kept
            rest = left(uid)
            if rest is None:
                rest = len(read.tokens) - min(kept, shared)
            if shared - kept >= max(LEAST, rest / WORTH):
                return uid
        return None

    def begun(self, uid: int) -> None:
        """A row has its first token, or left: nobody waits for it any more."""
        self._reads.pop(uid, None)

    def remove(self, uid: int) -> None:
        self.begun(uid)
        self._held = [(other, row) for other, row in self._held if row[0] != uid]
