"""Prompts that begin alike on real, tiny models of several families: less is computed, and the same comes out."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.prompt import PromptBuilder
from mlxd_client.errors import InternalError, Unsupported
from support import tiny_model
from support.families import FAMILIES
from support.mix import held_bytes

pytestmark = pytest.mark.model

# Whose caches can be cut at any token; and those whose cannot, at one place or from some length on.
TRIMMABLE = ("qwen3", "llama", "mistral", "phi3", "qwen3_moe")
GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "logprobs": 0}
AMPLE = 1 << 28
SYSTEM = "the quick brown fox jumps over the lazy dog and then it rests " * 3
# What the template writes behind the last turn, in tokens, is computed anew where caches cannot be cut.
ASKING = 12

Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    return Models(tmp_path_factory)


class Models(dict[str, LoadedModel]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, family: str) -> LoadedModel:
        folder = tiny_model.build(self._folders.mktemp(family), family=family, context=4096)
        self[family] = load(str(folder), lambda fraction: None)
        self[family].tokenizer.eos_token_ids = []  # answers have the length that is asked for
        return self[family]


def make(loaded: LoadedModel, cache_bytes: int = AMPLE, **limits: int) -> Engine:
    return Engine(loaded, **{"max_batch": 8, "prefill_step": 32, "prefill_joins": 1} | limits, cache_bytes=cache_bytes)


def turns(*contents: str, system: str | None = SYSTEM) -> Messages:
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def ask(engine: Engine, number: int, messages: Messages, tokens: int = 12, **options: Any) -> None:
    engine.submit(number, Generate(kind="chat", messages=messages, options=GREEDY | {"max_tokens": tokens} | options))


def step(engine: Engine, ends: dict[int, Any]) -> None:
    ends.update(engine.step().ended)
    assert_within_budget(engine)


def drain(engine: Engine, ends: dict[int, Any] | None = None) -> dict[int, Any]:
    ends = {} if ends is None else ends
    while engine.busy:
        step(engine, ends)
    return ends


def assert_within_budget(engine: Engine) -> None:
    if engine.cache is not None and engine.cache.tree.nbytes:
        held = engine.cache.tree.nbytes + engine._generator.plain.prompt_cache_nbytes
        assert held <= engine.cache.tree.budget_bytes


def answer(engine: Engine, messages: Messages, tokens: int = 12, **options: Any) -> Generated:
    ask(engine, 0, messages, tokens, **options)
    return drain(engine)[0]  # type: ignore[no-any-return]


def assert_same(got: Generated, wanted: Generated) -> None:
    """Token for token, and by the same margins."""
    assert got.logprobs is not None
    assert wanted.logprobs is not None
    assert [entry["token_id"] for entry in got.logprobs] == [entry["token_id"] for entry in wanted.logprobs]
    margins = zip(got.logprobs, wanted.logprobs, strict=True)
    assert all(abs(one["logprob"] - other["logprob"]) < 0.01 for one, other in margins)
    assert (got.text, got.prompt_tokens) == (wanted.text, wanted.prompt_tokens)


# --- all families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_where_it_was(models: dict[str, LoadedModel], family: str) -> None:
    engine, plain = make(models[family]), make(models[family], cache_bytes=0)
    messages = turns("numbers like 1 2 3")
    before = 0
    for turn in range(3):
        got, wanted = answer(engine, messages), answer(plain, messages)
        assert_same(got, wanted)
        assert wanted.cached_tokens == 0
        assert got.cached_tokens >= before
        before = got.prompt_tokens - ASKING
        messages = [*messages, {"role": "assistant", "content": got.text}]
        messages.append({"role": "user", "content": f"and then {turn}"})
    assert engine.cache is not None
    assert (engine.cache.hits, engine.cache.misses) == (2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_made_anew_reads_nothing_anew(models: dict[str, LoadedModel], family: str) -> None:
    engine = make(models[family])
    first = answer(engine, turns("hello"))
    again = answer(engine, turns("hello"))
    assert_same(again, first)
    assert again.cached_tokens == again.prompt_tokens - (1 if family in TRIMMABLE else ASKING)


@pytest.mark.parametrize("joins", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_with_one_system_prompt(models: dict[str, LoadedModel], family: str, joins: int) -> None:
    engine, plain = make(models[family], prefill_joins=joins), make(models[family], cache_bytes=0)
    shared = answer(engine, turns("warm up")).prompt_tokens - 40
    questions = [turns("monday " * (1 + 3 * number)) for number in range(8)]
    ends: dict[int, Any] = {}
    for number, messages in enumerate(questions):
        ask(engine, number, messages, 10 + number)
        step(engine, ends)  # they join while others decode, and while others are read
    drain(engine, ends)
    for number, messages in enumerate(questions):
        assert_same(ends[number], answer(plain, messages, 10 + number))
        assert ends[number].cached_tokens >= shared > 30


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cancelled_reading_is_gone_on_with(models: dict[str, LoadedModel], family: str) -> None:
    engine, plain = make(models[family]), make(models[family], cache_bytes=0)
    messages = turns("so i think we should meet on monday " * 20, system=None)
    ask(engine, 1, messages)
    for _ in range(3):
        engine.step()
    assert engine.cancel(1).ended[0][1].finish_reason == "cancelled"  # type: ignore[union-attr]
    got = answer(engine, messages)
    assert 32 <= got.cached_tokens < got.prompt_tokens - ASKING
    assert_same(got, answer(plain, messages))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "falcon_h1"])
def test_what_a_cancelled_answer_had_is_gone_on_with(models: dict[str, LoadedModel], family: str) -> None:
    engine, plain = make(models[family]), make(models[family], cache_bytes=0)
    ask(engine, 1, turns("hello"), 200)
    ask(engine, 2, turns("others"), 30)
    for _ in range(12):
        engine.step()
    text = engine.cancel(1).ended[0][1].text  # type: ignore[union-attr]
    drain(engine)
    messages = turns("hello", text, "go on")
    got = answer(engine, messages)
    assert got.cached_tokens > 40
    assert_same(got, answer(plain, messages))


def test_prompts_are_cut_after_the_system_turn_and_after_the_last_one(models: dict[str, LoadedModel]) -> None:
    tokenizer = models["qwen3"].tokenizer
    builder = PromptBuilder(tokenizer, 4096, 400)

    def texts(messages: Messages) -> list[str]:
        prompt = builder.build("chat", messages, thinking=False, cut=True)
        return [tokenizer.decode(prompt.tokens[:cut]) for cut in prompt.cuts]

    system, asked = "<|im_start|>system\nbe brief<|im_end|>\n", "<|im_start|>user\nhello<|im_end|>\n"
    assert texts(turns("hello", system="be brief")) == [system + "<|im_start|>user\n", system + asked]
    answered = asked + "<|im_start|>assistant\nyes<|im_end|>\n" + asked
    assert texts(turns("hello", "yes", "hello", system=None)) == [answered]
    assert builder.build("chat", turns("hello"), thinking=False).cuts == ()


def test_a_second_turn_comes_at_a_fraction(tmp_path: Path) -> None:
    folder = tiny_model.build(tmp_path / "wider", hidden=192, layers=3, context=4096)
    loaded = load(str(folder), lambda fraction: None)
    engine, plain = make(loaded, prefill_step=128), make(loaded, cache_bytes=0, prefill_step=128)
    messages = turns("so i think we should meet on monday " * 130)
    for each in (engine, plain):
        each.warm_up()
    first = answer(engine, messages)
    assert first.prompt_tokens > 2_000
    messages = [*messages, {"role": "assistant", "content": first.text}]
    seconds = [[*messages, {"role": "user", "content": f"{turn} and then"}] for turn in range(3)]
    cold = answer(plain, seconds[0])
    again = [answer(engine, second) for second in seconds]
    assert_same(again[0], cold)
    # A busy machine may well disturb one of them.
    assert statistics.median(each.timings.first_token_s for each in again) <= 0.08 * cold.timings.first_token_s


# --- prompts that wait for one that begins alike ----------------------------------------------------------------------

LONG = SYSTEM * 4


@pytest.mark.parametrize("joins", [1, 8])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mamba2"])
def test_of_eight_at_once_one_reads_what_they_share(models: dict[str, LoadedModel], family: str, joins: int) -> None:
    engine, plain = make(models[family], prefill_joins=joins), make(models[family], cache_bytes=0)
    questions = [turns(f"{number} monday", system=LONG) for number in range(8)]
    for number, messages in enumerate(questions):
        ask(engine, number, messages)
    assert engine.waiting == 8
    step(engine, {})
    assert (engine.active, engine.waiting) == (1, 7)
    ends = drain(engine)
    assert sorted(end.cached_tokens > 200 for end in ends.values()) == [False] + 7 * [True]
    for number in (0, 7):
        assert_same(ends[number], answer(plain, questions[number]))


def test_who_is_waited_for_may_go(models: dict[str, LoadedModel]) -> None:
    engine, plain = make(models["qwen3"]), make(models["qwen3"], cache_bytes=0)
    questions = [turns(f"{number} monday", system=LONG) for number in range(4)]
    for number, messages in enumerate(questions):
        ask(engine, number, messages)
    step(engine, {})
    engine.cancel(0)  # it is read,
    engine.cancel(2)  # it waits
    ends = drain(engine)
    assert ends.keys() == {1, 3}
    assert ends[1].cached_tokens >= 32  # what the first one had read
    assert ends[3].cached_tokens > 200
    assert_same(ends[3], answer(plain, questions[3]))


def test_nobody_waits_for_longer_than_it_saves(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"])
    ask(engine, 0, turns("monday " * 500))
    step(engine, {})
    ask(engine, 1, turns("tuesday"))
    ask(engine, 2, turns("monday " * 400), cache_prompt=False)
    step(engine, {})
    step(engine, {})
    assert (engine.active, engine.waiting) == (3, 0)
    assert [drain(engine)[number].cached_tokens for number in (2,)] == [0]


# --- what is kept, and what is not ------------------------------------------------------------------------------------


def test_others_use_a_prompt_while_its_answer_is_made(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"])
    ask(engine, 1, turns("hello"), 200)
    for _ in range(12):
        engine.step()
    ask(engine, 2, turns("hello"), 5)
    ends: dict[int, Any] = {}
    while 2 not in ends:
        step(engine, ends)
    assert ends[2].cached_tokens == ends[2].prompt_tokens - 1


def test_windows_that_have_not_slid_are_cut_at_any_token(models: dict[str, LoadedModel]) -> None:
    engine = make(models["gemma3_text"])
    first = answer(engine, turns("a b c d e", system=None), 3)
    assert first.prompt_tokens + first.completion_tokens < 32
    got = answer(engine, turns("a b c d f", system=None), 3)
    assert got.cached_tokens >= 6
    assert_same(got, answer(make(models["gemma3_text"], cache_bytes=0), turns("a b c d f", system=None), 3))


@pytest.mark.parametrize("family", ["qwen3", "mamba2"])
def test_who_says_so_neither_reads_nor_keeps(models: dict[str, LoadedModel], family: str) -> None:
    engine = make(models[family])
    answer(engine, turns("private"), cache_prompt=False)
    ask(engine, 1, turns("private"), cache_prompt=False)
    engine.step()
    engine.cancel(1)
    assert not engine.busy
    assert engine.cache is not None
    assert (engine.cache.nbytes, engine.cache.hits, engine.cache.misses) == (0, 0, 0)
    assert answer(engine, turns("private"), cache_prompt=True).cached_tokens == 0
    assert answer(engine, turns("private"), cache_prompt=False).cached_tokens == 0
    assert answer(engine, turns("private")).cached_tokens > 0


def test_nothing_is_kept_where_nothing_may_be(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"], cache_bytes=0)
    assert engine.cache is None
    with pytest.raises(Unsupported, match="no prompt caches"):
        ask(engine, 1, turns("hello"), cache_prompt=True)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "falcon_h1"])
def test_a_small_budget_holds_while_batches_grow(models: dict[str, LoadedModel], family: str) -> None:
    ample, plain = make(models[family]), make(models[family], cache_bytes=0)
    answer(ample, turns("hello", system=None), 40)
    assert ample.cache is not None
    engine = make(models[family], cache_bytes=ample.cache.nbytes * 20)
    assert engine.cache is not None
    ends: dict[int, Any] = {}
    most = 0
    for number in range(24):
        ask(engine, number, turns(f"{number} monday " * (1 + number), system=None), 20 + 2 * number)
        for _ in range(5):
            step(engine, ends)
            most = max(most, engine.cache.nbytes)
    drain(engine, ends)
    for number in (3, 23):
        wanted = answer(plain, turns(f"{number} monday " * (1 + number), system=None), 20 + 2 * number)
        assert_same(ends[number], wanted)
    assert most > 0


def test_what_is_dropped_is_given_back(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"])
    assert engine.cache is not None
    answer(engine, turns("hello"))
    engine.cache.tree.clear()
    before = held_bytes()
    for number in range(8):
        ask(engine, number, turns(f"{number} hello " * 30))
    drain(engine)
    kept = engine.cache.nbytes
    assert 0.9 * kept < held_bytes() - before < 1.1 * kept + 65_536
    engine.cache.tree.fit(AMPLE)
    assert engine.cache.nbytes == 0
    assert held_bytes() - before < 65_536


def test_a_batch_that_fails_leaves_nothing_behind(
    models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = make(models["qwen3"]), make(models["qwen3"], cache_bytes=0)
    assert engine.cache is not None
    first = answer(engine, turns("hello"))
    kept = engine.cache.nbytes
    ask(engine, 1, turns("others " * 20), 50)
    ask(engine, 2, turns("more"), 50)
    for _ in range(3):
        engine.step()
    kept = engine.cache.nbytes
    engine.cancel(2)  # what it had waits to be kept
    assert engine.cache.pending
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache.tree, "add", lambda *arguments: fail())
        ends = dict(engine.step().ended)
    assert isinstance(ends[1], InternalError)
    assert not engine.busy
    assert engine.cache.nbytes == kept
    assert_same(answer(engine, turns("hello")), first)
    assert_same(answer(engine, turns("more")), answer(plain, turns("more")))


def fail() -> None:
    raise RuntimeError("the device failed")


def test_a_seed_gives_the_same_text_from_a_kept_prefix(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"])
    options = {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.3}
    first = answer(engine, turns("tell me"), 20, **options)
    again = answer(engine, turns("tell me"), 20, **options)
    assert again.cached_tokens > 0
    assert_same(again, first)


def test_stats_tell_what_was_saved(models: dict[str, LoadedModel]) -> None:
    engine = make(models["qwen3"])
    assert engine.cache is not None
    answer(engine, turns("hello"))
    got = answer(engine, turns("hello"))
    stats = engine.cache.stats()
    assert (stats.hits, stats.misses, stats.saved_tokens) == (1, 1, got.cached_tokens)
    assert stats.bytes == engine.cache.nbytes > 0
