"""Lanes on real, tiny models: quantised caches, rotating windows, deterministic answers, side by side and in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from mlxd.worker.engine import Engine
from mlxd.worker.lanecaches import KEPT_TOKENS, Footprint, LaneKey
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import InternalError, InvalidParams, Unsupported
from support import tiny_model
from support.engines import GREEDY, Watched, answer, ask, drain, step

pytestmark = pytest.mark.model

TEXTS = ["hello", "the quick brown fox", "So I think we should meet on Monday at 3 PM", "numbers 1 2 3", "a"]
SHAPE: dict[str, Any] = {"heads": 2, "kv_heads": 1}  # heads are 32 wide: the least that MLX quantises


class Models(dict[str, LoadedModel]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, name: str) -> LoadedModel:
        family, _, more = name.partition("-")
        options = dict(SHAPE) if more != "narrow" else {}
        if more == "4bit":
            options["quantize"] = 4
        folder = tiny_model.build(self._folders.mktemp("models") / name, family=family, **options)
        self[name] = load(str(folder), lambda fraction: None)
        return self[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory)


@pytest.fixture
def loaded(models: Models) -> LoadedModel:
    return models["qwen3"]


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=16)


def prompt_of(loaded: LoadedModel, text: str) -> list[int]:
    made: list[int] = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=False
    )
    return made


def mlx_lms(loaded: LoadedModel, text: str, tokens: int, caches: list[Any]) -> str:
    """What mlx_lm says greedily on caches of its own."""
    prompt = prompt_of(loaded, text)
    made = stream_generate(loaded.model, loaded.tokenizer, prompt, max_tokens=tokens, prompt_cache=caches)
    return "".join(part.text for part in made)


def layers(loaded: LoadedModel) -> int:
    return len(loaded.model.layers)


# --- quantised caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_rows_decode_together_as_mlx_lm_does_alone(loaded: LoadedModel, engine: Engine, bits: int) -> None:
    ends: dict[int, Any] = {}
    for number, text in enumerate(TEXTS):
        engine.submit(number, ask(text, kv_bits=bits, max_tokens=8 + 9 * number, logprobs=0, **GREEDY))
        for _ in range(number):  # they join at different depths of each other
            step(engine, ends)
    assert engine.active > 1
    drain(engine, ends)
    for number, text in enumerate(TEXTS):
        caches = [QuantizedKVCache(group_size=32, bits=bits) for _ in range(layers(loaded))]
        assert ends[number].text == mlx_lms(loaded, text, 8 + 9 * number, caches)
        assert not ends[number].alone
        assert ends[number].cached_tokens == 0
    plain = answer(engine, TEXTS[0], max_tokens=8, logprobs=0, **GREEDY)
    assert ends[0].logprobs != plain.logprobs  # it makes a difference


def test_quantised_and_plain_rows_side_by_side(engine: Engine) -> None:
    wanted = {
        (text, bits): answer(engine, text, max_tokens=20, **({"kv_bits": bits} if bits else {}), **GREEDY).text
        for text in TEXTS
        for bits in (0, 4, 8)
    }
    for number, (text, bits) in enumerate(wanted):
        engine.submit(number, ask(text, max_tokens=20, **({"kv_bits": bits} if bits else {}), **GREEDY))
        engine.step()
    ends = drain(engine)
    assert [ends[number].text for number in range(len(wanted))] == list(wanted.values())


def test_a_quantised_row_of_another_length_leaves_and_stays(engine: Engine) -> None:
    wanted = [answer(engine, text, kv_bits=8, max_tokens=30, **GREEDY).text for text in TEXTS]
    ends: dict[int, Any] = {}
    for number, text in enumerate(TEXTS):
        engine.submit(number, ask(text, kv_bits=8, max_tokens=30, **GREEDY))
    while not engine._generator._lanes[-1].rows.decoding:
        step(engine, ends)
    for _ in range(5):
        step(engine, ends)
    engine.cancel(2)  # the longest one: what it was padded for is taken back
    drain(engine, ends)
    assert [ends[number].text for number in (0, 1, 3, 4)] == [wanted[number] for number in (0, 1, 3, 4)]


def test_the_setting_stands_for_requests_that_say_nothing(loaded: LoadedModel, engine: Engine) -> None:
    wanted = answer(engine, TEXTS[2], kv_bits=4, max_tokens=20, **GREEDY).text
    assert (
        answer(Engine(loaded, max_batch=2, prefill_step=16, kv_bits=4), TEXTS[2], max_tokens=20, **GREEDY).text
        == wanted
    )


@pytest.mark.parametrize(
    ("model", "options", "option"),
    [
        ("qwen3-narrow", {"kv_bits": 8}, "kv_bits"),
        ("gemma3_text", {"kv_bits": 8}, "kv_bits"),
        ("mamba2", {"kv_bits": 4}, "kv_bits"),
        ("gemma3_text", {"context_policy": "rotate"}, "context_policy"),
        ("mamba2", {"context_policy": "rotate"}, "context_policy"),
        ("qwen3", {"kv_bits": 8, "context_policy": "rotate"}, "kv_bits"),
        ("qwen3", {"kv_bits": 8, "cache_prompt": True}, "cache_prompt"),
        ("qwen3", {"deterministic": True, "cache_prompt": True}, "cache_prompt"),
    ],
)
def test_what_a_model_cannot_have_is_refused_by_name(
    models: Models, model: str, options: dict[str, Any], option: str
) -> None:
    engine = Engine(models[model], max_batch=2, prefill_step=16, cache_bytes=2**24)
    for _ in range(2):  # what was found out is known the second time
        with pytest.raises(Unsupported) as caught:
            engine.submit(1, ask("hello", **options))
        assert caught.value.details["option"] == option
    assert not engine.busy


def test_values_that_are_none(engine: Engine) -> None:
    for options in ({"kv_bits": 3}, {"context_policy": "spin"}, {"deterministic": 1}):
        with pytest.raises(InvalidParams) as caught:
            engine.submit(1, ask("hello", **options))
        assert caught.value.details["field"] in options


# --- rotating windows -----------------------------------------------------------------------------------------------


def test_an_answer_goes_on_beyond_the_context_as_mlx_lms_does(models: Models) -> None:
    loaded = replace(models["qwen3"], context_length=64)
    engine = Engine(loaded, max_batch=4, prefill_step=16)
    engine.submit(1, ask("hello", context_policy="rotate", max_tokens=150, **GREEDY))
    engine.submit(2, ask("the quick", context_policy="rotate", max_tokens=120, **GREEDY))
    engine.submit(3, ask("numbers", max_tokens=150, **GREEDY))
    ends = drain(engine)
    for number, text, tokens in ((1, "hello", 150), (2, "the quick", 120)):
        caches = [RotatingKVCache(64, keep=KEPT_TOKENS) for _ in range(layers(loaded))]
        assert ends[number].text == mlx_lms(loaded, text, tokens, caches)
        assert ends[number].completion_tokens == tokens
        assert ends[number].alone
    assert ends[3].completion_tokens == 64 - ends[3].prompt_tokens  # without it the context is the end
    assert not ends[3].alone


def test_a_window_takes_no_more_memory_than_the_context(models: Models) -> None:
    loaded = replace(models["qwen3"], context_length=256)
    kinds = Engine(loaded, max_batch=1, prefill_step=16)._generator._kinds
    rotating, plain = kinds.footprint(LaneKey(rotate=True)), kinds.footprint(LaneKey())
    assert rotating.bytes(1, 100_000) == 256 * plain.per_token


# --- deterministic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["qwen3", "qwen3-4bit", "gemma3_text"])
def test_deterministic_answers_are_the_same_alone_and_amid_others(models: Models, model: str) -> None:
    loaded = models[model]
    text = " ".join(TEXTS)  # several steps of reading
    options: dict[str, Any] = {"deterministic": True, "temperature": 1.0, "top_p": 0.9, "max_tokens": 15, "logprobs": 3}
    fresh = Engine(loaded, max_batch=8, prefill_step=128, cache_bytes=2**24)
    first = answer(fresh, text, seed=5, **options)
    assert first.alone

    engine = Engine(loaded, max_batch=8, prefill_step=16, cache_bytes=2**24)
    ends: dict[int, Any] = {}
    for number in range(4):
        engine.submit(number, ask(text[number:], seed=number, max_tokens=20 + number))
        step(engine, ends)
    engine.submit(10, ask(text, seed=5, **options))
    engine.submit(11, ask(text, seed=6, **options))
    engine.submit(12, ask(text, seed=5, **options))
    for number in range(20, 22):
        step(engine, ends)
        engine.submit(number, ask("more of them", max_tokens=20, **({"kv_bits": 8} if model == "qwen3" else {})))
    engine.cancel(3)
    drain(engine, ends)
    for number in (10, 12):
        assert ends[number].text == first.text
        assert ends[number].logprobs == first.logprobs
    assert ends[11].text != first.text


def test_deterministic_without_a_seed_is_with_seed_0(engine: Engine) -> None:
    options: dict[str, Any] = {"deterministic": True, "temperature": 1.2, "max_tokens": 20}
    assert answer(engine, "tell me", **options).text == answer(engine, "tell me", seed=0, **options).text
    assert answer(engine, "tell me", **options).text != answer(engine, "tell me", seed=1, **options).text


def test_deterministic_rows_meet_the_same_shapes(loaded: LoadedModel) -> None:
    watched = Watched(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=8, prefill_step=16)
    prompt = len(prompt_of(loaded, " ".join(TEXTS)))
    answer(engine, " ".join(TEXTS), deterministic=True, max_tokens=3, **GREEDY)
    seen = watched.calls[2:]  # after the two that find out about its caches
    assert [tokens for _, tokens in seen if tokens > 1] == [*([64] * ((prompt - 1) // 64)), (prompt - 1) % 64]
    assert {rows for rows, _ in seen} == {1}


# --- turns ----------------------------------------------------------------------------------------------------------


def test_lanes_that_decode_take_turns(engine: Engine) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"kv_bits": 4},
        {"kv_bits": 8},
        {"context_policy": "rotate"},
        {"deterministic": True},
    ]
    for number, options in enumerate(kinds):
        engine.submit(number, ask("hello", max_tokens=200, temperature=0, logit_bias={"2": -1000}, **options))
    while engine._generator.active < len(kinds) or any(not lane.rows.decoding for lane in engine._generator._lanes):
        engine.step()
    order = []
    for _ in range(30):
        engine.step()
        order.append(id(engine._generator._stepping))
    for start in range(25):
        assert len(set(order[start : start + 5])) == 5
    for number in range(len(kinds)):
        engine.cancel(number)
    assert not engine.busy


def test_empty_lanes_are_gone(engine: Engine) -> None:
    for number, options in enumerate(({"kv_bits": 4}, {"deterministic": True}, {"context_policy": "rotate"})):
        engine.submit(number, ask("hello", max_tokens=5 + number, **options))
    for _ in range(3):
        engine.step()
    engine.cancel(2)
    drain(engine)
    lanes = engine._generator
    assert list(lanes._lanes) == [lanes._plain]
    assert lanes._homes == {}
    assert not lanes._owed
    assert lanes.plain.may_read
    assert engine.active == engine.waiting == 0


def test_reading_in_one_lane_does_not_stop_another(loaded: LoadedModel) -> None:
    """Between two tokens of a stream prompts are read at most once, however many lanes read."""
    watched = Watched(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=8, prefill_step=8)
    long = " ".join(TEXTS * 3)
    for kind in ({"kv_bits": 4}, {"kv_bits": 8}, {"context_policy": "rotate"}):
        engine._generator.check(LaneKey(kind.get("kv_bits", 0), "context_policy" in kind))  # type: ignore[arg-type]
    alone = {"speculation": "off"}  # what a pass checks that was guessed looks like reading
    engine.submit(0, ask("hello", max_tokens=150, temperature=0, logit_bias={"2": -1000}, **alone))
    ends: dict[int, Any] = {}
    for _ in range(5):
        step(engine, ends)
    for number, kind in enumerate((alone, {"kv_bits": 4}, {"kv_bits": 8}, {"context_policy": "rotate"})):
        for more in range(2):
            engine.submit(1 + 2 * number + more, ask(long, max_tokens=3, **kind, **GREEDY))  # type: ignore[arg-type]
    gaps, reads, mine = [], 0, engine._generator._plain
    while len(ends) < 8:
        before = len(watched.calls)
        step(engine, ends)
        calls = [tokens for _, tokens in watched.calls[before:]]
        if engine._generator._stepping is mine and 0 not in ends:
            gaps.append(reads)
            reads = 0
        reads += sum(tokens > 1 for tokens in calls)
    assert max(gaps) == 1
    drain(engine, ends)


def test_a_failed_step_costs_its_own_lane_only(loaded: LoadedModel) -> None:
    watched = Watched(loaded.model)
    engine = Engine(replace(loaded, model=watched), max_batch=8, prefill_step=16)
    wanted = answer(engine, "hello", max_tokens=20, **GREEDY).text
    engine.submit(1, ask("hello", max_tokens=20, **GREEDY))
    engine.submit(2, ask("hello", max_tokens=20, kv_bits=8, **GREEDY))
    engine.submit(3, ask("the quick", max_tokens=20, kv_bits=8, **GREEDY))
    ends: dict[int, Any] = {}
    for _ in range(8):
        step(engine, ends)

    def fault(_tokens: Any, cache: list[Any]) -> None:
        if hasattr(cache[0], "bits"):
            raise RuntimeError("the quantised lane fails")

    watched.fault = fault
    while 2 not in ends:
        step(engine, ends)
    watched.fault = None
    engine.submit(4, ask("hello", max_tokens=20, kv_bits=8, **GREEDY))
    drain(engine, ends)
    assert isinstance(ends[2], InternalError)
    assert isinstance(ends[3], InternalError)
    assert "the quantised lane fails" in ends[2].message
    assert ends[1].text == wanted
    assert ends[4].finish_reason in ("stop", "length")
    assert engine._generator._homes == {}


# --- footprints -----------------------------------------------------------------------------------------------------


def test_a_footprint_counts_what_caches_grow_to() -> None:
    plain = Footprint(fixed=0, per_token=10)
    assert plain.bytes(1, 1) == 10 * (1 + 64 + 256)
    assert plain.bytes(3, 1000) == 3 * 10 * (1000 + 64 + 256)
    assert [plain.most_tokens(limit) for limit in (0, 3209, 3210, 3219, 3220)] == [0, 0, 1, 1, 2]
    mixed = Footprint(fixed=7, per_token=10, windows=((400, 2),))
    assert mixed.bytes(1, 10) == 7 + 330 * 10 + 330 * 2
    assert mixed.bytes(2, 1000) == 2 * (7 + 1320 * 10 + 400 * 2)
    state = Footprint(fixed=7, per_token=0)
    assert state.most_tokens(6) == 0
    assert state.most_tokens(7) > 10**9


@pytest.mark.parametrize("model", ["qwen3", "gemma3_text", "mamba2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_footprints_are_what_batches_come_to_hold(models: Models, model: str, rows: int) -> None:
    engine = Engine(models[model], max_batch=4, prefill_step=64)
    for number in range(rows):
        engine.submit(number, ask(" ".join(TEXTS * 2), max_tokens=200 + number, temperature=0, logit_bias={"2": -1000}))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine._generator.plain.prompt_cache_nbytes)
    foreseen = engine._generator._kinds.footprint(LaneKey()).bytes(rows, 200 + rows - 1 + 160)
    assert 0.4 * foreseen <= most <= foreseen
