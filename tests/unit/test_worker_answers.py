"""Several answers to one prompt, on real, tiny models: one prefill, draws of their own, one end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker.answers import join
from mlxd.worker.constraint import MAX_VALUES
from mlxd.worker.engine import Engine
from mlxd.worker.lanes import PLAIN
from mlxd.worker.load import LoadedModel, load
from mlxd_client.codec import MAX_ELEMENTS
from mlxd_client.errors import InsufficientMemory, InternalError, InvalidParams
from support import tiny_model
from support.asking import GREEDY, Collected, alone, ask, drain, texts

pytestmark = pytest.mark.model

DRAWN: dict[str, Any] = {"temperature": 1.2, "top_p": 1.0, "seed": 5, "max_tokens": 12}
LONG = "the quick brown fox jumps over the lazy dog and then it rests " * 4
FAMILIES = ("qwen3", "gemma3_text", "qwen3_next")  # caches that can be cut, windows that slide, states


class Models(dict[str, LoadedModel]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, family: str) -> LoadedModel:
        folder: Path = tiny_model.build(self._folders.mktemp(family), family=family)
        self[family] = load(str(folder), lambda fraction: None)
        return self[family]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory)


@pytest.fixture
def loaded(models: Models) -> LoadedModel:
    return models["qwen3"]


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=16)


class Counting:
    """A model that counts the tokens that it is given, padding included."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.layers = inner.layers
        self.read: list[int] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[1] > 1:
            self.read.append(tokens.size)
        return self.inner(tokens, cache=cache)  # type: ignore[no-any-return]

    def make_cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.inner)


def count_reads(engine: Engine) -> Counting:
    generator: Any = engine._generator.plain
    counting = Counting(generator.model)
    generator.model = generator._prompt_batch.model = generator._generation_batch.model = counting
    return counting


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 28])
def test_each_answer_is_drawn_by_itself_and_the_first_as_ever(models: Models, family: str, cache_bytes: int) -> None:
    engine = Engine(models[family], max_batch=8, prefill_step=16, cache_bytes=cache_bytes)
    one = alone(engine, ask(LONG, **DRAWN))
    several = alone(engine, ask(LONG, n=4, **DRAWN))
    again = alone(engine, ask(LONG, n=3, **DRAWN))
    assert several.text == one.text
    assert len(set(texts(several))) == 4
    assert texts(again) == texts(several)[:3]
    assert several.prompt_tokens == one.prompt_tokens
    assert several.completion_tokens == one.completion_tokens + sum(
        answer.completion_tokens for answer in several.alternatives or ()
    )


def test_the_prompt_is_read_once(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=16)
    counting = count_reads(engine)
    result = alone(engine, ask(LONG, n=6, **DRAWN))
    assert len(texts(result)) == 6
    assert result.prompt_tokens > 64
    assert sum(counting.read) == result.prompt_tokens - 1


def test_cached_tokens_are_those_of_the_prompt(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=16, cache_bytes=1 << 28)
    first = alone(engine, ask(LONG, n=3, **DRAWN))
    assert first.cached_tokens == 0
    counting = count_reads(engine)
    second = alone(engine, ask(LONG, n=3, **DRAWN))
    assert second.cached_tokens == second.prompt_tokens - 1
    assert counting.read == []
    assert texts(second) == texts(first)


def test_requests_that_begin_alike_wait_for_one_prefill_and_answer_apart(loaded: LoadedModel) -> None:
    """Also where the one that waits is given up, which takes all of its answers along."""
    engine = Engine(loaded, max_batch=16, prefill_step=16, cache_bytes=1 << 28)
    counting = count_reads(engine)
    for number in range(3):
        engine.submit(number, ask(LONG, n=3, **DRAWN))
    collected = Collected()
    collected.take(engine.step())
    collected.take(engine.cancel(1))
    drain(engine, collected)
    assert collected.ends[1].finish_reason == "cancelled"
    assert texts(collected.ends[0]) == texts(collected.ends[2])
    assert collected.ends[2].cached_tokens > 64
    assert sum(counting.read) < collected.ends[0].prompt_tokens + 32
    assert (engine.active, engine.waiting) == (0, 0)


