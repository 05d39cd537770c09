"""How many threads multiply, on a machine whose cores others use or leave: told, not real."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mlxd.worker import threads
from mlxd.worker.threads import Look, Threads, look


class Machine:
    """`free` cores are idle or ours, from one look to the next, which are a second apart."""

    def __init__(self, free: float) -> None:
        self.free = free
        self._at, self._sum = 0.0, 0.0

    def look(self) -> Look:
        self._at, self._sum = self._at + 1.0, self._sum + self.free
        return self._at, self._sum


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "INTERVAL_S", 0.0)


def used(machine: Machine, most: int) -> tuple[Threads, list[int]]:
    counts: list[int] = []
    return Threads(most, counts.append, machine.look), counts


@pytest.mark.parametrize(
    ("free", "most", "fitting"), [(4.0, 4, 4), (3.7, 4, 4), (3.5, 4, 3), (1.0, 4, 1), (0.2, 4, 1), (64.0, 4, 4)]
)
def test_as_many_as_cores_are_free(free: float, most: int, fitting: int) -> None:
    made, counts = used(Machine(free), most)
    made.adapt()
    assert made.count == fitting
    assert counts == ([] if fitting == most else [fitting])


def test_cores_are_left_at_once_and_taken_up_once_they_stay_free() -> None:
    machine = Machine(2.0)
    made, counts = used(machine, 2)
    machine.free = 1.0
    made.adapt()
    machine.free = 2.0
    for _ in range(threads.LOOKS - 1):
        made.adapt()
    machine.free = 1.0
    made.adapt()  # begins to count anew
    machine.free = 2.0
    for _ in range(threads.LOOKS - 1):
        made.adapt()
    assert counts == [1]
    made.adapt()
    assert counts == [1, 2]


def test_what_must_be_exact_is_made_by_one_thread_until_it_is_over() -> None:
    made, counts = used(Machine(4.0), 4)
    made.adapt(alone=True)
    for _ in range(2 * threads.LOOKS):
        made.adapt(alone=True)
    assert counts == [1]
    for _ in range(threads.LOOKS):
        made.adapt()
    assert counts == [1, 4]


def test_a_system_that_says_nothing_changes_nothing() -> None:
    counts: list[int] = []
    silent = Threads(4, counts.append, lambda: None)
    silent.adapt()
    assert (silent.count, counts) == (4, [])


def test_it_is_looked_at_no_more_often_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "INTERVAL_S", 3600.0)
    looks: Iterator[int] = itertools.count()

    def told() -> Look:
        return float(next(looks)), 0.0

    made = Threads(2, lambda count: None, told)
    for _ in range(10):
        made.adapt()
    assert next(looks) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")
def test_what_others_use_is_not_free() -> None:
    """This process, pinned to one core, beside one that spins there: half of the core is ours, or idle, at most."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    other = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.read(1)
        first = look()
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until:
            pass
        second = look()
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.communicate()
    assert first is not None
    assert second is not None
    assert 0.0 <= (second[1] - first[1]) / (second[0] - first[0]) < 0.8
