"""Conversations that are too long: which messages go, that what is left fits, and what that takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxd.childwire import Generate
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.prompt import Prompt, PromptBuilder
from mlxd.worker.shorten import beginnings, shortened
from mlxd_client.errors import ContextExceeded
from support import tiny_model
from support.asking import GREEDY, alone, ask, drain

pytestmark = pytest.mark.model

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")), lambda fraction: None)


def talk(rounds: int, *, system: bool = True, words: int = 4) -> Messages:
    """Rounds of a user turn and an answer, then a last user turn; contents say which they are."""
    turns: Messages = [{"role": "system", "content": "the rules"}] if system else []
    for number in range(rounds):
        turns.append({"role": "user", "content": f"u{number} " + "word " * words})
        turns.append({"role": "assistant", "content": f"a{number} " + "word " * words})
    return [*turns, {"role": "user", "content": "last"}]


class Builder:
    """Makes a token of each message's word, and one for each message; counts how much it was asked to read."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.read: list[int] = []
        self.kept: Messages = []

    def build(self, kind: str, messages: Messages, *, thinking: bool, cut: bool = False, tools: Any = None) -> Prompt:
        size = sum(1 + len(turn["content"].split()) for turn in messages)
        self.read.append(len(messages))
        self.kept = messages
        if size >= self.context_length:
            raise ContextExceeded("too long", prompt_tokens=size, context_length=self.context_length)
        return Prompt([1] * size, messages[-1]["content"])


def shorten(messages: Messages, context: int, room: int) -> tuple[Prompt, Builder]:
    builder = Builder(context)
    made: Any = builder
    return shortened(made, "chat", messages, thinking=False, cut=False, room=room), builder


# --- what goes ------------------------------------------------------------------------------------------------------


def test_what_fits_stays_as_it_is() -> None:
    prompt, builder = shorten(talk(3), 100, 20)
    assert prompt.dropped == 0
    assert builder.read == [8]


@pytest.mark.parametrize("room", [0, 5, 30, 60])
@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_rounds_go_and_no_more_than_must(room: int, system: bool) -> None:
    messages = talk(20, system=system)
    prompt, builder = shorten(messages, 100, room)
    kept = builder.kept
    assert len(prompt.tokens) + room <= 100
    assert prompt.dropped == len(messages) - len(kept) > 0
    assert kept[: int(system)] == messages[: int(system)]
    assert kept[int(system) :] == messages[len(messages) - len(kept) + int(system) :]
    assert kept[int(system)]["role"] == "user"
    assert len(prompt.tokens) + 12 + room > 100, "one more round would have fitted"


def test_room_gives_way_before_the_last_turn_does() -> None:
    prompt, builder = shorten(talk(5), 10, 9)
    assert [turn["content"] for turn in builder.kept] == ["the rules", "last"]
    assert prompt.dropped == 10


def test_what_cannot_be_shortened_enough_is_refused_with_its_numbers() -> None:
    messages = [*talk(5), {"role": "user", "content": "word " * 200}]
    with pytest.raises(ContextExceeded) as caught:
        shorten(messages, 100, 10)
    assert caught.value.details["prompt_tokens"] == 204
    assert caught.value.details["context_length"] == 100


def test_without_a_user_turn_nothing_can_go() -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "assistant", "content": "word " * 200}]
    with pytest.raises(ContextExceeded):
        shorten(messages, 100, 10)