@pytest.mark.parametrize("budget", [4096, 1 << 20])
def test_what_is_kept_stays_within_its_bytes_while_answers_wait(loaded: LoadedModel, budget: int) -> None:
    engine = Engine(loaded, max_batch=2, prefill_step=16, cache_bytes=budget)
    assert engine.cache is not None
    for number in range(3):
        engine.submit(number, ask(LONG + str(number), n=5, **DRAWN))
    collected = Collected()
    while engine.busy:
        collected.take(engine.step())
        assert engine.cache.nbytes == 0 or engine.cache.nbytes + engine.cache.tree.live_bytes <= budget
    wide = Engine(loaded, max_batch=16, prefill_step=16)
    assert [texts(collected.ends[number]) for number in range(3)] == [
        texts(alone(wide, ask(LONG + str(number), n=5, **DRAWN))) for number in range(3)
    ]


@pytest.mark.parametrize(
    "options", [{"kv_bits": 8}, {"deterministic": True}, {"context_policy": "rotate"}], ids=lambda one: next(iter(one))
)
def test_where_rows_cannot_share_a_prefill_each_reads_the_prompt(tmp_path: Path, options: dict[str, Any]) -> None:
    loaded = load(str(tiny_model.build(tmp_path / "wide", heads=2)), lambda fraction: None)
    engine = Engine(loaded, max_batch=8, prefill_step=16)
    one = alone(engine, ask(LONG, **DRAWN, **options))
    engine.submit(1, ask("hello", max_tokens=20, **GREEDY))
    engine.submit(0, ask(LONG, n=3, **DRAWN, **options))
    ends = drain(engine).ends
    assert ends[0].text == one.text
    assert len(set(texts(ends[0]))) == 3
    assert ends[0].prompt_tokens == one.prompt_tokens
    assert ends[1].completion_tokens == 20
    engine.submit(0, ask(LONG, n=3, **DRAWN, **options))
    engine.step()
    assert [number for number, _ in engine.cancel(0).ended] == [0]
    assert (engine.active, engine.waiting, engine.busy) == (0, 0, False)


def test_answers_wait_together_until_there_is_memory_for_all(loaded: LoadedModel) -> None:
    one = Engine(loaded, max_batch=8, prefill_step=16)._generator._kinds.footprint(PLAIN).bytes(1, 100)
    engine = Engine(loaded, max_batch=8, prefill_step=16, kv_bytes=4 * one)
    engine.submit(0, ask("hello", n=3, **DRAWN))
    engine.submit(1, ask("a", n=3, **DRAWN))
    assert engine.waiting == 3 + 1
    ends = drain(engine).ends
    assert [len(texts(ends[number])) for number in range(2)] == [3, 3]
    with pytest.raises(InsufficientMemory) as caught:
        engine.submit(2, ask("hello", n=5, **DRAWN))
    assert caught.value.details["needed_bytes"] > caught.value.details["available_bytes"] == 4 * one
    engine.submit(3, ask("hello", n=3, **DRAWN))
    engine.submit(4, ask("hello", n=3, **DRAWN))
    engine.cancel(4)
    engine.allow(one)
    engine.cancel(3)
    engine.submit(5, ask("hello", **DRAWN))
    engine.allow(1)
    assert isinstance(drain(engine).ends.get(5, InsufficientMemory("")), InsufficientMemory | Generated)
    assert (engine.active, engine.waiting, engine.busy) == (0, 0, False)


def test_guessing_ahead_changes_none_of_the_answers(engine: Engine) -> None:
    """Nor where one comes to be alone, and xtc draws besides."""
    said = "one two three one two three one two three one two"
    options = {**DRAWN, "max_tokens": 40, "temperature": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.01}
    plain = alone(engine, ask(said, speculation="off", n=3, **options))
    assert texts(alone(engine, ask(said, speculation="lookup", n=3, **options))) == texts(plain)
    one = alone(engine, ask(said, speculation="lookup", **options))
    assert one.speculation is not None, "nothing was guessed"
    assert one.text == plain.text


