"""Who is served when: places in line, fairness, priorities, deadlines; and which models share the memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlxd_client import Client, errors
from mlxd_client.sync import EventStream, Stream
from support.daemon import Daemon, active, until
from support.fake_model import BASE_BYTES, MIB

CLEANUP = "mlxd/cleanup"
Stage = tuple[Daemon, Client, EventStream]


@pytest.fixture
def narrow() -> Iterator[Stage]:
    """One request runs at a time, and only as the test lets it; four may wait."""
    with (
        Daemon(bad_child="worker", steps=True, max_batch=1, queue_limit=4) as daemon,
        daemon.client() as client,
    ):
        client.load(CLEANUP)
        with client.events() as events:
            yield daemon, client, events


def order(events: EventStream, names: dict[str, str], count: int) -> list[str]:
    """Whose requests were started, in order, by their connections' names."""
    found: list[str] = []
    while len(found) < count:
        event = until(events, "generation_started")[-1]
        assert event.request is not None
        found.append(names[event.request.partition(":")[0]])
    return found


def running(client: Client, events: EventStream, prompt: str = "!slow 1") -> tuple[str, Stream]:
    """Start a request that runs at once. Returns its connection's name in events, and its stream."""
    stream = client.stream_process(prompt)
    event = until(events, "generation_started")[-1]
    assert event.request is not None
    return event.request.partition(":")[0], stream


def test_a_full_line_refuses_and_says_when_to_come_back(narrow: Stage) -> None:
    daemon, client, events = narrow
    with daemon.client() as greedy, daemon.client() as modest:
        first = greedy.stream_process("!slow 1")
        active(events, 1)
        waiting = [greedy.stream_process("!slow 1") for _ in range(2)]
        with pytest.raises(errors.QueueFull) as caught:
            greedy.process("!slow 1")  # half of what is left is for the others
        assert 0 < caught.value.details["retry_after_s"] <= 60
        waiting.append(modest.stream_process("!slow 1"))
        active(events, 1, 3)
        daemon.step(0)
        for stream in (first, *waiting):
            assert stream.wait().text == "piece0"
        assert client.process("and then").text == "and then"


def test_a_client_with_many_requests_does_not_delay_one_with_one() -> None:
    with (
        Daemon(bad_child="worker", steps=True, max_batch=1) as daemon,
        daemon.client() as greedy,
        daemon.client() as modest,
        greedy.events() as events,
    ):
        greedy.load(CLEANUP)
        name, first = running(greedy, events)
        streams = [greedy.stream_process("!slow 1") for _ in range(5)]
        active(events, 1, 5)
        late = [modest.stream_process("!slow 1") for _ in range(2)]
        active(events, 1, 7)
        daemon.step(0)
        served = order(events, {name: "greedy"} | {f"c{n}": "modest" for n in range(99) if f"c{n}" != name}, 7)
        assert served[:4].count("modest") == 2, served
        for stream in (first, *streams, *late):
            stream.wait()


def test_interactive_requests_go_before_those_of_a_batch(narrow: Stage) -> None:
    daemon, client, events = narrow
    name, first = running(client, events)
    with daemon.client() as other:
        batch = [client.stream_process("!slow 1", priority="batch") for _ in range(2)]
        active(events, 1, 2)
        talk = other.stream_process("!slow 1")
        active(events, 1, 3)
        daemon.step(0)
        assert order(events, {name: "batch"} | {f"c{n}": "talk" for n in range(99) if f"c{n}" != name}, 3)[0] == "talk"
        for stream in (first, *batch, talk):
            stream.wait()


def test_a_deadline_ends_a_request_wherever_it_stands(narrow: Stage) -> None:
    daemon, client, events = narrow
    with daemon.client() as other:
        generating = other.stream_process("!slow 2", timeout_s=0.5)
        active(events, 1)
        daemon.step(0)
        with pytest.raises(errors.DeadlineExceeded) as queued:
            client.process("!slow 1", timeout_s=0.1)
        assert queued.value.details == {"phase": "queued", "timeout_s": 0.1}
        with pytest.raises(errors.DeadlineExceeded) as caught:
            generating.wait()
        assert caught.value.details["phase"] == "generating"
        assert caught.value.details["text"] == "piece0"
        active(events, 0)


