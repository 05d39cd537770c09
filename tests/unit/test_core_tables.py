"""The core's tables: transitions, complete, reachable and drawn into the docs as they are; what may happen while what
else goes on; the fair queue in plain cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from mlxd.core import actions as do
from mlxd.core import events as ev
from mlxd.core.lifecycle import TRANSITIONS, IllegalTransition, Lifecycle
from mlxd.core.queue import FairQueue
from mlxd_client.errors import WorkerDied
from mlxd_client.types import EVENT_TOPICS
from support.core_bench import MODEL, Bench

ROOT = Path(__file__).parents[2]


def test_each_state_is_reached_and_left():
    states = {"NotDownloaded", "Downloading", "Downloaded", "Loading", "Ready"}
    assert {t.source for t in TRANSITIONS} == states
    assert {t.target for t in TRANSITIONS} == states
    assert len({(t.source, t.cause) for t in TRANSITIONS}) == len(TRANSITIONS), "a cause leads two ways"
    assert {t.event for t in TRANSITIONS} <= set(EVENT_TOPICS)


def test_an_illegal_transition_tells_the_story():
    model = Lifecycle("org/model")
    model.apply("found", 1.0)
    model.apply("load", 2.5)
    with pytest.raises(IllegalTransition, match=r"org/model is Loading: 'deleted'.*found.*load"):
        model.apply("deleted", 3.0)
    assert model.state == "Loading"


def test_every_event_is_handled():
    assert set(get_args(ev.Event)) == set(Bench().core._handlers)


# --- two at a time ------------------------------------------------------------------------------------------------


def nothing(bench: Bench) -> None:
    """Nobody has heard of the model."""


def downloading(bench: Bench) -> None:
    bench.download()


def download_waits(bench: Bench) -> None:
    for n in range(2):
        bench.download(f"org/{n}")
    bench.download()


def download_leaving(bench: Bench) -> None:
    bench.tell(ev.CancelJob(bench.download()))


def download_failed(bench: Bench) -> None:
    bench.tell(ev.FetchFailed(bench.fetch(), WorkerDied("gone")))


def downloaded(bench: Bench) -> None:
    bench.have()


def updating(bench: Bench) -> None:
    bench.have()
    bench.download()


def update_leaving(bench: Bench) -> None:
    bench.have()
    bench.tell(ev.CancelJob(bench.download()))


def loading(bench: Bench) -> None:
    bench.have()
    bench.ask(lambda rid: ev.Ensure(rid, 1, MODEL))


def load_leaving(bench: Bench) -> None:
    loading(bench)
    bench.tell(ev.CancelJob("load-abc123-1"))


def ready(bench: Bench) -> None:
    bench.have()
    bench.load()


def ready_updating(bench: Bench) -> None:
    ready(bench)
    bench.download()


def leased(bench: Bench) -> None:
    bench.have()
    bench.load(lease="L")


def deleting(bench: Bench) -> None:
    bench.have()
    bench.delete()


def deleting_worker(bench: Bench) -> None:
    ready(bench)
    bench.delete()


WISHES: dict[str, Callable[[int], ev.Event]] = {
    "download": lambda rid: ev.Download(rid, 1, MODEL),
    "delete": lambda rid: ev.Delete(rid, 1, MODEL),
    "load": lambda rid: ev.Ensure(rid, 1, MODEL),
    "generate": lambda rid: ev.Submit(rid, 1, MODEL),
    "unload": lambda rid: ev.Unload(rid, 1, MODEL),
}

# What becomes of each wish: `attach` and `new` say which job a download got, `wait` that the answer comes later, `at
# once` that it is here; anything else is the kind of its refusal.
PAIRS: dict[Callable[[Bench], None], tuple[str, str, str, str, str]] = {
    nothing:          ("new",        "wait",       "model_not_found", "model_not_found", "model_not_found"),
    downloading:      ("attach",     "model_busy", "model_not_found", "model_not_found", "at once"),
    download_waits:   ("attach",     "model_busy", "model_not_found", "model_not_found", "at once"),
    download_leaving: ("new",        "wait",       "model_not_found", "model_not_found", "at once"),
    download_failed:  ("new",        "wait",       "model_not_found", "model_not_found", "at once"),
    downloaded:       ("new",        "wait",       "wait",            "wait",            "at once"),
    updating:         ("attach",     "model_busy", "wait",            "wait",            "at once"),
    update_leaving:   ("new",        "wait",       "wait",            "wait",            "at once"),
    loading:          ("new",        "model_busy", "wait",            "wait",            "model_busy"),
    load_leaving:     ("new",        "wait",       "wait",            "wait",            "wait"),
    ready:            ("new",        "wait",       "at once",         "wait",            "wait"),
    ready_updating:   ("attach",     "model_busy", "at once",         "wait",            "wait"),
    leased:           ("new",        "model_busy", "at once",         "wait",            "model_busy"),
    deleting:         ("model_busy", "model_busy", "model_busy",      "model_busy",      "at once"),
    deleting_worker:  ("model_busy", "model_busy", "model_busy",      "model_busy",      "wait"),
}  # fmt: skip


@pytest.mark.parametrize("situation", PAIRS, ids=lambda situation: situation.__name__)
def test_what_may_happen_while_something_else_does(situation: Callable[[Bench], None]):
    found = []
    for make in WISHES.values():
        bench = Bench()
        situation(bench)
        before = set(bench.core.jobs)
        found.append(outcome(bench, bench.ask(make), before))
    assert tuple(found) == PAIRS[situation]


def test_what_a_request_waited_before_it_was_submitted_counts() -> None:
    bench = Bench()
    loading(bench)
    bench.ask(lambda rid: ev.Submit(rid, 1, MODEL, timeout_s=10.0, waited_s=4.0))
    assert bench.core.next_deadline() == bench.now + 6.0


def outcome(bench: Bench, rid: int, jobs: set[str]) -> str:
    said = [action for action in bench.said if getattr(action, "rid", None) == rid]
    match [action for action in said if not isinstance(action, do.Dispatch | do.Publish)]:
        case []:
            return "wait"
        case [do.Started(_, job)]:
            return "attach" if job in jobs else "new"
        case [do.Fail(_, error)]:
            return error.kind
        case [do.Answer()]:
            return "at once"
    raise AssertionError(said)


@dataclass
class Waiting:
    rid: int
    client: int
    seq: int
    priority: str = "interactive"
    yields: bool = False


def drain(queue: FairQueue[Waiting], slots: int = 1) -> list[int]:
    """Pop everything, as if each request ended once `slots` others had started after it."""
    order: list[Waiting] = []
    while len(queue):
        running = Counter(r.client for r in order[-(slots - 1) :]) if slots > 1 else Counter()
        order.append(queue.pop(running))
    return [r.client for r in order]


def test_clients_take_turns_however_many_requests_one_has():
    queue: FairQueue[Waiting] = FairQueue()
    for n in range(6):
        queue.put(Waiting(n, 1, n))
    for n in range(6, 9):
        queue.put(Waiting(n, 2, n))
    assert drain(queue) == [1, 2, 1, 2, 1, 2, 1, 1, 1]


def test_a_free_slot_goes_to_the_client_with_the_fewest_running():
    queue: FairQueue[Waiting] = FairQueue()
    for n in range(3):
        queue.put(Waiting(n, 1, n))
    queue.put(Waiting(3, 2, 3))
    assert queue.pop(Counter({1: 5})).client == 2


def test_batch_waits_until_nobody_is_there_in_person():
    queue: FairQueue[Waiting] = FairQueue()
    queue.put(Waiting(0, 1, 0, "batch"))
    queue.put(Waiting(1, 1, 1))
    queue.put(Waiting(2, 2, 2))
    assert [queue.pop(Counter()).rid for _ in range(3)] == [1, 2, 0]


def test_a_model_that_makes_room_serves_only_what_it_had_accepted():
    queue: FairQueue[Waiting] = FairQueue()
    for n in range(4):
        queue.put(Waiting(n, n, n))
    assert [queue.pop(Counter(), up_to=1).rid for _ in range(2)] == [0, 1]
    assert queue.pop(Counter(), up_to=1) is None
    assert len(queue) == 2
