"""Thoughts with a budget on a real, tiny model: never longer, whatever follows them, and whoever else decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker.constraint import Thought
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.running import Outcome
from mlxd_client.errors import InvalidParams, Unsupported
from support import tiny_model, tool_templates

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
WILD: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0}
RECORD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
# A thought of this model goes on and on: it never ends by itself within these tests.
TEXT = "what is the weather?"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tool_templates.build(tmp_path_factory.mktemp("models") / "m", "json_tools")), lambda fraction: None)


@pytest.fixture(scope="module")
def shared(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=64)


@pytest.fixture
def engine(shared: Engine) -> Engine:
    assert not shared.busy
    return shared


def ask(text: str = TEXT, kind: str = "chat", **options: Any) -> Generate:
    messages = [{"role": "user", "content": text}]
    return Generate(kind=kind, messages=messages, options=GREEDY | {"max_tokens": 40} | options, stream=True)


def run(engine: Engine, *before: Outcome) -> dict[int, Any]:
    """Step until nobody is left; `before` are the steps that were taken already."""
    ends: dict[int, Any] = {}
    texts: dict[int, list[str]] = {}
    outcomes = [*before]
    while engine.busy:
        outcomes.append(engine.step())
    for outcome in outcomes:
        for number, text, reasoning in outcome.pieces:
            told = texts.setdefault(number, ["", ""])
            told[0] += text
            told[1] += reasoning
        ends.update(outcome.ended)
    for number, end in ends.items():
        assert isinstance(end, Generated), end
        assert texts.get(number, ["", ""]) == [end.text, end.reasoning or ""]
    return ends


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    end = run(engine)[0]
    assert isinstance(end, Generated)
    return end


def tokens(engine: Engine, text: str) -> int:
    return len(engine._loaded.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("budget", [0, 1, 2, 9])
def test_a_thought_has_its_budget_and_no_more(engine: Engine, budget: int) -> None:
    end = alone(engine, ask(thinking_budget=budget))
    assert end.reasoning_tokens == budget
    assert bool(end.reasoning) == bool(budget)
    # One token for the marker; the rest is the answer's.
    assert (end.completion_tokens, end.finish_reason) == (40, "length")
    assert end.text
    assert "think>" not in end.text + (end.reasoning or "")


def test_what_is_thought_is_what_it_would_have_been(engine: Engine) -> None:
    free = alone(engine, ask(thinking_budget=1000))
    bounded = alone(engine, ask(thinking_budget=9))
    assert (free.reasoning_tokens, free.text) == (40, "")
    assert free.reasoning is not None
    assert bounded.reasoning
    assert free.reasoning.startswith(bounded.reasoning)


def test_a_thought_that_ends_by_itself_is_left_alone(engine: Engine) -> None:
    close = engine._loaded.tokenizer.think_end_tokens[0]
    end = alone(engine, ask(thinking_budget=5, logit_bias={str(close): 1000.0}, max_tokens=4))
    assert (end.reasoning, end.reasoning_tokens) == (None, 0)
    assert end.text == "</think>" * 3  # after the thought there is no other: it is text
    whole = alone(engine, ask(thinking_budget=1, logit_bias={str(close): 1000.0}, max_tokens=4))
    assert whole.text == end.text


def test_in_a_batch_with_others(engine: Engine) -> None:
    """Each has its own budget; who has none is as alone."""
    plain = alone(engine, ask("plain"))
    thinking = alone(engine, ask("thinking", thinking=True))
    budgets, before = [0, 3, 11, 20], []
    for number, budget in enumerate(budgets):
        engine.submit(number, ask(f"text {number}", thinking_budget=budget, seed=number, **WILD))
        before.append(engine.step())
    engine.submit(8, ask("plain"))
    engine.submit(9, ask("thinking", thinking=True))
    ends = run(engine, *before)
    for number, budget in enumerate(budgets):
        assert ends[number].reasoning_tokens <= budget
    assert ends[8].text == plain.text
    assert (ends[9].text, ends[9].reasoning) == (thinking.text, thinking.reasoning)


@pytest.mark.parametrize("budget", [0, 6])
def test_rules_begin_after_the_thought(engine: Engine, budget: int) -> None:
    for number in range(3):
        options = WILD | {"seed": number} if number else GREEDY
        engine.submit(number, ask(schema=RECORD, thinking_budget=budget, max_tokens=60, **options))
        engine.submit(10 + number, ask(grammar='start: "yes" | "no"', thinking_budget=budget, **options))
    ends = run(engine)
    for number in range(3):
        assert ends[number].structured == json.loads(ends[number].text)
        assert ends[10 + number].text in ("yes", "no")
        assert ends[number].reasoning_tokens <= budget
        assert ends[10 + number].reasoning_tokens <= budget


def test_max_tokens_counts_the_thought(engine: Engine) -> None:
    for most in (3, 5, 6):
        end = alone(engine, ask(thinking_budget=5, max_tokens=most))
        assert (end.finish_reason, end.completion_tokens, end.reasoning_tokens) == ("length", most, min(most, 5))
        assert end.text == ""
    assert alone(engine, ask(thinking_budget=5, max_tokens=7)).text


def test_stop_texts_count_after_it(engine: Engine) -> None:
    free = alone(engine, ask(thinking_budget=5))
    assert free.reasoning
    stop = free.text[3:6]
    end = alone(engine, ask(thinking_budget=5, stop=[stop, free.reasoning[1:4] + "never"]))
    assert (end.text, end.reasoning) == (free.text[: free.text.index(stop)], free.reasoning)
    thought = alone(engine, ask(thinking_budget=5, stop=[free.reasoning[:2]]))
    assert thought.reasoning == free.reasoning


def test_logprobs_and_penalties_go_on(engine: Engine) -> None:
    end = alone(engine, ask(thinking_budget=4, logprobs=1, repetition_penalty=1.3, max_tokens=12))
    close = engine._loaded.tokenizer.think_end_tokens[0]
    assert [entry["token_id"] for entry in end.logprobs or ()].index(close) == 4
    assert all(entry["logprob"] <= 0 for entry in end.logprobs or ())


def test_process_thinks_too(engine: Engine) -> None:
    assert alone(engine, ask(kind="process", thinking_budget=4)).reasoning_tokens == 4


def test_once_it_is_over_nothing_is_watched(engine: Engine) -> None:
    engine.submit(0, ask(thinking_budget=3))
    watched = []
    while engine.busy:
        engine.step()
        plan = engine._generator.plain._generation_batch._plan
        watched.append(bool(plan is not None and plan.constrained))
    assert watched.count(True) <= 6
    assert not any(watched[8:])


def test_markers_of_several_tokens(tmp_path: Path) -> None:
    """Gemma 4's thoughts begin and end with words, of which the tokenizer makes several tokens."""
    loaded = load(str(tool_templates.build(tmp_path / "gemma4", "gemma4_thinking")), lambda fraction: None)
    tokenizer = loaded.tokenizer
    assert len(tokenizer.think_start_tokens) > 1
    engine = Engine(loaded, max_batch=4, prefill_step=64)
    for budget in (0, 1, 5):
        end = alone(engine, ask(thinking_budget=budget))
        assert end.reasoning_tokens <= budget
        assert end.text
        assert tokenizer.think_end not in end.text + (end.reasoning or "")


