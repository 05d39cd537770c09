"""Requests of every kind at once, on a real, tiny model: whatever the mix, each gets what it would get alone.

The longer form is `python3 tools/dev.py fuzz --engine`.
"""

from __future__ import annotations

from typing import Any

import pytest

from mlxd.worker.engine import Engine
from mlxd.worker.load import load
from support.engines import ask
from support.mix import Mix, Models, held_bytes

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(models: Models) -> Engine:
    """On a copy of its own: adapters stay in the model that they were put into, and `models` says what is right."""
    return Engine(load(str(models.path), lambda fraction: None), max_batch=4, prefill_step=32)


@pytest.mark.parametrize("seed", [1, 3])
def test_any_mix(models: Models, seed: int) -> None:
    told = Mix(models, seed).run(30)
    assert told["Generated"] > 10


def test_nothing_is_left_of_a_mix(models: Models) -> None:
    """A second run on the same models holds no more than the first one did."""
    held = []
    for seed in (5, 5):
        mix = Mix(models, seed)
        mix.run(12)
        mix.engine.guesses.forget()
        del mix
        held.append(held_bytes())
    assert held[1] <= held[0] + 100_000


@pytest.mark.parametrize("ends", ["by a stop string", "cancelled"])
@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"deterministic": True}, {"context_policy": "rotate"}])
def test_those_who_come_after_a_lane_has_closed(engine: Engine, options: dict[str, Any], ends: str) -> None:
    """The plain lane had nothing to read when it took turns: it reads again once it is the only one."""
    whole = GREEDY | {"max_tokens": 30} | options
    engine.submit(1, ask("hello", **whole | ({"stop": ["e", "a", "i", "o", " "]} if ends != "cancelled" else {})))
    for step in range(400):
        if ends == "cancelled" and step == 10:
            engine.cancel(1)
        if engine.busy:
            engine.step()
    assert not engine.busy
    engine.submit(2, ask("hello", max_tokens=3, **GREEDY))
    ended = [end for _ in range(50) if engine.busy for end in engine.step().ended]
    assert [number for number, _ in ended] == [2]


def test_a_deterministic_answer_that_waits_for_its_adapter_is_exact_from_the_start(
    engine: Engine, models: Models
) -> None:
    """The step that reads the last of an adapter reads the first of the prompt."""
    request = ask("hello", max_tokens=3, deterministic=True)
    request.adapter = models.adapters[0]
    engine.submit(1, request)
    while engine.busy:
        assert engine.exact
        engine.step()
    assert not engine.exact
