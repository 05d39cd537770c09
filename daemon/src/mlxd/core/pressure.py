"""How short of memory the machine is: what a reading of the system comes to, and for how long that counts."""

from __future__ import annotations

from dataclasses import dataclass

from mlxd_client.types import PressureLevel

LEVELS: tuple[PressureLevel, ...] = ("normal", "warning", "critical")
# Percent of the last ten seconds in which some tasks, or all of them, stood still for lack of memory. These are the
# limits of GLib's GMemoryMonitor: some of them for 100 ms of a second is its `medium`, all of them its `critical`.
SOME_STALL, FULL_STALL = 10.0, 10.0


@dataclass(frozen=True, slots=True)
class Stall:
    """Percent of the last ten seconds in which `some` tasks, or all of them (`full`), waited for memory. `source` says
    where: `psi` on the whole machine, `cgroup` in this daemon's control group."""

    source: str
    some: float
    full: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What the system says of its memory, as far as it does.

    Attributes:
        capacity_bytes: what there is in all for this daemon and its workers: the machine's, or its container's.
        available_bytes: what new users of memory could have of that without anybody being pushed out.
        level: what the kernel itself says, where it does (macOS).
        stalls: see Stall.
        kills: how many processes of the control group the kernel has ended for lack of memory so far.
    """

    capacity_bytes: int | None = None
    available_bytes: int | None = None
    level: PressureLevel | None = None
    stalls: tuple[Stall, ...] = ()
    kills: int | None = None


def judge(reading: Reading, reserve_bytes: int, kills_before: int | None) -> tuple[PressureLevel, str]:
    """What a reading says by itself, and what of it says so.

    1. The kernel says it: that is it.
    2. A process was killed for lack of memory since the last reading: critical.
    3. All tasks stood still for FULL_STALL of the time: critical; some for SOME_STALL: warning.
    4. Less is left than a quarter of what loads leave to others: critical; less than half: warning.
    The worst of 2 to 4 counts.

    Args:
        reserve_bytes: what loads leave to others.
        kills_before: those of the last reading; None where there was none.
    """
    if reading.level is not None:
        return reading.level, "kernel"
    found: list[tuple[int, str]] = []
    if reading.kills is not None and kills_before is not None and reading.kills > kills_before:
        found.append((2, "oom"))
    for stall in reading.stalls:
        found.append((2 if stall.full >= FULL_STALL else 1 if stall.some >= SOME_STALL else 0, stall.source))
    left = reading.available_bytes
    if left is not None:
        found.append((2 if 4 * left < reserve_bytes else 1 if 2 * left < reserve_bytes else 0, "available"))
    rank, source = max(found, key=lambda one: one[0], default=(0, ""))
    return LEVELS[rank], source


class Pressure:
    """The level that counts. It rises at once, and falls when it has been lower for `calm_s` without a break, to the
    highest level that was read meanwhile: what flickers keeps it up.

    Attributes:
        source: what of the readings it is owed to; empty while all is normal.
        since: from when on it has counted, on the core's clock; None where it never changed.
    """

    def __init__(self) -> None:
        self.level: PressureLevel = "normal"
        self.source = ""
        self.since: float | None = None
        self._calm_since: float | None = None
        self._calm: tuple[PressureLevel, str] = ("normal", "")  # the worst since then

    def read(self, level: PressureLevel, source: str, calm_s: float, now: float) -> bool:
        """Take in what one reading says. Returns whether the level has changed."""
        before, rank = self.level, LEVELS.index
        if rank(level) >= rank(before):
            self._calm_since = None
            if level != before:
                self._enter(level, source, now)
            return level != before
        if self._calm_since is None:
            self._calm_since, self._calm = now, (level, source)
        elif rank(level) > rank(self._calm[0]):
            self._calm = (level, source)
        if now - self._calm_since < calm_s:
            return False
        self._enter(*self._calm, now)
        self._calm_since = None
        return True

    def _enter(self, level: PressureLevel, source: str, now: float) -> None:
        self.level, self.since = level, now
        self.source = "" if level == "normal" else source
