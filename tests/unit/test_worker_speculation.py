"""Guessing ahead on real, tiny models: the same tokens as without it, whoever guesses and whatever comes between."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.lookup import Lookup, Odds
from mlxd.worker.pace import Pace
from mlxd.worker.running import Outcome
from mlxd_client.errors import InvalidParams, Unsupported
from support import tiny_model

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2}
# Penalties, a bias and a report for each token.
PENALISED: dict[str, Any] = SAMPLED | {"presence_penalty": 0.3, "frequency_penalty": 0.2}
ALL = PENALISED | {"logit_bias": {"70": 2.0}, "logprobs": 2}
TEXT = "the quick brown fox jumps over the lazy dog and then it rests"
FAMILIES = ("llama", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: load(str(tiny_model.build(folder / family, family=family)), lambda fraction: None)
        for family in (*FAMILIES, "mamba2")
    }


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Of the same tokenizer, and of other weights: what it guesses hardly ever comes true."""
    folder = tiny_model.build(tmp_path_factory.mktemp("weak") / "weak", family="llama", layers=1, seed=9)
    return load(str(folder), lambda fraction: None)


def make(loaded: LoadedModel, **options: Any) -> Engine:
    return Engine(loaded, **{"max_batch": 8, "prefill_step": 64, "cache_bytes": 1 << 26} | options)


def with_draft(models: dict[str, LoadedModel], family: str, draft: LoadedModel | None = None, **more: Any) -> Engine:
    """An engine whose draft model is its model itself, so that every guess comes true; or the given one."""
    engine = make(models[family], **more)
    engine.attach("draft", draft or models[family])
    return engine


def ask(text: str = TEXT, **options: Any) -> Generate:
    turns = [{"role": "user", "content": text}]
    return Generate(kind="chat", messages=turns, options={"max_tokens": 60} | options, stream=True)


def drain(engine: Engine, ends: dict[int, Any] | None = None, pieces: dict[int, str] | None = None) -> dict[int, Any]:
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


def said(made: Generated) -> tuple[Any, ...]:
    """The answer, down to each token's report but for the last bits of it."""
    reports = [(entry["token_id"], pytest.approx(entry["logprob"], abs=1e-3)) for entry in made.logprobs or ()]
    return made.text, made.finish_reason, made.completion_tokens, reports


def guessed(made: Generated) -> tuple[int, int]:
    assert made.speculation is not None
    return made.speculation.drafted_tokens, made.speculation.accepted_tokens


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", GREEDY), ("llama", PENALISED), ("qwen3", ALL), ("gemma3_text", GREEDY), ("gemma3_text", ALL)],
    ids=["llama-greedy", "llama-penalised", "qwen3-all", "gemma3-greedy", "gemma3-all"],
)
def test_the_tokens_are_those_without_guessing(
    models: dict[str, LoadedModel], weak: LoadedModel, family: str, options: dict[str, Any]
) -> None:
    plain = alone(make(models[family], cache_bytes=0), ask(speculation="off", **options))
    assert plain.speculation is None
    looked_up = alone(make(models[family], cache_bytes=0), ask(speculation="lookup", **options))
    assert said(looked_up) == said(plain)
    drafted, accepted = guessed(looked_up)
    assert 0 <= accepted <= drafted
    for draft in (models[family], weak):
        made = alone(with_draft(models, family, draft, cache_bytes=0), ask(speculation="draft", **options))
        assert said(made) == said(plain)
        if draft is weak:
            drafted, accepted = guessed(made)
            assert accepted < drafted
        elif family != "gemma3_text":  # its window slides, which cannot be taken back: then it guesses no more
            drafted, accepted = guessed(made)
            assert accepted >= 0.9 * drafted
            assert accepted >= 40


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 11])
def test_an_answer_is_as_long_as_it_may_be(models: dict[str, LoadedModel], limit: int) -> None:
    plain = alone(make(models["llama"]), ask(max_tokens=limit, speculation="off", **GREEDY))
    made = alone(with_draft(models, "llama"), ask(max_tokens=limit, speculation="draft", **GREEDY))
    assert said(made) == said(plain)
    assert made.finish_reason == "length"


