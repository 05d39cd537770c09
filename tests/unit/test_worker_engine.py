"""The engine on a real, tiny model: batches, seeds, sampling, streams, cancels, failures."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_logits_processors

from mlxd.childwire import CountTokens, Generate, Generated
from mlxd.worker.engine import Engine
from mlxd.worker.faults import EngineLost
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.running import Outcome
from mlxd.worker.sampling import Plan, Sampling
from mlxd_client.errors import ContextExceeded, InternalError, InvalidParams, ModelInvalid, RpcError, Unsupported
from support import tiny_model

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
TEXTS = ["hello", "the quick brown fox", "So I think we should meet on Monday", "numbers 1 2 3", "a", "Grüße 你好"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")), lambda fraction: None)


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=16)


def ask(text: str, kind: str = "chat", system: str | None = None, **options: Any) -> Generate:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return Generate(kind=kind, messages=[*messages, {"role": "user", "content": text}], options=options, stream=True)


def drain(engine: Engine, ends: dict[int, Any] | None = None, pieces: dict[int, str] | None = None) -> dict[int, Any]:
    """Step until nobody is left; {request id: result or error}. `pieces` collects what was streamed."""
    ends = {} if ends is None else ends
    while engine.busy:
        note(engine.step(), ends, pieces)
    return ends


def note(outcome: Outcome, ends: dict[int, Any], pieces: dict[int, str] | None = None) -> None:
    for number, text, _ in outcome.pieces:
        if pieces is not None:
            pieces[number] = pieces.get(number, "") + text
    ends.update(outcome.ended)


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    return drain(engine)[0]  # type: ignore[no-any-return]


def reference(loaded: LoadedModel, text: str, tokens: int, **kwargs: Any) -> str:
    """What mlx_lm says on its own, greedily."""
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=False
    )
    made = stream_generate(loaded.model, loaded.tokenizer, prompt, max_tokens=tokens, **kwargs)
    return "".join(part.text for part in made)


# --- batches --------------------------------------------------------------------------------------------------------


def test_greedy_in_a_changing_batch_is_greedy_alone(engine: Engine, loaded: LoadedModel) -> None:
    ends: dict[int, Any] = {}
    pieces: dict[int, str] = {}
    for number, text in enumerate(TEXTS):
        engine.submit(number, ask(text, max_tokens=10 + 7 * number, **GREEDY))
        for _ in range(number):  # they join at different depths of each other
            note(engine.step(), ends, pieces)
    drain(engine, ends, pieces)
    for number, text in enumerate(TEXTS):
        assert ends[number].text == reference(loaded, text, 10 + 7 * number)
        assert pieces[number] == ends[number].text


def test_the_repetition_penalty_is_mlx_lms(engine: Engine, loaded: LoadedModel) -> None:
    processors = make_logits_processors(None, 1.3, 20, 0.5, 20, 0.25, 20)
    wanted = {text: reference(loaded, text, 30, logits_processors=processors) for text in TEXTS[:3]}
    options = {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "max_tokens": 30,
    }
    for number, text in enumerate(TEXTS[:3]):
        engine.submit(number, ask(text, **options))
    engine.submit(9, ask("another", max_tokens=5, **GREEDY))
    ends = drain(engine)
    assert {text: ends[number].text for number, text in enumerate(TEXTS[:3])} == wanted


@pytest.mark.parametrize("length", [0, 1, 5, 30])
def test_penalties_against_mlx_lms_processors(length: int) -> None:
    rows = [Sampling(repetition=1.5), Sampling(presence=0.7), Sampling(frequency=0.4), Sampling()]
    tokens = [[(3 * i + row) % 7 for i in range(length)] for row in range(4)]
    inputs = mx.array([1, 2, 3, 4], dtype=mx.uint32)
    logits = mx.random.normal((4, 11), key=mx.random.key(length))
    plan = Plan(rows, tokens, inputs)
    for _ in range(3):  # the window moves on
        got = plan.penalise(inputs, mx.array(logits))
        for index, row in enumerate(rows):
            tokens[index].append(inputs.tolist()[index])  # type: ignore[index, arg-type]
            expected = mx.array(logits[index : index + 1])
            for processor in make_logits_processors(None, row.repetition, 20, row.presence, 20, row.frequency, 20):
                expected = processor(mx.array(tokens[index]), expected)
            assert mx.allclose(got[index], expected[0], atol=1e-6)
        inputs = (inputs + 2) % 7


# --- seeds and sampling ---------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(engine: Engine) -> None:
    request = ask("tell me", seed=7, temperature=1.0, max_tokens=25)
    first = alone(engine, request).text
    engine.submit(1, ask("others", max_tokens=40, temperature=1.2, top_k=5))
    engine.submit(2, ask("more", max_tokens=10, **GREEDY))
    for _ in range(4):
        engine.step()
    engine.submit(3, request)
    engine.submit(4, ask("again", max_tokens=12, seed=9))
    assert drain(engine)[3].text == first
    assert alone(engine, ask("tell me", seed=8, temperature=1.0, max_tokens=25)).text != first


def test_requests_without_a_seed_differ(engine: Engine) -> None:
    for number in range(4):
        engine.submit(number, ask("tell me", temperature=1.5, top_p=1.0, max_tokens=20))
    assert len({end.text for end in drain(engine).values()}) == 4


def test_draws_follow_the_distribution() -> None:
    logprobs = mx.log(mx.array([[0.5, 0.25, 0.125, 0.125]]))
    counts = [0, 0, 0, 0]
    plan = Plan([Sampling(temperature=1.0, key=(5, 6))], [[0]], mx.array([0]))
    for _ in range(2000):
        counts[plan.sample(logprobs).item()] += 1  # type: ignore[index]
    assert all(abs(count / 2000 - p) < 0.05 for count, p in zip(counts, (0.5, 0.25, 0.125, 0.125), strict=True))


def test_filters_and_rows_in_any_mixture() -> None:
    logprobs = mx.log(mx.array([[0.1, 0.2, 0.3, 0.4]] * 4))
    rows = [
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=5.0, top_p=0.3, key=(1, 2)),
        Sampling(temperature=1.0, min_p=0.99, key=(3, 4)),
    ]
    plan = Plan(rows, [[0]] * 4, mx.array([0] * 4))
    for _ in range(20):
        assert plan.sample(logprobs).tolist() == [3, 3, 3, 3]


def test_one_row_draws_as_in_a_batch() -> None:
    row = Sampling(temperature=1.0, key=(11, 12))
    logprobs = mx.random.normal((1, 50), key=mx.random.key(1))
    one = Plan([row], [[1, 2]], mx.array([0]))
    two = Plan([Sampling(temperature=1.0), row], [[5], [1, 2]], mx.array([0, 0]))
    for _ in range(10):
        assert one.sample(logprobs).tolist()[0] == two.sample(mx.repeat(logprobs, 2, axis=0)).tolist()[1]  # type: ignore[index]


def test_logit_bias_decides(engine: Engine, loaded: LoadedModel) -> None:
    token = loaded.tokenizer.encode("x", add_special_tokens=False)[0]
    result = alone(engine, ask("say", max_tokens=4, logit_bias={str(token): 1000.0}, **GREEDY))
    assert result.text == "xxxx"


def test_logprobs_name_the_chosen_and_the_best(engine: Engine) -> None:
    engine.submit(0, ask("say", max_tokens=5, logprobs=3, **GREEDY))
    engine.submit(1, ask("say", max_tokens=5, logprobs=0, temperature=1.0))
    engine.submit(2, ask("say", max_tokens=5, **GREEDY))
    ends = drain(engine)
    for entry in ends[0].logprobs:
        assert entry["top"][0] == (entry["token"], pytest.approx(entry["logprob"]))
        values = [value for _, value in entry["top"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    assert len(ends[1].logprobs) == 5
    assert "top" not in ends[1].logprobs[0]
    assert ends[2].logprobs is None


# --- text -----------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_arrive_whole(engine: Engine, loaded: LoadedModel) -> None:
    wanted = "Ωδέ 🦊🚀 한국"
    tokens = loaded.tokenizer.encode(wanted, add_special_tokens=False)
    assert len(tokens) > len(wanted)
    steps = iter([*tokens, loaded.tokenizer.eos_token_id, 0, 0])

    # A processor that forces these tokens, one after the other.
    def force(_context: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -1000.0).at[:, next(steps)].add(1000.0)

    request = ask("say", max_tokens=200, **GREEDY)
    engine.submit(0, request)
    pending = engine._generator.plain._unprocessed_sequences
    pending[0] = (*pending[0][:6], (force,), pending[0][7])
    seen: list[str] = []
    ends: dict[int, Any] = {}
    while engine.busy:
        outcome = engine.step()
        seen += [text for _, text, _ in outcome.pieces]
        ends.update(outcome.ended)
    assert "".join(seen) == ends[0].text == wanted
    assert ends[0].finish_reason == "stop"
    assert not any("\ufffd" in text for text in seen)


def test_stop_strings_are_cut_and_counted(engine: Engine, loaded: LoadedModel) -> None:
    whole = reference(loaded, "hello", 60)
    stop = whole[len(whole) // 2 :][:4]
    pieces: dict[int, str] = {}
    engine.submit(0, ask("hello", max_tokens=60, stop=["never there", stop], **GREEDY))
    result = drain(engine, pieces=pieces)[0]
    assert result.text == whole[: whole.index(stop)] == pieces[0]
    assert result.finish_reason == "stop"
    assert 0 < result.completion_tokens < 60


def test_a_thought_is_no_part_of_the_answer(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=2, prefill_step=16)
    tokens = loaded.tokenizer.encode("<think>\nwell</think>\n\nyes", add_special_tokens=False)
    steps = iter([*tokens, loaded.tokenizer.eos_token_id, 0, 0])

    def force(_context: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -1000.0).at[:, next(steps)].add(1000.0)

    engine.submit(0, ask("say", thinking=True, **GREEDY))
    pending = engine._generator.plain._unprocessed_sequences
    pending[0] = (*pending[0][:6], (force,), pending[0][7])
    thoughts, answers = [], []
    ends: dict[int, Any] = {}
    while engine.busy:
        outcome = engine.step()
        answers += [text for _, text, _ in outcome.pieces]
        thoughts += [reasoning for _, _, reasoning in outcome.pieces]
        ends.update(outcome.ended)
    assert "".join(thoughts) == ends[0].reasoning == "well"
    assert "".join(answers) == ends[0].text == "yes"


# --- limits, cancels and failures -----------------------------------------------------------------------------------


def test_max_tokens_fits_the_context(engine: Engine, loaded: LoadedModel) -> None:
    result = alone(engine, ask("word " * 60, max_tokens=100_000, **GREEDY))
    assert result.finish_reason == "length"
    assert result.prompt_tokens + result.completion_tokens == loaded.context_length


def test_a_prompt_that_is_too_long(engine: Engine, loaded: LoadedModel) -> None:
    for text in ("word " * 1000, "x " * 150_000, "x" * 5_000_000):
        with pytest.raises(ContextExceeded) as caught:
            engine.submit(0, ask(text))
        assert caught.value.details["context_length"] == loaded.context_length
        assert caught.value.details["prompt_tokens"] >= loaded.context_length
    assert not engine.busy


def test_cancel_in_the_batch_in_prefill_and_in_the_queue(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=2, prefill_step=8)
    engine.submit(0, ask("hello", max_tokens=30, **GREEDY))
    for _ in range(6):
        engine.step()
    engine.submit(1, ask("word " * 30, max_tokens=30, **GREEDY))
    engine.step()
    engine.submit(2, ask("hello", max_tokens=3, **GREEDY))
    assert (engine.active, engine.waiting) == (2, 1)
    (number, prefilling), *_ = engine.cancel(1).ended
    assert (number, prefilling.finish_reason, prefilling.completion_tokens) == (1, "cancelled", 0)  # type: ignore[union-attr]
    (_, queued), *_ = engine.cancel(2).ended
    assert queued.finish_reason == "cancelled"  # type: ignore[union-attr]
    assert engine.cancel(2).ended == []
    assert (engine.active, engine.waiting) == (1, 0)
    assert drain(engine)[0].text == reference(loaded, "hello", 30)


def test_a_cancelled_row_leaves_its_text(engine: Engine, loaded: LoadedModel) -> None:
    pieces: dict[int, str] = {}
    engine.submit(0, ask("hello", max_tokens=60, stop=["zzz"], **GREEDY))
    engine.submit(1, ask("a", max_tokens=20, **GREEDY))
    ends: dict[int, Any] = {}
    for _ in range(10):
        note(engine.step(), ends, pieces)
    note(engine.cancel(0), ends, pieces)
    drain(engine, ends, pieces)
    assert ends[0].text == pieces[0]
    assert reference(loaded, "hello", 60).startswith(ends[0].text)
    assert ends[1].text == reference(loaded, "a", 20)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"schema": False}, InvalidParams, "schema"),
        ({"schema": {}, "grammar": "x"}, InvalidParams, "grammar"),
        ({"schema": [1]}, InvalidParams, "schema"),
        ({"thinking_budget": 5, "thinking": False}, InvalidParams, "thinking_budget"),
        ({"thinking_budget": -1}, InvalidParams, "thinking_budget"),
        ({"adapter": "x"}, InvalidParams, "adapter"),
        ({"draft_model": "x"}, Unsupported, "draft_model"),
        ({"cache_prompt": True}, Unsupported, "cache_prompt"),
        ({"frobnicate": 1}, InvalidParams, "frobnicate"),
        ({"top_p": 7.0}, InvalidParams, "top_p"),
        ({"max_tokens": 0}, InvalidParams, "max_tokens"),
        ({"logit_bias": {"999999": 1.0}}, InvalidParams, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, InvalidParams, "logit_bias"),
    ],
)
def test_what_is_refused_is_refused_by_name(
    engine: Engine, options: dict[str, Any], error: type[RpcError], name: str
) -> None:
    with pytest.raises(error) as caught:
        engine.submit(0, ask("hello", **options))
    assert name in (caught.value.details.get("option"), caught.value.details.get("field"))
    assert not engine.busy


def test_tools_are_refused_by_a_model_that_has_none(engine: Engine) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    with pytest.raises(Unsupported) as caught:
        engine.submit(0, Generate(kind="chat", messages=[{"role": "user", "content": "x"}], tools=tools))
    assert caught.value.details["option"] == "tools"
    with pytest.raises(Unsupported):
        engine.count(CountTokens(messages=[{"role": "user", "content": "x"}], tools=tools))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], InvalidParams),
        ([{"role": "wizard", "content": "x"}], InvalidParams),
        ([{"role": "user", "content": 3}], InvalidParams),
        ([{"role": "tool", "content": "x"}], Unsupported),
    ],
)
def test_messages_that_cannot_be_taken(engine: Engine, messages: list[Any], error: type[RpcError]) -> None:
    with pytest.raises(error):
        engine.submit(0, Generate(kind="chat", messages=messages))


@pytest.fixture
def flawed(loaded: LoadedModel, engine: Engine) -> list[int]:
    """While the list holds a number, rows of the batch from that number on get logits that are no numbers."""
    rows: list[int] = []
    inner = loaded.model

    class Flawed:
        layers = inner.layers

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            logits = inner(tokens, cache=cache)
            if rows and rows[0] < 0:
                raise RuntimeError("the kernel failed")
            if rows and tokens.shape[0] > rows[0]:
                logits = logits.at[rows[0] :].add(float("nan"))
            return logits

    plain = engine._generator.plain
    plain.model = plain._prompt_batch.model = Flawed()
    plain._generation_batch.model = plain.model
    return rows


def test_numbers_that_are_not_finite_end_their_own_request(
    engine: Engine, flawed: list[int], loaded: LoadedModel
) -> None:
    engine.submit(0, ask("hello", max_tokens=20, **GREEDY))
    engine.step()
    engine.submit(1, ask("hello", max_tokens=20, **GREEDY))
    ends: dict[int, Any] = {}
    while engine.active < 2 or engine.waiting:
        note(engine.step(), ends)
    flawed.append(1)
    drain(engine, ends)
    assert isinstance(ends[1], ModelInvalid)
    assert ends[0].text == reference(loaded, "hello", 20)


def test_a_step_that_raises_ends_all_and_the_next_batch_is_clean(
    engine: Engine, flawed: list[int], loaded: LoadedModel
) -> None:
    engine.submit(0, ask("hello", max_tokens=20, **GREEDY))
    engine.submit(1, ask("a", max_tokens=20, **GREEDY))
    engine.step()
    flawed.append(-1)
    ends = drain(engine)
    assert all(isinstance(ends[number], InternalError) for number in (0, 1))
    assert alone(engine, ask("hello", max_tokens=20, **GREEDY)).text == reference(loaded, "hello", 20)


def test_a_device_error_loses_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    engine.submit(0, ask("hello"))
    monkeypatch.setattr(engine._generator, "next", fail)
    with pytest.raises(EngineLost, match="METAL"):
        engine.step()


def test_a_processor_that_raises_costs_its_own_row(engine: Engine, loaded: LoadedModel) -> None:
    def broken(_context: mx.array, _logits: mx.array) -> mx.array:
        raise ZeroDivisionError("in a processor")

    engine.submit(0, ask("hello", max_tokens=20, **GREEDY))
    engine.submit(1, ask("hello", max_tokens=20, **GREEDY))
    pending = engine._generator.plain._unprocessed_sequences
    pending[1] = (*pending[1][:6], (broken,), pending[1][7])
    ends = drain(engine)
    assert isinstance(ends[1], InternalError)
    assert ends[0].text == reference(loaded, "hello", 20)


def test_the_guard_sees_processed_text_only(loaded: LoadedModel) -> None:
    seen = []

    def guard(source: str, answer: str) -> tuple[str, ...]:
        seen.append((source, answer))
        return ("invented",)

    faithful = LoadedModel(loaded.model, loaded.tokenizer, loaded.context_length, loaded.vocabulary, faithful=True)
    engine = Engine(faithful, max_batch=2, prefill_step=16, guard=guard)
    result = alone(engine, ask("hello", "process", max_tokens=5, **GREEDY))
    assert result.invented == ["invented"]
    assert seen == [("hello", result.text)]
    assert alone(engine, ask("hello", max_tokens=5, **GREEDY)).invented is None


def test_defaults_by_kind_and_counting(engine: Engine) -> None:
    assert alone(engine, ask("hello", "process", temperature=0)).completion_tokens <= 150
    assert engine.count(CountTokens(text="")) == 0
    with pytest.raises(InvalidParams):
        engine.count(CountTokens(text="x" * 2_000_001))
    assert engine.count(CountTokens(messages=[{"role": "user", "content": ""}])) > 0
