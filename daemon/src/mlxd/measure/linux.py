"""Memory on Linux: /proc/meminfo, /proc/<pid>/status, pressure stall information, control groups of both versions.

The formats are those of Documentation/filesystems/proc.rst, accounting/psi.rst, admin-guide/cgroup-v2.rst and
admin-guide/cgroup-v1/memory.rst. Any file may be missing, unreadable (EOPNOTSUPP where PSI is turned off), vanish in
between, or hold something else: then what it would have said is not known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.pressure import Reading, Stall

_MAX_BYTES = 64 * 1024
# Control groups are nested so deep at most.
_MAX_LEVELS = 32
# The first version says "no limit" by the largest number of pages.
_NO_LIMIT = 2**60
# No number has more digits: larger ones are none of the kernel's.
_KB_FIELD = re.compile(r"^(\w+):\s+(\d{1,18}) kB$", re.MULTILINE)
_FIELD = re.compile(r"^(\w+) (\d{1,18})$", re.MULTILINE)
_STALL = re.compile(r"^(some|full) avg10=(\d{1,3}(?:\.\d{1,6})?) ", re.MULTILINE)
# What a process has to itself: not the files that it maps, whose pages the kernel drops and reads again as it likes.
_OWN = ("RssAnon", "RssShmem", "VmSwap", "HugetlbPages")


@dataclass(frozen=True, slots=True)
class _Names:
    """What the files of one version of control groups are called, and the fields of `memory.stat` that can be had
    back: the file cache. (Shared memory is not on its lists.)"""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    events: str


_V1 = _Names(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"),
    "memory.oom_control",
)  # fmt: skip
_V2 = _Names(
    ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"),
    "memory.events",
)  # fmt: skip


class LinuxSystem:
    """The machine whose `proc` and `sys` lie below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = str(root).rstrip("/")

    def read(self) -> Reading:
        meminfo = _kilobytes(self._text("/proc/meminfo"))
        capacities = [meminfo.get("MemTotal")]
        available = [meminfo.get("MemAvailable")]
        groups = list(self._groups())
        for folder, names in groups:
            limit, left = self._limit(folder, names)
            capacities.append(limit)
            available.append(left)
        stalls = [self._stall("psi", "/proc/pressure/memory")]
        kills = None
        if groups:
            own, names = groups[0]
            stalls.append(self._stall("cgroup", f"{own}/memory.pressure"))
            kills = dict(_FIELD.findall(self._text(f"{own}/{names.events}"))).get("oom_kill")
        return Reading(
            capacity_bytes=min((one for one in capacities if one is not None), default=None),
            available_bytes=min((one for one in available if one is not None), default=None),
            stalls=tuple(one for one in stalls if one is not None),
            kills=None if kills is None else int(kills),
        )

    def footprint(self, pid: int) -> int | None:
        """What it has to itself, in memory or swapped out.

        From the kernel's counters, in a few microseconds. `smaps_rollup` would walk all pages, with the process's
        memory locked meanwhile: tens of milliseconds for a large model.
        """
        status = _kilobytes(self._text(f"/proc/{pid}/status"))
        if "RssAnon" not in status:  # no such process, or a zombie
            return None
        return sum(status.get(name, 0) for name in _OWN)

    def _groups(self) -> Iterator[tuple[str, _Names]]:
        """The folders of this process's memory control group and of those around it, as far as they are seen here."""
        for line in self._text("/proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                place, names = "/sys/fs/cgroup/memory", _V1
            elif line.startswith("0::"):
                place, names = "/sys/fs/cgroup", _V2
            else:
                continue
            parts = [part for part in path.split("/") if part]
            if ".." in parts or len(parts) > _MAX_LEVELS:
                parts = []  # it lies outside of what is seen here
            # In a container the path may be the host's; then only the root of what is mounted is there.
            for depth in range(len(parts), -1, -1):
                folder = "/".join([place, *parts[:depth]])
                if os.path.exists(f"{self._root}{folder}/{names.usage}"):
                    yield folder, names

    def _limit(self, folder: str, names: _Names) -> tuple[int | None, int | None]:
        """A group's limit, and how much of it is left; None where there is no limit, or no telling."""
        limits = [_number(self._text(f"{folder}/{name}")) for name in names.limits]
        limit = min((one for one in limits if one is not None and one < _NO_LIMIT), default=None)
        usage = _number(self._text(f"{folder}/{names.usage}"))
        if limit is None or usage is None:
            return limit, None
        stat = dict(_FIELD.findall(self._text(f"{folder}/memory.stat")))
        held = max(0, usage - sum(int(stat.get(name, 0)) for name in names.reclaimable))
        return limit, max(0, limit - held)

    def _stall(self, source: str, path: str) -> Stall | None:
        found = {kind: float(share) for kind, share in _STALL.findall(self._text(path))}
        return Stall(source, found["some"], found.get("full", 0.0)) if "some" in found else None

    def _text(self, path: str) -> str:
        """A small file; empty where it cannot be read."""
        try:
            with open(self._root + path, "rb", buffering=0) as file:
                return file.read(_MAX_BYTES).decode("ascii", "replace")
        except OSError:
            return ""


def _kilobytes(text: str) -> dict[str, int]:
    return {name: int(value) * 1024 for name, value in _KB_FIELD.findall(text)}


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() and len(text) < 32 else None
