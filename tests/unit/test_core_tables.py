"""The transition table: complete, reachable, drawn into the docs as it is; the fair queue in plain cases."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxd.core.lifecycle import TRANSITIONS, IllegalTransition, Lifecycle
from mlxd.core.queue import FairQueue
from mlxd_client.types import EVENT_TOPICS

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


def test_the_docs_show_the_table_as_it_is():
    script = ROOT / "tools" / "draw_states.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@dataclass
class Waiting:
    rid: int
    client: int
    seq: int
    priority: str = "interactive"


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