def test_prompts_of_one_token_are_answered_several_times(loaded: LoadedModel) -> None:
    bare = LoadedModel(loaded.model, loaded.tokenizer, loaded.context_length, loaded.vocabulary)
    engine = Engine(bare, max_batch=8, prefill_step=16)
    engine._prompts._encode = lambda text, *, special: [7]  # type: ignore[method-assign]
    assert len(set(texts(alone(engine, ask("x", n=5, **DRAWN))))) == 5


def test_temperature_zero_makes_them_alike(engine: Engine) -> None:
    result = alone(engine, ask("hello", n=3, max_tokens=10, **GREEDY))
    assert len(set(texts(result))) == 1
    assert len(texts(result)) == 3


def test_more_answers_than_the_batch_holds(loaded: LoadedModel) -> None:
    wide = Engine(loaded, max_batch=32, prefill_step=16)
    narrow = Engine(loaded, max_batch=2, prefill_step=16, prefill_joins=1)
    wanted = texts(alone(wide, ask(LONG, n=9, **DRAWN)))
    narrow.submit(0, ask(LONG, n=9, **DRAWN))
    narrow.submit(1, ask("hello", max_tokens=5, **GREEDY))
    ends = drain(narrow).ends
    assert texts(ends[0]) == wanted
    assert ends[1].completion_tokens == 5
    assert (narrow.active, narrow.waiting) == (0, 0)


def test_they_share_the_batch_with_others(engine: Engine) -> None:
    wanted = [texts(alone(engine, ask(text, n=2, **DRAWN))) for text in ("hello", "a")]
    plain = alone(engine, ask("numbers", max_tokens=30, **GREEDY)).text
    collected = Collected()
    engine.submit(7, ask("numbers", max_tokens=30, **GREEDY))
    for _ in range(3):
        collected.take(engine.step())
    for number, text in enumerate(("hello", "a")):
        engine.submit(number, ask(text, n=2, **DRAWN))
    drain(engine, collected)
    assert [texts(collected.ends[number]) for number in range(2)] == wanted
    assert collected.ends[7].text == plain


def test_what_streams_is_what_each_answer_is(engine: Engine) -> None:
    engine.submit(3, ask("hello", n=3, stop=["zzz"], **DRAWN))
    collected = drain(engine)
    for number, text in enumerate(texts(collected.ends[3])):
        assert collected.pieces.get((3, number), "") == text


def test_each_answer_has_its_own_reports_and_stops(engine: Engine) -> None:
    plain = alone(engine, ask("hello", n=3, **DRAWN))
    stop = texts(plain)[1][3:6]
    result = alone(engine, ask("hello", n=3, logprobs=2, stop=[stop], **DRAWN))
    for text, whole in zip(texts(result), texts(plain), strict=True):
        assert text == whole.partition(stop)[0]
    reports = [[entry["token_id"] for entry in answer.logprobs or ()] for answer in result.alternatives or ()]
    assert [len(report) for report in reports] == [answer.completion_tokens for answer in result.alternatives or ()]
    assert reports[0] != reports[1]


def test_each_answer_follows_the_rule_by_itself(engine: Engine) -> None:
    request = ask("hello", n=3, schema={"enum": ["red", "green", "blue", "black"]}, temperature=3.0, seed=4, top_p=1.0)
    result = alone(engine, request)
    values = [result.structured, *(answer.structured for answer in result.alternatives or ())]
    assert all(value in ("red", "green", "blue", "black") for value in values)
    assert [f'"{value}"' for value in values] == texts(result)


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 12])
def test_cancel_ends_all_at_any_moment(loaded: LoadedModel, steps: int) -> None:
    engine = Engine(loaded, max_batch=3, prefill_step=16)
    engine.submit(0, ask(LONG, n=5, temperature=1.0, max_tokens=200))
    engine.submit(1, ask("hello", max_tokens=8, **GREEDY))
    collected = Collected()
    for _ in range(steps):
        collected.take(engine.step())
    collected.take(engine.cancel(0))
    assert collected.ends[0].finish_reason == "cancelled"
    assert collected.ends[0].text == collected.pieces.get((0, 0), "")
    assert engine.cancel(0).ended == []
    drain(engine, collected)
    assert collected.ends[1].completion_tokens == 8
    assert (engine.active, engine.waiting) == (0, 0)


