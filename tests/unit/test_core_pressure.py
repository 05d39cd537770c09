"""When the machine counts as short of memory: what readings come to, and that the level does not flap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.core.pressure import LEVELS, Pressure, Reading, Stall, judge

CALM_S = 10.0


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (Reading(), ("normal", "")),
        (Reading(100, 60), ("normal", "available")),
        (Reading(100, 19), ("warning", "available")),
        (Reading(100, 9), ("critical", "available")),
        (Reading(100, 60, stalls=(Stall("psi", 9.9, 0.0), Stall("cgroup", 10.0, 9.9))), ("warning", "cgroup")),
        (Reading(100, 60, stalls=(Stall("psi", 30.0, 10.0), Stall("cgroup", 10.0, 0.0))), ("critical", "psi")),
        (Reading(100, 60, kills=3), ("normal", "available")),
        (Reading(100, 60, kills=4), ("critical", "oom")),
        (Reading(100, 1, level="warning", stalls=(Stall("psi", 90.0, 90.0),)), ("warning", "kernel")),
    ],
)
def test_what_a_reading_says(reading: Reading, expected: tuple[str, str]) -> None:
    level, source = judge(reading, 40, 3)
    assert level == expected[0]
    assert level == "normal" or source == expected[1]


def test_a_kill_before_the_first_reading_is_history() -> None:
    assert judge(Reading(kills=4), 0, None) == ("normal", "")


def test_it_rises_at_once_and_falls_when_it_was_calm() -> None:
    pressure = Pressure()
    assert pressure.read("warning", "psi", CALM_S, 0.0)
    assert pressure.read("critical", "oom", CALM_S, 1.0)
    assert not pressure.read("normal", "", CALM_S, 2.0)
    assert not pressure.read("warning", "psi", CALM_S, 5.0)
    assert pressure.read("normal", "", CALM_S, 12.0)
    assert (pressure.level, pressure.source, pressure.since) == ("warning", "psi", 12.0)
    assert not pressure.read("normal", "", CALM_S, 13.0)
    assert pressure.read("normal", "", CALM_S, 23.0)
    assert (pressure.level, pressure.source) == ("normal", "")


def test_what_flickers_keeps_it_up() -> None:
    pressure = Pressure()
    said = [pressure.read("warning" if n % 9 == 0 else "normal", "psi", CALM_S, float(n)) for n in range(100)]
    assert said == [True] + [False] * 99


@given(st.lists(st.tuples(st.sampled_from(LEVELS), st.floats(0.1, 8.0)), max_size=60))
def test_between_two_falls_lies_the_calm(readings: list[tuple[str, float]]) -> None:
    pressure, now, lower_since = Pressure(), 0.0, None
    for level, step in readings:
        now += step
        before = pressure.level
        if LEVELS.index(level) >= LEVELS.index(before):
            lower_since = None
        elif lower_since is None:
            lower_since = now
        changed = pressure.read(level, "psi", CALM_S, now)
        assert changed == (pressure.level != before)
        assert LEVELS.index(pressure.level) >= LEVELS.index(level), "it is worse than it says"
        if LEVELS.index(pressure.level) < LEVELS.index(before):
            assert lower_since is not None
            assert now - lower_since >= CALM_S
            lower_since = None