def test_it_ends_where_a_stop_string_does(models: dict[str, LoadedModel]) -> None:
    whole = alone(make(models["llama"]), ask(speculation="off", **GREEDY)).text
    for at in range(10, 40, 10):
        options = {"stop": [whole[at : at + 2]]} | GREEDY
        plain = alone(make(models["llama"]), ask(speculation="off", **options))
        engine = with_draft(models, "llama")
        ends: dict[int, Any] = {}
        pieces: dict[int, str] = {}
        engine.submit(0, ask(speculation="draft", **options))
        drain(engine, ends, pieces)
        assert said(ends[0]) == said(plain)
        assert ends[0].finish_reason == "stop"
        assert pieces[0] == plain.text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_was_said(models: dict[str, LoadedModel], family: str) -> None:
    """The second turn of a chat finds the first, cut by a stop string in the middle of what was checked at once."""
    whole = alone(make(models[family]), ask(speculation="off", **GREEDY)).text
    answers = []
    for engine, kind in ((with_draft(models, family), "lookup"), (make(models[family], cache_bytes=0), "off")):
        first = ask(speculation=kind, stop=[whole[23:25]], **GREEDY)
        turn = alone(engine, first)
        turns = [*first.messages, {"role": "assistant", "content": turn.text}, {"role": "user", "content": "go on"}]
        second = Generate(kind="chat", messages=turns, options={"max_tokens": 30, "speculation": kind} | GREEDY)
        answers.append(alone(engine, second))
    assert said(answers[0]) == said(answers[1])
    assert answers[0].cached_tokens > 0
    assert answers[1].cached_tokens == 0


# --- others come, and go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_it_gives_way_to_others(models: dict[str, LoadedModel], weak: LoadedModel, family: str, kind: str) -> None:
    short = ask("numbers 1 2 3", max_tokens=12, **GREEDY)
    reference = make(models[family], cache_bytes=0)
    wanted = alone(reference, ask(max_tokens=150, speculation="off", **SAMPLED))
    wanted_short = alone(reference, short)
    engine = with_draft(models, family, weak, cache_bytes=0)
    ends: dict[int, Any] = {}
    pieces: dict[int, str] = {}
    engine.submit(0, ask(max_tokens=150, speculation=kind, **SAMPLED))
    engine.step()
    (running,) = engine._running.values()
    for number in (1, 2):  # it guesses, one comes and goes, it guesses again
        while running.tokens < 40 * number and 0 not in ends:
            note(engine.step(), ends, pieces)
        assert 0 not in ends
        assert running.guess is not None
        before = running.guess.drafted
        assert before > 0
        engine.submit(number, short)
        while number not in ends:
            note(engine.step(), ends, pieces)
            assert running.guess.drafted == before or number in ends
    drain(engine, ends, pieces)
    assert said(ends[0]) == said(wanted)
    assert pieces[0] == wanted.text
    assert said(ends[1]) == said(ends[2]) == said(wanted_short)
    assert ends[1].speculation is None


def test_a_cancel_takes_nothing_with_it(models: dict[str, LoadedModel]) -> None:
    wanted = alone(make(models["qwen3"], cache_bytes=0), ask(speculation="off", **GREEDY))
    engine = with_draft(models, "qwen3")
    ends: dict[int, Any] = {}
    pieces: dict[int, str] = {}
    engine.submit(0, ask(speculation="draft", **GREEDY))
    engine.step()
    (running,) = engine._running.values()
    while running.tokens < 20:
        note(engine.step(), ends, pieces)
    note(engine.cancel(0), ends, pieces)
    assert ends[0].finish_reason == "cancelled"
    assert ends[0].text == pieces[0]
    assert wanted.text.startswith(ends[0].text)
    assert guessed(ends[0])[1] > 0
    assert said(alone(engine, ask(speculation="draft", **GREEDY))) == said(wanted)


# --- whether to guess -----------------------------------------------------------------------------------------------