def test_an_answer_that_fails_fails_the_request_and_nobody_else(engine: Engine, loaded: LoadedModel) -> None:
    engine.submit(0, ask("hello", n=3, **DRAWN))
    engine.submit(1, ask("hello", max_tokens=12, **GREEDY))
    collected = Collected()
    while engine.active < 4:
        collected.take(engine.step())

    def broken(_context: mx.array, _logits: mx.array) -> mx.array:
        raise ZeroDivisionError("in a processor")

    batch = engine._generator.plain._generation_batch
    second = engine._decoding.several[0].uids[1]
    batch.logits_processors[batch.uids.index(second)] = (broken,)
    drain(engine, collected)
    assert isinstance(collected.ends[0], InternalError)
    assert collected.ends[1].text == alone(engine, ask("hello", max_tokens=12, **GREEDY)).text
    assert (engine.active, engine.waiting) == (0, 0)


def test_a_step_that_raises_ends_the_request_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.submit(0, ask("hello", n=3, **DRAWN))
    engine.step()

    def fail() -> Any:
        raise RuntimeError("the kernel failed")

    with monkeypatch.context() as failing:
        failing.setattr(engine._generator, "next", fail)
        collected = Collected()
        collected.take(engine.step())
    assert isinstance(collected.ends[0], InternalError)
    assert len(texts(alone(engine, ask("hello", n=2, **DRAWN)))) == 2


@pytest.mark.parametrize("n", [0, 17, -1, True, "2"])
def test_how_many_is_checked(engine: Engine, n: Any) -> None:
    with pytest.raises(InvalidParams) as caught:
        engine.submit(0, ask("hello", n=n))
    assert caught.value.details["field"] == "n"


# --- what one result can hold ---------------------------------------------------------------------------------------


def test_reports_that_no_frame_could_hold_are_refused_or_fitted(models: Models) -> None:
    loaded = models["qwen3"]
    wide = LoadedModel(loaded.model, loaded.tokenizer, 1_000_000, loaded.vocabulary)
    engine = Engine(wide, max_batch=4, prefill_step=16)
    with pytest.raises(InvalidParams) as caught:
        engine.submit(0, ask("hello", logprobs=20, max_tokens=100_000))
    assert caught.value.details["field"] == "logprobs"
    limit = caught.value.details["limit"]
    assert str(limit) in caught.value.message
    engine.submit(0, ask("hello", logprobs=20, max_tokens=limit))
    engine.submit(1, ask("hello", logprobs=20))
    assert [running.choices.max_tokens for running in engine._running.values()] == [limit, limit]
    assert limit * (9 + 3 * 20) < MAX_ELEMENTS
    with pytest.raises(InvalidParams) as caught:
        engine.submit(2, ask("hello", logprobs=20, max_tokens=limit, schema=True))
    assert caught.value.details["limit"] * (9 + 3 * 20) + MAX_VALUES < MAX_ELEMENTS
    with pytest.raises(InvalidParams) as caught:
        engine.submit(3, ask("hello", logprobs=0, max_tokens=10_000, n=4))
    assert caught.value.details["limit"] * 4 * 9 < MAX_ELEMENTS


def test_parsed_values_fit_into_one_result_together() -> None:
    big = Generated(
        text="x", finish_reason="stop", prompt_tokens=1, completion_tokens=1, structured=[1] * (MAX_VALUES - 1)
    )
    joined = join([big, big, big])
    assert joined.structured == big.structured
    assert [answer.structured for answer in joined.alternatives or ()] == [None, None]
    assert [answer.text for answer in joined.alternatives or ()] == ["x", "x"]


def test_process_takes_several_answers_too(engine: Engine) -> None:
    request = Generate(kind="process", messages=[{"role": "user", "content": "hello"}], options={"n": 2, **DRAWN})
    assert len(set(texts(alone(engine, request)))) == 2
