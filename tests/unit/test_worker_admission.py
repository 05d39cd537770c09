"""Memory for KV caches, and whose prompt is read first: the engine on a tiny model with a tiny bound."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlxd.worker.admission import MOST_PASSES
from mlxd.worker.engine import Engine
from mlxd.worker.lanecaches import PLAIN, Footprint
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import InsufficientMemory
from support import tiny_model
from support.engines import GREEDY, Watched, ask, drain, step

pytestmark = pytest.mark.model

NEVER_STOPS: dict[str, Any] = {"temperature": 0, "logit_bias": {"2": -1000}}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_model.build(tmp_path_factory.mktemp("models") / "tiny", heads=2, kv_heads=1, context=8192)
    return load(str(folder), lambda fraction: None)


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> Footprint:
    return Engine(loaded, max_batch=1, prefill_step=64)._generator._kinds.footprint(PLAIN)


def text_of(loaded: LoadedModel, tokens: int) -> str:
    """A text whose prompt has somewhat fewer tokens than that."""
    each = len(loaded.tokenizer.encode(" the quick brown fox", add_special_tokens=False))
    return " the quick brown fox" * ((tokens - 16) // each)


def assert_empty(engine: Engine) -> None:
    lanes = engine._generator
    assert not engine.busy
    assert engine.active == engine.waiting == lanes._foreseen() == 0
    assert lanes._homes == {}
    assert lanes._plain.lengths == {}
    assert lanes.plain.prompt_cache_nbytes == 0


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4])
def test_eight_long_prompts_run_two_at_a_time(loaded: LoadedModel, plain: Footprint, bits: int) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=plain.bytes(2, 512))
    if bits:  # a quantised row takes less: the bound counts that
        footprint = engine._generator._kinds.footprint(replace(PLAIN, kv_bits=bits))
        assert footprint.per_token < plain.per_token / 4
        engine.allow(footprint.bytes(2, 512))
    options = {"kv_bits": bits} if bits else {}
    ends: dict[int, Any] = {}
    for number in range(8):
        engine.submit(number, ask(text_of(loaded, 400), max_tokens=10 + number, **NEVER_STOPS, **options))
    most, held = 0, 0
    while engine.busy:
        step(engine, ends)
        lanes = engine._generator
        most = max(most, sum(len(lane.lengths) for lane in lanes._lanes))
        held = max(held, sum(lane.rows.prompt_cache_nbytes for lane in lanes._lanes))
    assert most == 2
    assert 0 < held <= lanes._admission.limit_bytes
    assert [ends[number].completion_tokens for number in range(8)] == [10 + number for number in range(8)]
    assert_empty(engine)


def test_what_never_fits_is_refused_with_the_numbers(loaded: LoadedModel, plain: Footprint) -> None:
    limit = plain.bytes(1, 1024)
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=limit)
    with pytest.raises(InsufficientMemory) as caught:
        engine.submit(1, ask(text_of(loaded, 900), max_tokens=600))
    details = caught.value.details
    assert details["needed_bytes"] == plain.bytes(1, details["prompt_tokens"] + 600)
    assert details["available_bytes"] == limit
    assert 850 < details["prompt_tokens"] <= 900
    assert details["max_tokens"] == 600
    with pytest.raises(InsufficientMemory) as caught:  # not even one token, though none were asked for
        engine.submit(2, ask(text_of(loaded, 1300)))
    assert caught.value.details["max_tokens"] == 1
    assert_empty(engine)


def test_a_default_of_tokens_is_fitted(loaded: LoadedModel, plain: Footprint) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=plain.bytes(1, 512))
    engine.submit(1, ask(text_of(loaded, 450), **NEVER_STOPS))
    end = drain(engine)[1]
    assert end.finish_reason == "length"
    assert end.prompt_tokens + end.completion_tokens == 512


def test_a_bound_below_everything_refuses_all_and_loads_all_the_same(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=1)
    engine.warm_up()
    with pytest.raises(InsufficientMemory):
        engine.submit(1, ask("hello"))
    assert_empty(engine)


def test_who_waits_can_be_cancelled(loaded: LoadedModel, plain: Footprint) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=plain.bytes(1, 512))
    ends: dict[int, Any] = {}
    for number in range(3):
        engine.submit(number, ask(text_of(loaded, 400), max_tokens=5, **NEVER_STOPS))
    step(engine, ends)
    assert (engine.active, engine.waiting) == (1, 2)
    ((number, end),) = engine.cancel(1).ended
    assert (number, end.finish_reason, end.text) == (1, "cancelled", "")
    engine.cancel(0)  # makes room at once, not only when it would have ended
    drain(engine, ends)
    assert list(ends) == [2]
    assert_empty(engine)


def test_small_ones_pass_a_large_one_but_not_for_ever(loaded: LoadedModel, plain: Footprint) -> None:
    engine = Engine(loaded, max_batch=32, prefill_step=256, kv_bytes=plain.bytes(1, 1024))
    order: list[int] = []
    begun: Any = engine._generator.plain.add
    engine._generator.plain.add = lambda *args, uid, **more: order.append(uid) or begun(*args, uid=uid, **more)  # type: ignore[method-assign, func-returns-value]
    engine.submit(1, ask("hello", max_tokens=60, **NEVER_STOPS))
    engine.submit(2, ask(text_of(loaded, 900), max_tokens=20, **NEVER_STOPS))  # fits only alone
    for number in range(3, 3 + 2 * MOST_PASSES):
        engine.submit(number, ask("hello", max_tokens=8, **NEVER_STOPS))
    ends = drain(engine)
    assert len(ends) == 2 + 2 * MOST_PASSES
    assert order.index(2) == 1 + MOST_PASSES
    assert order == sorted(order, key=lambda uid: (uid == 2 and 2.5 + MOST_PASSES) or uid)  # else as they came


def test_less_memory_than_when_they_came(loaded: LoadedModel, plain: Footprint) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, cache_bytes=2**24, kv_bytes=plain.bytes(1, 1024))
    ends: dict[int, Any] = {}
    engine.submit(1, ask(text_of(loaded, 700), max_tokens=40, **NEVER_STOPS))
    engine.submit(2, ask(text_of(loaded, 700), max_tokens=40, **NEVER_STOPS))
    engine.submit(3, ask("hello", max_tokens=40, **NEVER_STOPS))
    step(engine, ends)
    engine.allow(plain.bytes(1, 512))
    drain(engine, ends)
    assert ends[1].completion_tokens == ends[3].completion_tokens == 40  # what runs goes on
    assert isinstance(ends[2], InsufficientMemory)
    assert ends[2].details["available_bytes"] == plain.bytes(1, 512)
    assert engine.cache is not None
    assert engine.cache.nbytes <= plain.bytes(1, 512)
    assert_empty(engine)


def test_prefixes_that_are_kept_give_way(loaded: LoadedModel, plain: Footprint) -> None:
    limit = plain.bytes(1, 1024)
    engine = Engine(loaded, max_batch=8, prefill_step=256, cache_bytes=2**30, kv_bytes=limit)
    assert engine.cache is not None
    for number in range(4):
        engine.submit(number, ask(f"{number}" + text_of(loaded, 700), max_tokens=5, **NEVER_STOPS))
        while engine.busy:
            engine.step()
            assert engine.cache.nbytes + engine._generator.plain.prompt_cache_nbytes <= limit
    assert engine.cache.nbytes > 0


@pytest.mark.parametrize("seed", [4, 9, 10, 22, 46])
def test_what_is_held_stays_within_the_bound_whoever_comes_and_goes(
    loaded: LoadedModel, plain: Footprint, seed: int
) -> None:
    """Several answers to one prompt are more rows than there are places; some prompts step aside; places stay open."""
    draw = random.Random(seed)
    limit = plain.bytes(draw.choice((2, 3, 5)), draw.choice((300, 600)))
    options = {"max_batch": draw.choice((2, 4)), "prefill_step": draw.choice((32, 128)), "kv_bytes": limit}
    engine = Engine(loaded, prefill_joins=draw.choice((1, 8)), cache_bytes=draw.choice((0, 2**22)), **options)
    ends: dict[int, Any] = {}
    number, most = 0, 0
    while number < 40 or engine.busy:
        if number < 40 and draw.random() < 0.3:
            number += 1
            wished = {"max_tokens": draw.choice((3, 20, 60, 100)), "n": draw.choice((1, 1, 1, 2, 4))}
            request = ask(text_of(loaded, 16 + 4 * draw.randrange(1, 60)), **NEVER_STOPS, **wished)
            request.priority = draw.choice(("interactive", "batch"))
            with contextlib.suppress(InsufficientMemory):
                engine.submit(number, request)
        if engine._decoding.uids and draw.random() < 0.03:
            ends.update(engine.cancel(draw.choice(list(engine._decoding.uids))).ended)
        if engine.busy:
            step(engine, ends)
        rows = engine._generator.plain
        batches = [rows._generation_batch, rows._prompt_batch, rows._patience.batch]
        assert sum(cache.nbytes for batch in batches if batch is not None for cache in batch.prompt_cache) <= limit
        most = max(most, len(rows._generation_batch))
    assert most == options["max_batch"]
    assert_empty(engine)


def test_a_failed_step_gives_its_memory_back(loaded: LoadedModel, plain: Footprint) -> None:
    watched = Watched(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=8, prefill_step=256, kv_bytes=plain.bytes(1, 512))
    for number in range(2):
        engine.submit(number, ask(text_of(loaded, 400), max_tokens=5, **NEVER_STOPS))

    def fault(*_args: Any, **_more: Any) -> None:
        watched.fault = None
        raise RuntimeError("once")

    watched.fault = fault
    ends = drain(engine)
    assert isinstance(ends[0], Exception)
    assert ends[1].completion_tokens == 5  # it waited, and was not in the step that failed
    assert_empty(engine)


# --- whose prompt is read -------------------------------------------------------------------------------------------


class Skimming(Watched):
    """Reads prompts without computing anything: what is looked at is when that happens."""

    def __call__(self, tokens: Any, cache: list[Any], **options: Any) -> Any:
        if tokens.shape[1] == 1:
            return super().__call__(tokens, cache=cache, **options)
        self.calls.append(tokens.shape)
        nothing = mx.zeros((tokens.shape[0], 1, tokens.shape[1], 32))
        for one in cache:
            one.update_and_fetch(nothing, nothing)
        return mx.zeros((*tokens.shape, 400))


@pytest.mark.parametrize("joins", [1, 8])
def test_long_prompts_do_not_hold_up_a_stream(loaded: LoadedModel, joins: int) -> None:
    """While eight prompts of 4,000 tokens come, a stream waits for one step of reading for its next token."""
    watched = Skimming(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=16, prefill_step=512, prefill_joins=joins)
    engine._generator.plain._prefill_rate = 1e9  # as fast as it may
    engine.submit(0, ask("hello", max_tokens=200, **NEVER_STOPS))
    ends: dict[int, Any] = {}
    while not engine._generator.plain.decoding:
        step(engine, ends)
    (stream,) = engine._running.values()
    for number in range(1, 9):
        engine.submit(number, ask(str(number) + text_of(loaded, 4000), max_tokens=2, **NEVER_STOPS))
    gaps, read = [], 0
    while len(ends) < 8:
        before, tokens = len(watched.calls), stream.tokens
        step(engine, ends)
        calls = [count for _, count in watched.calls[before:] if count > 1]
        assert all(count <= 512 for count in calls)
        if stream.tokens > tokens:
            gaps.append(read)
            read = 0
        read += len(calls)
    assert sum(gaps) >= 4000 // 512
    assert max(gaps) == 1


@pytest.mark.parametrize("read", [0, 2])
def test_an_interactive_prompt_goes_before_batch_ones(loaded: LoadedModel, read: int) -> None:
    """Whether the batch ones wait or are being read: the interactive one is read as if it were alone."""
    watched = Watched(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=16, prefill_step=64, prefill_joins=8)
    engine._generator.plain._prefill_rate = 1e9
    ends: dict[int, Any] = {}
    texts = {number: f"{number}" + text_of(loaded, 500 + 20 * number) for number in range(12)}
    wanted = {}
    for number in (1, 10, 11):
        engine.submit(number, ask(texts[number], max_tokens=5, **GREEDY))
        wanted |= {number: drain(engine)[number].text}
    for number in range(10):
        engine.submit(number, ask(texts[number], priority="batch", max_tokens=5, **GREEDY))
    for _ in range(read):
        step(engine, ends)
    before = len(watched.calls)
    for number in (10, 11):
        engine.submit(number, ask(texts[number], max_tokens=5, **GREEDY))
    while engine._generator.plain.urgent:
        step(engine, ends)
    calls = [shape for shape in watched.calls[before:] if shape[1] > 1]
    assert {rows for rows, _ in calls} == {1, 2}  # they differ in length
    assert sum(tokens for _, tokens in calls) < 750
    assert not ends
    assert engine.active == 2 + (8 if read else 0)
    ((_, cancelled),) = engine.cancel(3).ended  # also of those that stepped aside
    assert cancelled.finish_reason == "cancelled"
    drain(engine, ends)
    assert set(ends) == {*range(12)} - {3}
    assert all(ends[number].text == wanted[number] for number in wanted)
    assert not engine._generator.plain._patience


def test_who_waited_for_one_that_stepped_aside_takes_nobodys_place(loaded: LoadedModel) -> None:
    """Of batch prompts, one waits for another that begins alike; that one is cancelled while all are aside."""
    engine = Engine(loaded, max_batch=16, prefill_step=64, prefill_joins=8, cache_bytes=2**24)
    rows = engine._generator.plain
    rows._prefill_rate = 1e9
    text = text_of(loaded, 800)
    ends: dict[int, Any] = {}
    for number, each in ((1, "one" + text), (2, "two" + text)):
        engine.submit(number, ask(each, priority="batch", max_tokens=3, **GREEDY))
    step(engine, ends)
    engine.submit(3, ask("one" + text + " and more", priority="batch", max_tokens=3, **GREEDY))
    step(engine, ends)
    assert rows._waits is not None
    assert len(rows._waits) == 1
    engine.submit(4, ask("four" + text, max_tokens=3, **GREEDY))
    step(engine, ends)
    assert len(rows._patience) == 2
    ends.update(engine.cancel(1).ended)
    for _ in range(3):
        step(engine, ends)
    assert rows._prompt_batch.uids == [engine._decoding.uids[4]]
    for _ in range(200):
        if engine.busy:
            step(engine, ends)
    assert set(ends) == {1, 2, 3, 4}
    plain = Engine(loaded, max_batch=1, prefill_step=64)
    plain.submit(2, ask("two" + text, max_tokens=3, **GREEDY))
    assert ends[2].text == drain(plain)[2].text


def test_interactive_ones_wait_for_memory_before_batch_ones(loaded: LoadedModel, plain: Footprint) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=256, kv_bytes=plain.bytes(1, 512))
    for number, priority in enumerate(["batch", "batch", "batch", "interactive", "interactive"]):
        engine.submit(number, ask(text_of(loaded, 400), priority=priority, max_tokens=3, **NEVER_STOPS))
    assert list(drain(engine)) == [0, 3, 4, 1, 2]


def test_across_lanes_interactive_prompts_are_read_first(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=64)
    for number in range(2):
        engine.submit(number, ask(text_of(loaded, 900), priority="batch", kv_bits=8, max_tokens=3, **NEVER_STOPS))
    ends: dict[int, Any] = {}
    step(engine, ends)
    engine.submit(9, ask(text_of(loaded, 300), max_tokens=3, **NEVER_STOPS))
    lanes = engine._generator
    while lanes.plain.urgent:
        step(engine, ends)
        assert lanes._stepping is lanes._plain
    drain(engine, ends)
    assert list(ends) == [9, 0, 1]