def test_models_that_overwrite_their_state_do_without(models: dict[str, LoadedModel]) -> None:
    engine = make(models["mamba2"])
    assert alone(engine, ask(**GREEDY)).speculation is None
    for kind in ("lookup", "draft"):
        with pytest.raises(Unsupported) as refused:
            engine.submit(1, ask(speculation=kind))
        assert refused.value.details["option"] == "speculation"
    with pytest.raises(Unsupported) as refused:
        engine.attach("draft", models["llama"])
    assert refused.value.details["option"] == "draft_model"


def test_what_cannot_be_guessed_is_refused_or_goes_without(models: dict[str, LoadedModel]) -> None:
    engine = make(models["llama"])
    asked: list[dict[str, Any]] = [
        {"speculation": "draft"},
        {"speculation": "lookup", "schema": True},
        {"speculation": "lookup", "kv_bits": 8},
        {"speculation": "lookup", "deterministic": True},
    ]
    for options in asked:
        with pytest.raises(Unsupported) as refused:
            engine.submit(0, ask(**options))
        assert refused.value.details["option"] == "speculation"
    for options in ({"schema": {"type": "boolean"}}, {"deterministic": True}):
        assert alone(engine, ask(**options, **GREEDY)).speculation is None


def timed(engine: Engine, seconds: Any) -> None:
    """Have passes take as long as said, whatever they take on this machine."""
    draft = engine.guesses.draft
    for pace in (engine.guesses.pace, *((draft.pace,) if draft is not None else ())):
        saw = pace.saw
        pace.saw = lambda tokens, _, saw=saw: saw(tokens, seconds(tokens))  # type: ignore[method-assign,misc]


def test_it_turns_itself_off_where_it_does_not_pay(models: dict[str, LoadedModel]) -> None:
    for engine in (make(models["llama"], cache_bytes=0), with_draft(models, "llama", cache_bytes=0)):
        timed(engine, lambda tokens: 0.01 * tokens**2)
        made = [alone(engine, ask(max_tokens=150, **GREEDY)) for _ in range(4)]
        assert len({each.text for each in made}) == 1
        assert made[-1].speculation is None or guessed(made[-1])[0] < 50


def test_it_turns_itself_on_where_it_pays(models: dict[str, LoadedModel]) -> None:
    engine = with_draft(models, "llama", cache_bytes=0)
    timed(engine, lambda tokens: 0.01)
    made = [alone(engine, ask(max_tokens=100, **GREEDY)) for _ in range(2)]
    assert said(made[1]) == said(alone(engine, ask(max_tokens=100, speculation="off", **GREEDY)))
    drafted, accepted = guessed(made[1])
    assert 80 <= accepted <= drafted <= 100


# --- draft models that are none -------------------------------------------------------------------------------------


def test_draft_models_of_another_tokenizer_are_refused(models: dict[str, LoadedModel], tmp_path: Path) -> None:
    engine = with_draft(models, "llama")
    kept = engine.guesses.draft
    smaller = tiny_model.build(tmp_path / "smaller", family="llama", vocabulary=320)
    swapped = tiny_model.build(tmp_path / "swapped", family="llama")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    for folder in (smaller, swapped):
        with pytest.raises(InvalidParams, match="tokenizer") as refused:
            engine.attach("other", load(str(folder), lambda fraction: None))
        assert refused.value.details["field"] == "draft_model"
    with pytest.raises(InvalidParams, match="taken back"):
        engine.attach("mamba2", models["mamba2"])
    assert engine.guesses.draft is kept


@pytest.mark.parametrize("rows", [384, 448])
def test_embeddings_may_be_padded_differently(tmp_path: Path, rows: int) -> None:
    target = tiny_model.build(tmp_path / "target", family="llama", vocabulary=400)
    padded = tiny_model.build(tmp_path / "padded", family="llama", vocabulary=rows)
    for folder in (target, padded):
        tiny_model.write_tokenizer(folder, 382, tiny_model.CHAT_TEMPLATE)
    engine = make(load(str(target), lambda fraction: None), cache_bytes=0)
    engine.attach("padded", load(str(padded), lambda fraction: None))
    for options in (SAMPLED, GREEDY):
        plain = alone(engine, ask(speculation="off", **options))
        assert said(alone(engine, ask(speculation="draft", **options))) == said(plain)