def call(number: int) -> dict[str, Any]:
    return {"id": f"call{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def calls(rounds: int) -> Messages:
    """An agent at work on one question: calls and their results."""
    turns: Messages = [{"role": "system", "content": "the rules"}, {"role": "user", "content": "question"}]
    for number in range(rounds):
        turns.append({"role": "assistant", "content": "", "tool_calls": [call(number)]})
        turns.append({"role": "tool", "content": "word " * 10, "tool_call_id": f"call{number}"})
    return turns


def test_within_the_last_turn_calls_go_with_their_results_and_the_question_stays() -> None:
    prompt, builder = shorten(calls(20), 100, 10)
    kept = builder.kept
    assert [turn["role"] for turn in kept[:3]] == ["system", "user", "assistant"]
    assert kept == [*calls(20)[:2], *calls(20)[len(calls(20)) - len(kept) + 2 :]]
    assert prompt.dropped == 42 - len(kept) > 0
    assert len(prompt.tokens) + 12 + 10 > 100


turn_lists = st.lists(
    st.one_of(
        st.builds(lambda words: {"role": "user", "content": "w " * words}, st.integers(0, 8)),
        st.builds(lambda words: {"role": "assistant", "content": "w " * words}, st.integers(0, 8)),
        st.builds(
            lambda which: {"role": "assistant", "content": "", "tool_calls": [call(one) for one in which]},
            st.lists(st.integers(0, 3), max_size=2),
        ),
        st.builds(lambda which: {"role": "tool", "content": "r", "tool_call_id": f"call{which}"}, st.integers(0, 3)),
        st.just({"role": "tool", "content": "r"}),
        st.just({"role": "system", "content": "s"}),
    ),
    min_size=4,
    max_size=24,
)


@settings(max_examples=100, deadline=None)
@given(messages=turn_lists, context=st.integers(8, 60), room=st.integers(0, 40))
def test_whatever_the_turns_results_keep_their_calls_and_what_is_left_fits(
    messages: Messages, context: int, room: int
) -> None:
    try:
        prompt, builder = shorten(messages, context, room)
    except ContextExceeded:
        return
    kept = builder.kept
    assert len(prompt.tokens) < context
    assert prompt.dropped == len(messages) - len(kept)
    head = next((at for at, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    assert kept[:head] == messages[:head]
    assert kept[-1] is messages[-1]
    if not prompt.dropped:
        return
    assert kept[head]["role"] == "user"
    users = [turn for turn in messages if turn["role"] == "user"]
    assert any(turn is users[-1] for turn in kept)
    gone = [turn for turn in messages if not any(turn is each for each in kept)]
    lost = {one["id"] for turn in gone for one in turn.get("tool_calls", ())}
    there = {one["id"] for turn in kept for one in turn.get("tool_calls", ())}
    assert not [turn for turn in kept if turn["role"] == "tool" and turn.get("tool_call_id") in lost - there], (
        "a result without its call"
    )


def test_a_long_conversation_takes_few_and_short_renderings() -> None:
    _, builder = shorten(talk(4999), 1000, 100)
    assert builder.read[0] == 10_000
    assert len(builder.read) < 20
    assert sum(builder.read[1:]) < 3000


def test_beginnings_are_user_turns_that_split_no_call() -> None:
    messages = [
        *talk(2, system=False), {"role": "assistant", "content": "", "tool_calls": [call(1)]},
        {"role": "user", "content": "wait"}, {"role": "tool", "content": "r", "tool_call_id": "call1"},
    ]  # fmt: skip
    assert beginnings(messages) == [2, 4]


# --- with a model ---------------------------------------------------------------------------------------------------


def converse(messages: Messages, **options: Any) -> Generate:
    return Generate(kind="chat", messages=messages, options={**GREEDY, **options})


def test_an_answer_to_a_shortened_conversation_is_the_answer_to_what_is_left(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=4, prefill_step=128, cache_bytes=1 << 28)
    messages = talk(60)
    made = alone(engine, converse(messages, context_policy="drop_oldest", max_tokens=40))
    assert made.dropped_messages > 60
    assert made.prompt_tokens + 40 <= loaded.context_length
    left = [messages[0], *messages[1 + made.dropped_messages :]]
    plain = alone(engine, converse(left, max_tokens=40))
    assert plain.text == made.text
    assert plain.prompt_tokens == made.prompt_tokens
    assert plain.dropped_messages == 0
    with pytest.raises(ContextExceeded):
        engine.submit(0, converse(messages, context_policy="refuse"))
    with pytest.raises(ContextExceeded):
        engine.submit(0, converse(messages))


def test_room_is_left_for_what_is_asked_or_for_a_quarter(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=4, prefill_step=128)
    prompts = []
    for options in ({"max_tokens": 1}, {"max_tokens": 100}, {}, {"max_tokens": 100_000}):
        engine.submit(0, converse(talk(60), context_policy="drop_oldest", **options))
        (running,) = engine._running.values()
        prompts.append(len(running.prompt.tokens))
        engine.cancel(0)
        drain(engine)
        engine = Engine(loaded, max_batch=4, prefill_step=128)
    one, hundred, unset, huge = (loaded.context_length - tokens for tokens in prompts)
    assert 1 <= one < 40
    assert 100 <= hundred < 140
    assert 128 <= unset < 168
    assert 256 <= huge < 296


def test_process_has_nothing_to_drop(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=4, prefill_step=128)
    long = ask("word " * 600, "process", system="the rules", context_policy="drop_oldest")
    with pytest.raises(ContextExceeded) as caught:
        engine.submit(0, long)
    assert caught.value.details["context_length"] == loaded.context_length
    assert caught.value.details["prompt_tokens"] >= loaded.context_length
    short = alone(engine, ask("hello", "process", context_policy="drop_oldest", max_tokens=3, **GREEDY))
    assert short.dropped_messages == 0


def test_a_real_builder_reads_no_more_than_the_context_needs(loaded: LoadedModel) -> None:
    builder = PromptBuilder(loaded.tokenizer, loaded.context_length, loaded.vocabulary)
    rendered: list[int] = []
    render = builder._apply

    def counting(messages: Messages, thinking: bool, tools: Any = None, *, answer: bool = True) -> str:
        text = render(messages, thinking, tools, answer=answer)
        rendered.append(len(text))
        return text

    builder._apply = counting  # type: ignore[method-assign]
    prompt = shortened(builder, "chat", talk(4000), thinking=False, cut=True, room=100)
    assert prompt.cuts
    assert prompt.dropped > 7900
    assert sum(rendered[1:]) < 100 * loaded.context_length
