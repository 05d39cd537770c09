"""The waiting line of one model: two priorities, fair between clients.

Interactive goes before batch. Within a priority the next request is that of the client with the fewest running there,
and of those the one that was served longest ago; within a client, first come, first served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from .events import Priority


class Waiting(Protocol):
    """What the line needs to know of a request. `seq` rises with acceptance."""

    rid: int
    client: int
    seq: int
    priority: Priority
    yields: bool


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Unbounded in itself: its owner asks `len` and `of_client` before it puts."""

    def __init__(self) -> None:
        self._lines: dict[Priority, dict[int, deque[T]]] = {"interactive": {}, "batch": {}}
        self._served: dict[int, int] = {}  # client → when it was last served, on a clock of pops
        self._pops = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            for waiting in line.values():
                yield from waiting

    def of_client(self, client: int) -> int:
        return sum(len(line.get(client, ())) for line in self._lines.values())

    def of_priority(self, priority: Priority) -> int:
        return sum(map(len, self._lines[priority].values()))

    def put(self, request: T) -> None:
        self._lines[request.priority].setdefault(request.client, deque()).append(request)
        self._length += 1

    def pop(self, running: Mapping[int, int], up_to: int | None = None, *, yielding: bool = True) -> T | None:
        """Take the next request.

        Args:
            running: how many requests each client has running on this model.
            up_to: only requests accepted no later than this sequence number.
            yielding: also those that yield.
        """
        for line in self._lines.values():
            ready = [
                client for client, waiting in line.items()
                if (up_to is None or waiting[0].seq <= up_to) and (yielding or not waiting[0].yields)
            ]  # fmt: skip
            if ready:
                client = min(ready, key=lambda c: (running.get(c, 0), self._served.get(c, -1), c))
                request = line[client].popleft()
                self._pops += 1
                self._served[client] = self._pops
                self._took(request)
                return request
        return None

    def remove(self, request: T) -> None:
        """Take out a request that gave up. Raises ValueError where it does not wait here."""
        self._lines[request.priority].get(request.client, deque()).remove(request)
        self._took(request)

    def _took(self, request: T) -> None:
        self._length -= 1
        line = self._lines[request.priority]
        if not line[request.client]:
            del line[request.client]
        if self._length == 0:
            self._served.clear()  # nobody competes any more; clients that left must not be remembered for ever
