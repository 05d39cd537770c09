"""What is read of memory: files of Linux as they are, as they may be, and as they should not be; calls of macOS."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.core.pressure import Reading, Stall
from mlxd.measure import this_system
from mlxd.measure.linux import LinuxSystem
from mlxd.measure.macos import MacSystem
from support.fake_system import MIB, UNLIMITED, FakeSystem


@pytest.fixture
def files(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def read(files: FakeSystem) -> Reading:
    return LinuxSystem(files.root).read()


def test_the_machine(files: FakeSystem) -> None:
    files.stall(3.5, 1.25)
    assert read(files) == Reading(16384 * MIB, 8192 * MIB, None, (Stall("psi", 3.5, 1.25),), None)


def test_a_limit_counts_without_the_file_cache(files: FakeSystem) -> None:
    files.group(most=1000 * MIB, used=900 * MIB, cache=600 * MIB, kills=2)
    files.stall(20.0, 0.5, path="sys/fs/cgroup/memory.pressure")
    found = read(files)
    assert (found.capacity_bytes, found.available_bytes, found.kills) == (1000 * MIB, 700 * MIB, 2)
    assert found.stalls[1] == Stall("cgroup", 20.0, 0.5)


def test_the_tightest_of_nested_groups_counts(files: FakeSystem) -> None:
    files.write("proc/self/cgroup", "0::/user.slice/app.scope\n")
    files.group("user.slice", most=500 * MIB, used=100 * MIB)
    files.group("user.slice/app.scope", most="max", used=90 * MIB)
    files.group(most="max", used=4000 * MIB)
    assert (read(files).capacity_bytes, read(files).available_bytes) == (500 * MIB, 400 * MIB)
    files.write("sys/fs/cgroup/user.slice/app.scope/memory.high", str(100 * MIB))
    assert read(files).available_bytes == 10 * MIB


def test_a_group_of_the_first_version(files: FakeSystem) -> None:
    files.write("proc/self/cgroup", "5:cpu,memory:/docker/abc\n1:cpu:/docker/abc\n0::/docker/abc\n")
    files.group_v1(most=800 * MIB, used=300 * MIB, cache=100 * MIB, kills=1)  # in a container, its own is the root
    found = read(files)
    assert (found.capacity_bytes, found.available_bytes, found.kills) == (800 * MIB, 600 * MIB, 1)
    files.group_v1(most=UNLIMITED, used=300 * MIB)
    assert (read(files).capacity_bytes, read(files).available_bytes) == (16384 * MIB, 8192 * MIB)


@pytest.mark.parametrize("path", ["/../../etc", "/" + "a/" * 100, "/nowhere/to/be/seen"])
def test_a_group_that_lies_elsewhere(files: FakeSystem, path: str) -> None:
    files.write("proc/self/cgroup", f"0::{path}\n")
    files.group(most=100 * MIB, used=40 * MIB)
    assert read(files).available_bytes == 60 * MIB


def test_a_footprint_is_what_a_process_has_to_itself(files: FakeSystem) -> None:
    files.process(7, own=100 * MIB, files=900 * MIB, swapped=20 * MIB)
    system = LinuxSystem(files.root)
    assert system.footprint(7) == 120 * MIB
    files.write("proc/8/status", "Name:\tzombie\nState:\tZ (zombie)\n")
    assert system.footprint(8) is None
    assert system.footprint(9) is None


def test_what_is_not_there_is_not_known(tmp_path: Path) -> None:
    assert LinuxSystem(tmp_path).read() == Reading()
    files = FakeSystem(tmp_path)
    for path in ("proc/meminfo", "proc/pressure/memory", "proc/self/cgroup"):
        files.remove(path)
        (tmp_path / path).mkdir()  # what cannot be read, as with EOPNOTSUPP
    assert LinuxSystem(tmp_path).read() == Reading()


GARBAGE = st.one_of(
    st.binary(max_size=300),
    st.from_regex(rb"MemAvailable: +-?[0-9]{1,5000}( kB)?\n", fullmatch=True),
    st.from_regex(rb"some avg10=[0-9.e-]{0,9} avg60=.*\n", fullmatch=True),
    st.from_regex(rb"(0::|1:memory:)/[./a-z\x00]{0,20}\n", fullmatch=True),
    st.from_regex(rb"(oom_kill|inactive_file|max)? ?-?[0-9]{0,5000}\n?", fullmatch=True),
)


@given(contents=st.lists(GARBAGE, min_size=8, max_size=8))
def test_no_bytes_of_any_file_are_a_fault(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    files = FakeSystem(tmp_path_factory.mktemp("system"))
    names = ["memory.max", "memory.current", "memory.stat", "memory.events"]
    paths = ["proc/meminfo", "proc/pressure/memory", "proc/self/cgroup", "proc/7/status"]
    for path, content in zip([*paths, *(f"sys/fs/cgroup/{name}" for name in names)], contents, strict=True):
        files.write(path, content)
    found = read(files)
    assert found.available_bytes is None or found.available_bytes >= 0
    assert all(0 <= stall.some < 1000 for stall in found.stalls)
    LinuxSystem(files.root).footprint(7)


def test_this_machine() -> None:
    """The real files, or calls, of whatever this runs on."""
    system = this_system()
    found = system.read()
    assert found.capacity_bytes is not None
    assert found.available_bytes is not None
    assert 0 < found.available_bytes <= found.capacity_bytes
    gc.collect()  # what earlier tests left is not to go in between
    before = system.footprint(os.getpid())
    assert before is not None
    taken = b"x" * (64 * MIB)
    after = system.footprint(os.getpid())
    assert after is not None
    assert 48 * MIB < after - before < 128 * MIB
    del taken
    if sys.platform == "darwin":
        assert found.level is not None


class FakeLibrary:
    """libSystem's two functions, by the letter of their declarations."""

    def __init__(self, level: int, footprint: int, failed: int = 0) -> None:
        self.level, self.bytes, self.failed = level, footprint, failed

    def sysctlbyname(self, name: bytes, value: Any, size: Any, new: None, new_size: ctypes.c_size_t) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        assert (size._obj.value, new, new_size.value) == (4, None, 0)
        value._obj.value = self.level
        return self.failed

    def proc_pid_rusage(self, pid: ctypes.c_int, flavor: ctypes.c_int, buffer: Any) -> int:
        assert (pid.value, flavor.value) == (7, 0)
        raw = (16 * b"u") + b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 4, 5, 6, 7, self.bytes, 9, 10))
        assert ctypes.sizeof(buffer._obj) == len(raw)
        ctypes.memmove(ctypes.addressof(buffer._obj), raw, len(raw))
        return self.failed


@pytest.mark.parametrize(("number", "level"), [(1, "normal"), (2, "warning"), (4, "critical"), (3, None)])
def test_what_macos_says(number: int, level: str | None) -> None:
    system = MacSystem(FakeLibrary(number, 123 * MIB))
    assert system.read().level == level
    assert system.footprint(7) == 123 * MIB


@pytest.mark.parametrize("library", [FakeLibrary(4, 5, failed=-1), object()])
def test_what_macos_does_not_say(library: object) -> None:
    system = MacSystem(library)
    assert (system.read().level, system.footprint(7)) == (None, None)
