"""How many threads multiply: as many as there are cores that nothing else keeps busy.

OpenBLAS's threads wait for each other several times in each product, spinning. Where one of them has no core, because
another program or another model's worker has it, all others wait until the system runs it: then two threads are ten
times slower than one. So the machine is looked at now and then, from the loop that does the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Look", "Threads", "look"]

# How often the machine is looked at, in seconds; the system counts in hundredths.
INTERVAL_S = 0.1
# A core is free where others take no more than this of it: a client that reads its tokens, the daemon.
OTHERS = 0.4
# Cores are taken up again once they have been free for so many looks in a row; they are left at once.
LOOKS = 3

# When it was, and how long the cores that this process may use have been idle or were used by it: seconds.
Look = tuple[float, float]


def look() -> Look | None:
    """None where the system does not say."""
    try:
        text = Path("/proc/stat").read_text()
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    now = time.monotonic()
    lines = [line.split() for line in text.splitlines() if line.startswith("cpu")]
    ticks = sum(int(line[4]) + int(line[5]) for line in lines if line[0] in mine)  # idle, waiting for a disk
    return now, ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


class Threads:
    """
    Args:
        most: how many threads there may be.
        use: called with their number when it changes.
        look: see there.
    """

    def __init__(self, most: int, use: Callable[[int], None], look: Callable[[], Look | None] = look) -> None:
        self.count = most
        self._most = most
        self._use = use
        self._look = look
        self._last = look() if most > 1 else None
        self._due = time.monotonic() + INTERVAL_S
        self._free = 0  # looks in a row that found more free than are used

    def adapt(self, *, alone: bool = False) -> None:
        """Look again, if it is time. With `alone` there is one thread: products differ in their last digits by how
        many made them, and what has to come out the same every time needs a number that is always to be had."""
        if alone and self.count > 1:
            self.count, self._free = 1, 0
            self._use(1)
        if alone:
            return
        if self._last is None or time.monotonic() < self._due:
            return
        last, seen = self._last, self._look()
        self._due = time.monotonic() + INTERVAL_S
        if seen is None or seen[0] <= last[0]:
            return
        self._last = seen
        free = (seen[1] - last[1]) / (seen[0] - last[0])
        fitting = max(1, min(self._most, int(free + OTHERS)))
        self._free = self._free + 1 if fitting > self.count else 0
        if fitting < self.count or self._free >= LOOKS:
            self.count, self._free = fitting, 0
            self._use(fitting)