def test_a_draft_model_that_fails_costs_nothing_but_its_guesses(models: dict[str, LoadedModel]) -> None:
    engine = with_draft(models, "llama", cache_bytes=0)
    wanted = alone(engine, ask(speculation="off", **GREEDY))

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of ideas")

    engine.guesses.draft._model = fail  # type: ignore[union-attr]
    assert said(alone(engine, ask(speculation="draft", **GREEDY))) == said(wanted)
    with pytest.raises(Unsupported):
        engine.submit(0, ask(speculation="draft"))


def test_a_long_prompt_is_read_a_step_at_a_time(models: dict[str, LoadedModel]) -> None:
    """The draft model's own prefill comes between tokens, not before them."""
    engine = with_draft(models, "llama", cache_bytes=0, prefill_step=16)
    draft = engine.guesses.draft
    assert draft is not None
    engine.submit(0, ask(TEXT * 5, speculation="draft", **GREEDY))
    read, ends = [0], {}  # type: ignore[var-annotated]
    while 0 not in ends:
        note(engine.step(), ends)
        read.append(len(draft._tokens))
    assert max(after - before for before, after in itertools.pairwise(read)) <= 16 + 25
    assert guessed(ends[0])[1] > 20
    again = alone(engine, ask(TEXT * 5, speculation="draft", **GREEDY))  # it has read that
    assert guessed(again)[1] > guessed(ends[0])[1]


# --- looking up -----------------------------------------------------------------------------------------------------


def test_a_lookup_follows_an_edit() -> None:
    """Of a text with words replaced, put in and left out, most tokens are foreseen."""
    source = [(7 * number * number + number) % 997 + 10 for number in range(300)]
    answer: list[int] = []
    for number, token in enumerate(source):
        if number % 23 == 11:
            continue
        answer.append(5000 + number if number % 17 == 8 else token)
        if number % 29 == 15:
            answer.append(6000 + number)
    lookup, tokens, right = Lookup(Odds()), [1, 2, *source, 3, 4], 0
    lookup.follow(tokens)
    for token in answer:
        if lookup.chances(1):
            right += lookup.expected(tokens, 1) == [token]
        tokens.append(token)
        lookup.follow(tokens)
    assert right > 0.75 * len(answer)


def test_a_lookup_foresees_what_goes_round() -> None:
    lookup, tokens = Lookup(Odds()), [9, 8, 7]
    lookup.follow(tokens)
    for token in (1, 2, 3, 1, 2, 3, 1):
        tokens.append(token)
        lookup.follow(tokens)
    assert lookup.expected(tokens, 7) == [2, 3, 1, 2, 3, 1, 2]
    assert len(lookup.chances(7)) == 7


def test_a_lookup_in_noise_trusts_nothing() -> None:
    lookup, tokens = Lookup(Odds()), list(range(50))
    lookup.follow(tokens)
    for number in range(400):
        tokens.append((number * 7919 + number * number * 31 + 7) % 1009 + 100)
        lookup.follow(tokens)
        chances = lookup.chances(3)
        assert not chances or len(lookup.expected(tokens, 5)) == 5
    assert not chances or chances[0] < 0.3


def test_pace_guesses_as_far_as_it_pays() -> None:
    pace = Pace()
    assert pace.choose([0.9] * 24) == 0, "nothing is known yet"
    assert pace.choose([0.9] * 24, always=True) == 4
    for _ in range(2):
        pace.saw(1, 0.01)
    assert pace.choose([0.99] * 24) == 24
    assert pace.choose([0.1] * 24) == 0
    for size in (2, 3, 4, 5, 25):
        for _ in range(2):
            pace.saw(size, 0.01 * size)
    assert pace.choose([0.99] * 24) == 0, "as slow as without"
    for _ in range(40):
        pace.saw(5, 0.011)
    assert pace.choose([0.99] * 24) == 4
    assert pace.choose([0.99] * 3) == 0, "fewer are not worth it"
