"""Memory with a real daemon: files of a system as a test writes them, workers that really take memory, real models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import errors
from mlxd_client.sync import EventStream
from mlxd_client.types import Event
from support import tiny_adapter, tiny_model
from support.daemon import PATIENCE_S, Daemon, until
from support.fake_model import BASE_BYTES
from support.fake_system import MIB, FakeSystem

CLEANUP = "mlxd/cleanup"
GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 12}


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path / "system")


@pytest.fixture
def daemon(system: FakeSystem) -> Iterator[Daemon]:
    reserve = 256 * MIB
    with Daemon(
        bad_child="worker", steps=True, system_root=str(system.root), memory_budget_bytes=8192 * MIB,
        memory_reserve_bytes=reserve, memory_calm_s=0.5,
    ) as started:  # fmt: skip
        yield started


def until_level(events: EventStream, level: str) -> Event:
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None
        if event.name == "memory_pressure" and (event.details or {})["level"] == level:
            return event


def until_step(events: EventStream, *steps: str) -> list[Event]:
    """All events up to the last of these steps, which come in order."""
    seen: list[Event] = []
    for step in steps:
        while True:
            event = events.get(PATIENCE_S)
            assert event is not None
            seen.append(event)
            if event.name == "memory_exceeded":
                assert (event.details or {})["step"] == step
                break
    return seen


# --- who may load -----------------------------------------------------------------------------------------------------


def test_a_load_that_the_system_has_no_room_for_is_refused_with_the_numbers(daemon: Daemon, system: FakeSystem) -> None:
    model = daemon.model("large", 1000 * MIB)
    system.memory(available=1300 * MIB)
    with daemon.client() as client:
        with pytest.raises(errors.InsufficientMemory) as caught:
            client.load(model)
        told = caught.value.details
        assert told["system_bytes"] == told["available_bytes"] == 1044 * MIB
        assert told["needed_bytes"] == BASE_BYTES + 1000 * MIB
        assert not client.plan(model).fits
        system.memory(available=1400 * MIB)
        assert client.load(model).state == "Ready"


def test_a_container_s_limit_is_the_system_s(daemon: Daemon, system: FakeSystem) -> None:
    model = daemon.model("large", 500 * MIB)
    system.group(most=1024 * MIB, used=600 * MIB, cache=100 * MIB)
    with daemon.client() as client:
        with pytest.raises(errors.InsufficientMemory):
            client.load(model)
        memory = client.status().memory
        assert (memory.capacity_bytes, memory.available_bytes) == (1024 * MIB, 524 * MIB)
        system.group(most="max", used=600 * MIB)
        assert client.load(model).state == "Ready"


def test_two_loads_at_once_do_not_overshoot_together(daemon: Daemon, system: FakeSystem) -> None:
    """Neither has taken anything yet when the other is decided on. The files say so, too: nothing changes in them."""
    models = [daemon.model(name, 300 * MIB) for name in ("one", "two", "three")]
    system.memory(available=256 * MIB + 2 * (300 * MIB + BASE_BYTES) + 100 * MIB)
    with daemon.client() as client:
        with client.acquire(models[0]), client.acquire(models[1]):
            with pytest.raises(errors.InsufficientMemory) as caught:
                client.load(models[2])
            told = caught.value.details
            assert told["leased"] == models[:2]
            assert told["unload"] == models[:1]
            assert {one["model"] for one in told["held"]} == set(models[:2])
        assert client.load(models[2]).state == "Ready", "an idle one went for it"
        assert client.status().models.loaded == 2


# --- pressure ---------------------------------------------------------------------------------------------------------


def test_pressure_comes_and_goes(daemon: Daemon, system: FakeSystem) -> None:
    idle, held = daemon.model("idle"), daemon.model("held")
    with daemon.client() as client, client.events() as events, client.acquire(held):
        client.load(idle)
        system.stall(some=40.0, full=0.0)
        warned = until_level(events, "warning")
        assert warned.details is not None
        assert warned.details["source"] == "psi"
        assert warned.details["stalls"] == [{"source": "psi", "some": 40.0, "full": 0.0}]
        system.stall(some=60.0, full=30.0)
        until_level(events, "critical")
        until(events, "unloaded", id=idle, state="Downloaded")
        assert client.model(held).state == "Ready"
        with pytest.raises(errors.MemoryPressure) as caught:
            client.process("a b", model=held, priority="batch")
        assert caught.value.details["level"] == "critical"
        assert client.process("a b", model=held).text == "a b"
        with client.events(topics=["system"]) as late:
            assert late.snapshot.memory_pressure == "critical"
        system.stall()
        until_level(events, "normal")
        assert client.status().memory.pressure.level == "normal"
        assert client.process("a b", model=held, priority="batch").text == "a b"


def test_pressure_in_the_middle_of_a_load(daemon: Daemon, system: FakeSystem) -> None:
    model, other = daemon.model("!step 0"), daemon.model("other")
    with daemon.client() as client, client.events() as events:
        client.load(other)
        pending = client.stream_process("c d", model=model)
        until(events, "loading_started", id=model)
        system.stall(some=60.0, full=30.0)
        until_level(events, "critical")
        until(events, "unloaded", id=other)
        assert client.model(model).state == "Loading"
        daemon.step(0)
        assert pending.wait().text == "c d"


@pytest.mark.parametrize("broken", ["gone", "garbage"])
def test_files_that_say_nothing_hold_nobody_up(daemon: Daemon, system: FakeSystem, broken: str) -> None:
    paths = ("proc/meminfo", "proc/pressure/memory", "proc/self/cgroup")
    model = daemon.model("any")
    for path in paths:
        if broken == "gone":
            system.remove(path)
        else:
            system.write(path, b"\xff\x00MemAvailable: many\nsome avg10=\n0::/../..\n")
    with daemon.client() as client, client.events() as events:
        assert client.process("a", model=model).text == "a"
        memory = client.status().memory
        assert (memory.available_bytes, memory.pressure.level) == (None, "normal")
        while client.model(model).footprint_bytes is None:  # that of a process is known all the same
            until(events, "queue")
    assert "memory cannot be measured" in daemon.log()


def test_a_real_worker_gives_back_what_it_keeps(system: FakeSystem) -> None:
    with (
        Daemon(system_root=str(system.root), memory_calm_s=0.5) as daemon,
        daemon.client() as client,
        client.acquire(CLEANUP),
        client.events() as events,
    ):
        client.process("um so i think we should uh meet on monday at three pm")
        (before,) = client.cache().models
        assert before.memory is not None
        assert before.memory.bytes > 0
        system.stall(some=60.0, full=30.0)
        until_level(events, "critical")
        assert client.process("um so hello", cache_prompt=False).text  # behind the trim, on the same pipe
        (after,) = client.cache().models
        assert after.memory is not None
        assert after.memory.bytes == 0


# --- a worker that takes too much -------------------------------------------------------------------------------------


@pytest.fixture
def tight() -> Iterator[Daemon]:
    with Daemon(bad_child="worker", steps=True, memory_budget_bytes=BASE_BYTES + 64 * MIB) as started:
        yield started


def test_a_worker_that_grows_past_its_share_is_recycled(tight: Daemon) -> None:
    model = tight.model("grows")
    with tight.client() as client, client.events() as events, client.acquire(model):
        before = tight.worker().pid
        assert client.process("!grow 400", model=model).text == "!grow 400"
        (said,) = (event for event in until_step(events, "reported") if event.name == "memory_exceeded")
        assert said.details is not None
        assert said.details["footprint_bytes"] > said.details["share_bytes"] + 64 * MIB  # it may still be growing
        assert said.details["share_bytes"] < 400 * MIB
        with client.stream_process("!slow 1", model=model) as running:
            until_step(events, "trimmed", "recycled")
            waiting = client.stream_process("after it", model=model)
            tight.step(0)
            assert running.wait().finish_reason == "stop", "what it was at is answered"
        assert waiting.wait().text == "after it", "and so is what waited, by the next one"
        assert tight.worker().pid != before
        view = client.model(model)
        assert (view.state, view.leases) == ("Ready", 1)
        assert view.footprint_bytes is None or view.footprint_bytes < 200 * MIB
        assert client.status().workers == [], "none died"


def test_a_load_that_turns_out_larger_answers_and_is_not_repeated(tight: Daemon) -> None:
    model = tight.model("!grow 400")
    with tight.client() as client, client.events() as events:
        assert client.process("a b", model=model).text == "a b"
        until(events, "unloaded", id=model)
        with pytest.raises(errors.InsufficientMemory) as caught:
            client.process("c d", model=model)
        assert caught.value.details["needed_bytes"] > 400 * MIB


def test_trimming_may_be_enough(tight: Daemon) -> None:
    model = tight.model("keeps")
    with tight.client() as client, client.events() as events:
        assert client.process("!keep 400", model=model).text == "!keep 400"
        pid = tight.worker().pid
        until_step(events, "reported", "trimmed")
        while (client.model(model).footprint_bytes or 0) > 200 * MIB:
            until(events, "queue")
        assert tight.worker().pid == pid
        assert client.process("c", model=model).text == "c"


@pytest.mark.model
def test_a_real_worker_is_recycled_with_what_it_was_loaded_with(system: FakeSystem, tmp_path: Path) -> None:
    """The files say that it holds too much; all else is real."""
    base = str(tiny_model.build(tmp_path / "base").resolve())
    adapter = str(tiny_adapter.build(tmp_path / "adapter", tmp_path / "base").resolve())
    with (
        Daemon(system_root=str(system.root), memory_budget_bytes=1024 * MIB) as daemon,
        daemon.client() as client,
        client.events() as events,
        client.acquire(base),
    ):
        plain = client.process("hello", model=base, **GREEDY).text
        client.load(base, adapter=adapter)
        adapted = client.process("hello", model=base, **GREEDY).text
        assert adapted != plain
        before = daemon.worker().pid
        system.process(before, own=4096 * MIB)
        until_step(events, "reported", "trimmed", "recycled")
        assert client.process("hello", model=base, **GREEDY).text == adapted
        assert daemon.worker().pid != before
        assert client.model(base).adapter == adapter
        assert client.stats(base).models[0].unloads == {"recycled": 1}
