"""Memory on macOS: the physical footprint of processes and the kernel's own word on pressure.

`proc_pid_rusage` is declared in libproc.h, its structs in sys/resource.h; what it calls physical footprint is what
Activity Monitor shows and what the kernel's limits count, with the buffers of the GPU and with compressed memory. The
sysctl is 1, 2 or 4: the numbers of DISPATCH_MEMORYPRESSURE_NORMAL, _WARN and _CRITICAL.
"""

from __future__ import annotations

import ctypes
from typing import Any

import psutil

from mlxd_client.types import PressureLevel

from ..core.pressure import Reading

_RUSAGE_INFO_V0 = 0
_PRESSURE = b"kern.memorystatus_vm_pressure_level"
_LEVELS: dict[int, PressureLevel] = {1: "normal", 2: "warning", 4: "critical"}


class _RusageInfoV0(ctypes.Structure):
    """struct rusage_info_v0; the kernel writes no more than the version that is asked for."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("pkg_idle_wkups", ctypes.c_uint64),
        ("interrupt_wkups", ctypes.c_uint64),
        ("pageins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("proc_start_abstime", ctypes.c_uint64),
        ("proc_exit_abstime", ctypes.c_uint64),
    )


class MacSystem:
    """This machine.

    Args:
        library: libSystem, with `proc_pid_rusage` and `sysctlbyname`. Tests put their own there.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL(None) if library is None else library

    def read(self) -> Reading:
        try:
            memory = psutil.virtual_memory()
        except (OSError, RuntimeError):
            return Reading(level=self._level())
        return Reading(capacity_bytes=memory.total, available_bytes=memory.available, level=self._level())

    def footprint(self, pid: int) -> int | None:
        info = _RusageInfoV0()
        try:
            failed = self._library.proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(_RUSAGE_INFO_V0), ctypes.byref(info))
        except AttributeError:
            return None
        return None if failed else int(info.phys_footprint)

    def _level(self) -> PressureLevel | None:
        value = ctypes.c_int(0)
        size = ctypes.c_size_t(ctypes.sizeof(value))
        try:
            failed = self._library.sysctlbyname(
                _PRESSURE, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
            )
        except AttributeError:
            return None
        return None if failed else _LEVELS.get(value.value)
