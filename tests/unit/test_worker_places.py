"""Rows that come and go: when caches are copied for it, how many passes it takes, and that answers stay the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxd.worker import places
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.rows import STEPS_OPEN, RowBatch
from mlxd_client.errors import ModelInvalid
from support import tiny_model
from support.engines import GREEDY, Watched, answer, ask, drain, step

pytestmark = pytest.mark.model

NEVER = {"logit_bias": {"2": -1000}}  # the end of text is never chosen
LONG = "the quick brown fox jumps over the lazy dog, and then it comes back and does it all again"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")), lambda fraction: None)


@pytest.fixture
def watched(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, model=Watched(loaded.model))


@pytest.fixture
def engine(watched: LoadedModel) -> Engine:
    return Engine(watched, max_batch=8, prefill_step=64)


def rows_of(engine: Engine) -> RowBatch:
    batch: RowBatch = engine._generator.plain._generation_batch
    return batch


def begin(engine: Engine, ends: dict[int, Any], number: int, text: str, tokens: int, **options: Any) -> None:
    """Ask, and step until it is among those that decode."""
    engine.submit(number, ask(text, max_tokens=tokens, **GREEDY | NEVER | options))
    while engine._decoding.uids[number] not in rows_of(engine).uids:
        step(engine, ends)


def width(engine: Engine) -> int:
    """How many places the caches have."""
    return int(rows_of(engine).prompt_cache[0].keys.shape[0])


def test_a_row_takes_the_place_of_one_that_left(engine: Engine, loaded: LoadedModel) -> None:
    ends: dict[int, Any] = {}
    for number in range(4):
        begin(engine, ends, number, f"{number} hello", 60 if number != 1 else 8)
    while 1 not in ends:
        step(engine, ends)
    assert (len(rows_of(engine).uids), rows_of(engine).open_places, width(engine)) == (3, 1, 4)
    held = rows_of(engine).prompt_cache[0]
    begin(engine, ends, 4, "and one more", 20)
    assert rows_of(engine).prompt_cache[0] is held
    assert (len(rows_of(engine).uids), rows_of(engine).open_places, width(engine)) == (4, 0, 4)
    drain(engine, ends)
    plain = Engine(loaded, max_batch=8, prefill_step=64)
    for number, text, tokens in ((0, "0 hello", 60), (2, "2 hello", 60), (4, "and one more", 20)):
        assert ends[number].text == answer(plain, text, max_tokens=tokens, **GREEDY, **NEVER).text


def test_a_longer_row_moves_the_others(engine: Engine, loaded: LoadedModel) -> None:
    ends: dict[int, Any] = {}
    for number in range(3):
        begin(engine, ends, number, "a", 40 if number else 9)
    while 0 not in ends:
        step(engine, ends)
    begin(engine, ends, 3, LONG, 12)
    assert (rows_of(engine).open_places, width(engine)) == (0, 3)
    drain(engine, ends)
    plain = Engine(loaded, max_batch=8, prefill_step=64)
    assert ends[2].text == answer(plain, "a", max_tokens=40, **GREEDY, **NEVER).text
    assert ends[3].text == answer(plain, LONG, max_tokens=12, **GREEDY, **NEVER).text


def test_a_place_that_nobody_takes_is_closed(engine: Engine) -> None:
    ends: dict[int, Any] = {}
    for number in range(3):
        begin(engine, ends, number, "hello", 60 if number else 9)
    while 0 not in ends:
        step(engine, ends)
    for _ in range(STEPS_OPEN):
        assert rows_of(engine).open_places == 1
        step(engine, ends)
    step(engine, ends)
    assert (rows_of(engine).open_places, width(engine)) == (0, 2)


def test_where_most_rows_leave_no_place_stays_open(engine: Engine) -> None:
    ends: dict[int, Any] = {}
    for number in range(5):
        begin(engine, ends, number, "hello", 80)
    for number in (0, 1, 2):
        ends.update(engine.cancel(number).ended)
    assert (rows_of(engine).open_places, width(engine)) == (0, 2)


def test_positions_that_no_row_has_are_given_up(engine: Engine) -> None:
    """Rows that take turns for long leave the beginning of the caches behind."""
    ends: dict[int, Any] = {}
    for number in range(3):
        begin(engine, ends, number, "hello", 30 + number)
    for number in range(3, 40):
        begin(engine, ends, number, "hello", 30)
    cache = rows_of(engine).prompt_cache[0]
    assert cache._idx < 400
    assert places.padding([cache], rows_of(engine).tokens) < places.MOST_PADDING + STEPS_OPEN
    drain(engine, ends)
    assert len({ends[number].text for number in range(3, 40)}) == 1


def test_a_prompt_that_joins_costs_no_pass_of_its_own(engine: Engine, watched: LoadedModel) -> None:
    ends: dict[int, Any] = {}
    begin(engine, ends, 0, "hello", 40)
    begin(engine, ends, 1, "hello", 40)
    calls = watched.model.calls  # type: ignore[attr-defined]
    calls.clear()
    begin(engine, ends, 2, "and one more", 4)
    while 2 not in ends:
        step(engine, ends)
    alone = [shape for shape in calls if shape == (1, 1)]
    assert not alone
    # The prompt's last token and three of the answer go in; what follows the last is computed before it is known.
    assert sum(shape[0] == 3 for shape in calls) == 5


def test_a_row_that_is_cancelled_as_it_begins_leaves_the_others_alone(engine: Engine, loaded: LoadedModel) -> None:
    ends: dict[int, Any] = {}
    begin(engine, ends, 0, "hello", 30)
    begin(engine, ends, 1, "a", 30)
    begin(engine, ends, 2, "and one more", 30)
    ends.update(engine.cancel(2).ended)
    ends.update(engine.cancel(0).ended)
    drain(engine, ends)
    assert (
        ends[1].text == answer(Engine(loaded, max_batch=8, prefill_step=64), "a", max_tokens=30, **GREEDY, **NEVER).text
    )


def test_what_failed_leaves_nothing_in_its_place(tmp_path: Path) -> None:
    """A row whose values are no finite numbers ends; the one that takes its place is as it is alone."""
    broken = load(str(tiny_model.build(tmp_path / "broken")), lambda fraction: None)
    token = broken.tokenizer.encode("Ü", add_special_tokens=False)[-1]
    embedding = broken.model.model.embed_tokens
    embedding.weight[token] = mx.full((embedding.weight.shape[1],), float("nan"))
    without = {"logit_bias": {"2": -1000, str(token): -1000}}
    engine = Engine(broken, max_batch=4, prefill_step=64)
    ends: dict[int, Any] = {}
    for number in range(3):
        begin(engine, ends, number, "hello", 40, **without)
    engine.submit(3, ask("Ü" * 20, max_tokens=20, **GREEDY))
    while 3 not in ends:
        step(engine, ends)
    assert isinstance(ends[3], ModelInvalid)
    assert rows_of(engine).open_places == 1
    begin(engine, ends, 4, "a", 10, **without)
    assert rows_of(engine).open_places == 0
    drain(engine, ends)
    plain = Engine(broken, max_batch=4, prefill_step=64)
    assert ends[4].text == answer(plain, "a", max_tokens=10, **GREEDY | without).text
    assert ends[0].text == answer(plain, "hello", max_tokens=40, **GREEDY | without).text


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_and_go_at_random_say_what_they_say_alone(loaded: LoadedModel, seed: int) -> None:
    source = random.Random(seed)
    engine, plain = (Engine(loaded, max_batch=6, prefill_step=32, cache_bytes=size) for size in (1 << 24, 0))
    asked = [(LONG[: source.randrange(1, len(LONG))], source.randrange(1, 40)) for _ in range(30)]
    options = GREEDY | {"repetition_penalty": 1.2} | NEVER
    ends: dict[int, Any] = {}
    opened = 0
    for number, (text, tokens) in enumerate(asked):
        engine.submit(number, ask(text, max_tokens=tokens, **options))
        for _ in range(source.randrange(8)):
            step(engine, ends)
            opened += rows_of(engine).open_places
        if source.random() < 0.2:
            cancelled = source.randrange(number + 1)
            ends.update(engine.cancel(cancelled).ended)
    drain(engine, ends)
    assert opened > 0
    for number, (text, tokens) in enumerate(asked):
        wanted = answer(plain, text, max_tokens=tokens, **options).text
        if ends[number].finish_reason == "cancelled":
            assert wanted.startswith(ends[number].text.rstrip("\N{REPLACEMENT CHARACTER}"))  # half a character
        else:
            assert ends[number].text == wanted