def test_a_deadline_counts_while_the_model_loads() -> None:
    with Daemon(bad_child="late", steps=True) as daemon, daemon.client() as client:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            client.process("x", timeout_s=0.3)
        assert caught.value.details["phase"] == "loading"


# --- several models -----------------------------------------------------------------------------------------------


@pytest.fixture
def roomy() -> Iterator[Stage]:
    """Room for two of the models that `model` makes, at 10 MiB of weights each."""
    with (
        Daemon(bad_child="worker", steps=True, memory_budget_bytes=2 * BASE_BYTES + 25 * MIB) as daemon,
        daemon.client() as client,
        client.events() as events,
    ):
        yield daemon, client, events


def loaded(client: Client) -> set[str]:
    return {model.id.rpartition("/")[2] for model in client.models() if model.state == "Ready"}


def test_the_model_that_was_not_used_for_longest_makes_room(roomy: Stage) -> None:
    daemon, client, events = roomy
    a, b, c = (daemon.model(name, 10 * MIB) for name in "abc")
    client.load(a)
    client.load(b)
    assert client.process("x", model=a).model == a
    assert loaded(client) == {"a", "b"}
    client.load(c)
    assert loaded(client) == {"a", "c"}
    assert len(daemon.children()) == 2
    status = client.status()
    assert 0 < status.memory.used_bytes <= status.memory.budget_bytes
    assert [e.model_id for e in until(events, "unloaded") if e.name == "unloaded"] == [b]


def test_a_lease_is_never_broken(roomy: Stage) -> None:
    daemon, client, _events = roomy
    a, b, c = (daemon.model(name, 10 * MIB) for name in "abc")
    with client.acquire(a), client.acquire(b):
        with pytest.raises(errors.InsufficientMemory) as caught:
            client.load(c)
        assert caught.value.details["leased"] == [a, b]
        assert caught.value.details["needed_bytes"] > caught.value.details["available_bytes"]
        with pytest.raises(errors.ModelBusy):
            client.unload(a)
        assert loaded(client) == {"a", "b"}
    client.load(c)
    assert "c" in loaded(client)


def test_a_crashed_client_holds_no_lease(roomy: Stage) -> None:
    daemon, client, events = roomy
    a = daemon.model("a", 10 * MIB)
    crashing = daemon.client().__enter__()
    crashing.acquire(a)
    until(events, "queue", leases=1)
    assert crashing._link is not None
    crashing._link._sock.close()  # no release, no goodbye
    until(events, "queue", leases=0)
    client.unload(a)


def test_a_busy_model_serves_what_it_accepted_before_it_makes_room(roomy: Stage) -> None:
    daemon, client, events = roomy
    a, b, c = (daemon.model(name, 10 * MIB) for name in "abc")
    streams = [client.stream_process("!slow 1", model=model) for model in (a, b)]
    until(events, "generation_started")
    until(events, "generation_started")
    with daemon.client() as other:
        third = other.stream_process("x", model=c)
        queued = until(events, "loading_queued")[-1]
        assert (queued.model_id, queued.model and queued.model.phase) == (c, "queued")
        daemon.step(0)
        assert third.wait().model == c
    for stream in streams:
        assert stream.wait().text == "piece0"


def test_a_model_larger_than_the_budget_is_refused(roomy: Stage) -> None:
    daemon, client, _events = roomy
    with pytest.raises(errors.InsufficientMemory) as caught:
        client.process("x", model=daemon.model("huge", 10_000 * MIB))
    details = caught.value.details
    assert details["needed_bytes"] > details["budget_bytes"] == details["available_bytes"]
    assert daemon.children() == []


def test_three_models_for_two_places_all_get_served(roomy: Stage) -> None:
    """Requests for each, again and again, in a row: every one is answered, and the budget holds throughout."""
    daemon, client, _events = roomy
    models = [daemon.model(name, 10 * MIB) for name in "abc"]
    streams = [client.stream_process(f"{n}", model=models[n % 3]) for n in range(9)]
    for n, stream in enumerate(streams):
        assert stream.wait().text == f"{n}"
    assert len(daemon.children()) == 2
