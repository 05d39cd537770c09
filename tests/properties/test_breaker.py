"""The breaker's law, for any order of deaths, tries and successes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlxd.core.breaker import Breaker, Breakers, BreakerSettings, BreakerState

SETTINGS = BreakerSettings(deaths=3, window_s=60, cooldown_s=5, max_cooldown_s=40)
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

acts = st.sampled_from(["admit", "died", "succeeded", "reset"])
pauses = st.floats(min_value=0, max_value=100)


@given(st.lists(st.tuples(pauses, acts), max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_law(story: list[tuple[float, str]]) -> None:
    breaker, now, deaths = Breaker(SETTINGS), 0.0, []
    for pause, act in story:
        now += pause
        before, retry_at = breaker.state(now), breaker.retry_at
        admitted = breaker.admit(now) if act == "admit" else None
        if act == "died":
            deaths.append(now)
            breaker.died(now)
        elif act == "succeeded":
            breaker.succeeded(now)
        elif act == "reset":
            deaths.clear()
            breaker.reset()
        after = breaker.state(now)

        assert (breaker.retry_at is None) == (after is CLOSED)
        if act == "admit":
            assert after is before
            assert admitted is True or before is not CLOSED
            assert admitted is False or before is not OPEN
        if before is OPEN and act != "reset":  # nothing but time and a command ends the cool-down
            assert (after, breaker.retry_at) == (OPEN, retry_at)
        if before is HALF_OPEN and act == "died":
            assert after is OPEN
        if before is HALF_OPEN and act == "succeeded":
            assert after is CLOSED
            deaths.clear()
        if before is CLOSED and act == "died":
            recent = [at for at in deaths if at > now - SETTINGS.window_s]
            assert (after is OPEN) == (len(recent) >= SETTINGS.deaths)
        if act == "reset":
            assert after is CLOSED
        if breaker.retry_at is not None and after is OPEN:
            assert 0 < breaker.retry_at - now <= SETTINGS.max_cooldown_s


@given(st.lists(st.tuples(pauses, acts), max_size=60))
@settings(max_examples=200, deadline=None)
def test_it_always_heals(story: list[tuple[float, str]]) -> None:
    """After any story, within the longest cool-down of the last call, a try is admitted, and its success closes."""
    breaker, now = Breaker(SETTINGS), 0.0
    for pause, act in story:
        now += pause
        getattr(breaker, act)(now) if act != "reset" else breaker.reset()
    now += SETTINGS.max_cooldown_s
    assert breaker.admit(now)
    breaker.succeeded(now)
    assert breaker.state(now) is CLOSED


def test_three_deaths_open_it_and_each_failed_try_doubles_the_cool_down() -> None:
    breaker = Breaker(SETTINGS)
    for now in (0.0, 1.0, 2.0):
        assert breaker.state(now) is CLOSED
        breaker.died(now)
    now = 2.0
    for cooldown_s in (5, 10, 20, 40, 40):
        assert breaker.retry_at == now + cooldown_s
        assert not breaker.admit(now + cooldown_s - 0.001)
        now += cooldown_s
        assert breaker.state(now) is HALF_OPEN
        assert breaker.admit(now)
        assert not breaker.admit(now)  # one try only
        breaker.died(now)


def test_deaths_that_are_far_apart_do_not_open_it() -> None:
    breaker = Breaker(SETTINGS)
    for k in range(20):
        breaker.died(k * 30.0)
        assert breaker.state(k * 30.0) is CLOSED


def test_successes_between_deaths_do_not_hide_a_crash_loop() -> None:
    breaker = Breaker(SETTINGS)
    for now in (0.0, 1.0, 2.0):
        breaker.died(now)
        breaker.succeeded(now)
    assert breaker.state(2.0) is OPEN


def test_a_try_that_was_given_up_makes_room_for_another() -> None:
    breaker = Breaker(SETTINGS)
    for now in (0.0, 0.0, 0.0):
        breaker.died(now)
    assert breaker.admit(5.0)
    assert not breaker.admit(9.9)
    assert breaker.admit(10.0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), pauses, st.sampled_from(["admit", "died", "succeeded"])), max_size=60)
)
@settings(max_examples=100, deadline=None)
def test_keys_do_not_touch_each_other(story: list[tuple[str, float, str]]) -> None:
    """A map of breakers answers as one breaker per key does, although it forgets those that remember nothing."""
    together, apart, now = Breakers(SETTINGS), {key: Breaker(SETTINGS) for key in "abc"}, 0.0
    for key, pause, act in story:
        now += pause
        answer, expected = getattr(together, act)(key, now), getattr(apart[key], act)(now)
        if act == "admit":
            assert answer == expected
        for each, one in apart.items():
            assert together.state(each, now) is one.state(now)
            assert together.retry_at(each) == one.retry_at
        assert {tripped for tripped, _ in together.tripped(now)} == {
            k for k in "abc" if apart[k].state(now) is not CLOSED
        }