@pytest.mark.parametrize(
    ("said", "ends", "after"),
    [
        (["well", "</think>", "yes"], ["</think>"], b""),
        (["well", "</", "thi", "nk>\n\nyes"], ["</think>"], b"\n\nyes"),
        (["</", "thi", "nk", "x</think>"], ["</think>"], b""),
        (["a<call>b</think>"], ["</think>", "<call>"], b"b</think>"),
        (["a", "b", "c"], ["</think>"], None),
    ],
)
def test_a_thought_ends_where_its_text_does(said: list[str], ends: list[str], after: bytes | None) -> None:
    thought = Thought(lambda index: said[index].encode(), ends, budget=None)
    told = None
    for index in range(len(said)):
        assert thought.next is None
        told = thought.take(index)
        if told is not None:
            break
    assert told == after


def test_the_end_is_forced_token_by_token() -> None:
    words = {1: b"hm", 7: b"</th", 8: b"ink>"}
    thought = Thought(words.__getitem__, ["</think>"], close=[7, 8], budget=2)
    assert (thought.next, thought.take(1)) == (None, None)
    assert (thought.next, thought.take(1)) == (None, None)
    assert (thought.next, thought.take(7)) == (7, None)
    assert (thought.next, thought.take(8)) == (8, b"")


def test_a_marker_whose_text_is_not_its_tokens_ends_all_the_same() -> None:
    thought = Thought(lambda token: b"?", ["</think>"], close=[7, 8], budget=0)
    assert (thought.next, thought.take(7)) == (7, None)
    assert (thought.next, thought.take(8)) == (8, b"")


def test_several_answers_have_a_budget_each(engine: Engine) -> None:
    for budget in (0, 5):
        end = alone(engine, ask(thinking_budget=budget, n=3, max_tokens=14, seed=1, **WILD))
        assert len(end.alternatives or ()) == 2
        assert end.reasoning_tokens <= 3 * budget
        assert all(answer.text for answer in (end, *(end.alternatives or ())))


def test_a_bounded_thought_is_not_guessed(engine: Engine) -> None:
    plain = alone(engine, ask(thinking_budget=5, speculation="off"))
    auto = alone(engine, ask(thinking_budget=5))
    assert (auto.text, auto.speculation) == (plain.text, None)
    with pytest.raises(Unsupported) as caught:
        engine.submit(0, ask(thinking_budget=5, speculation="lookup"))
    assert caught.value.details["option"] == "speculation"


def test_refusals(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InvalidParams) as caught:
        engine.submit(0, ask(thinking_budget=5, thinking=False))
    assert caught.value.details["field"] == "thinking_budget"
    plain = load(str(tiny_model.build(tmp_path / "plain", chat_template=None)), lambda fraction: None)
    with pytest.raises(Unsupported) as refused:
        Engine(plain, max_batch=2, prefill_step=16).submit(0, ask(kind="process", thinking_budget=5))
    assert refused.value.details["option"] == "thinking_budget"
    assert not engine.busy
