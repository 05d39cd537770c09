"""Constrained rows on a real, tiny model: always valid, beside free rows, after thoughts, cut short, and failing."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import mlx.core as mx
import numpy as np
import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker import constraint as constraints
from mlxd.worker.constraint import Constraint, allows_any, apply_masks, parse_value
from mlxd.worker.engine import Engine
from mlxd.worker.grammar import read_rule
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.running import Outcome
from mlxd_client.errors import InternalError, InvalidParams, RpcError, Unsupported
from support import tiny_model

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
SMALL = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}}, "required": ["a"],
         "additionalProperties": False}  # fmt: skip


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: list[Any] = [
    SMALL,
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"const": 'a "quoted" \u00e9\u4e2d\U0001f600 \u0001 text'},
    {"type": "integer", "minimum": -20, "maximum": 20, "multipleOf": 4},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "number", "minimum": 0.5, "maximum": 1.5, "multipleOf": 0.25},
    SHORT | {"minLength": 3},
    {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, SHORT], "items": False, "minItems": 2},
    record(name=SHORT, tags={"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3}, when={"enum": ["now"]}),
    record(outer=record(inner=record(deep=record(value={"type": "integer", "minimum": 0, "maximum": 9})))),
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": SHORT, "c": {"type": "null"}},
     "required": ["b"], "additionalProperties": False},
    {"anyOf": [record(kind={"const": "a"}, n={"enum": [1, 2]}), record(kind={"const": "b"}, s=SHORT)]},
    {"oneOf": [record(kind={"const": "a"}, n={"enum": [1, 2]}), record(kind={"const": "b"}, s=SHORT)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"type": ["null", "boolean"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny", context=2048)), lambda fraction: None)


@pytest.fixture(scope="module")
def shared(loaded: LoadedModel) -> Engine:
    return Engine(loaded, max_batch=8, prefill_step=16)


@pytest.fixture
def engine(shared: Engine) -> Engine:
    assert not shared.busy
    return shared


def ask(text: str = "hello", **options: Any) -> Generate:
    return Generate(kind="chat", messages=[{"role": "user", "content": text}], options=options, stream=True)


def drain(
    engine: Engine, pieces: dict[int, str] | None = None, thoughts: dict[int, str] | None = None
) -> dict[int, Any]:
    """Step until nobody is left; {request id: result or error}."""
    ends: dict[int, Any] = {}
    while engine.busy:
        note(engine.step(), ends, pieces, thoughts)
    return ends


def note(
    outcome: Outcome, ends: dict[int, Any], pieces: dict[int, str] | None = None, thoughts: dict[int, str] | None = None
) -> None:
    for number, text, reasoning in outcome.pieces:
        for told, part in ((pieces, text), (thoughts, reasoning)):
            if told is not None:
                told[number] = told.get(number, "") + part
    ends.update(outcome.ended)


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    end = drain(engine)[0]
    assert isinstance(end, Generated), end
    return end


# --- answers fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_whatever_the_model_wants_the_answer_fits(engine: Engine, schema: Any) -> None:
    pieces: dict[int, str] = {}
    for number in range(4):
        how = {"temperature": 2.0, "top_p": 1.0, "seed": number} if number else GREEDY
        engine.submit(number, ask(f"text {number}", schema=schema, max_tokens=1200, **how))
    ends = drain(engine, pieces)
    for number, end in ends.items():
        assert isinstance(end, Generated), end
        value = json.loads(end.text)
        jsonschema.Draft202012Validator(schema).validate(value)
        assert end.structured == value
        assert (end.finish_reason, pieces[number]) == ("stop", end.text)


def test_recursion(engine: Engine) -> None:
    nodes = {"node": record(v={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})}
    schema = {"$ref": "#/$defs/node", "$defs": nodes}
    for number in range(8):
        engine.submit(number, ask(schema=schema, max_tokens=300, temperature=5.0, top_p=1.0, seed=number))
    whole = [end for end in drain(engine).values() if end.finish_reason == "stop"]
    assert whole
    for end in whole:
        jsonschema.Draft202012Validator(schema).validate(json.loads(end.text))


def test_any_json(engine: Engine) -> None:
    for number in range(8):
        engine.submit(number, ask(schema=True, max_tokens=60, temperature=1.5, top_p=1.0, seed=number))
    for end in drain(engine).values():
        if end.finish_reason == "stop":
            json.loads(end.text)
        else:
            assert (end.finish_reason, end.structured) == ("length", None)


def test_a_grammar(engine: Engine) -> None:
    lark = 'start: verb " " NOUN\nverb: "take" | "drop"\nNOUN: /[a-z]{3,6}/'
    end = alone(engine, ask(grammar=lark, max_tokens=40))
    verb, noun = end.text.split(" ")
    assert verb in ("take", "drop")
    assert noun.isalpha()
    assert 3 <= len(noun) <= 6
    assert (end.finish_reason, end.structured) == ("stop", None)


def test_an_answer_may_end_where_the_rule_accepts(engine: Engine, loaded: LoadedModel) -> None:
    (eos,) = loaded.tokenizer.eos_token_ids
    end = alone(engine, ask(grammar="start: /[a-z]{3,}/", logit_bias={str(eos): 500.0}, max_tokens=40, **GREEDY))
    assert (end.finish_reason, len(end.text) >= 3) == ("stop", True)
    assert end.completion_tokens <= 4


def test_options_still_count(engine: Engine) -> None:
    same = [alone(engine, ask(schema=SHORT, temperature=1.5, seed=5)).text for _ in range(2)]
    assert same[0] == same[1]
    end = alone(engine, ask(schema={"enum": ["yes", "no"]}, logprobs=2, **GREEDY))
    assert end.logprobs is not None
    assert len(end.logprobs) == end.completion_tokens
    assert all(entry["logprob"] <= 0 and len(entry["top"]) == 2 for entry in end.logprobs)
    pushed = alone(engine, ask(schema={"enum": ["a", "b"]}, logit_bias=_tokens(engine, "b"), **GREEDY))
    assert pushed.structured == "b"


def _tokens(engine: Engine, text: str) -> dict[str, float]:
    return {str(token): 900.0 for token in engine._loaded.tokenizer.encode(text, add_special_tokens=False)}


# --- beside others --------------------------------------------------------------------------------------------------


def test_free_rows_beside_constrained_ones_are_as_alone(engine: Engine) -> None:
    texts = ["hello", "the quick brown fox", "a"]
    wanted = [alone(engine, ask(text, max_tokens=40, **GREEDY)).text for text in texts]
    for number, text in enumerate(texts):
        engine.submit(number, ask(text, max_tokens=40, **GREEDY))
        engine.submit(10 + number, ask(text, schema=SCHEMAS[15], max_tokens=200, temperature=1.0))
        engine.step()
    ends = drain(engine)
    assert [ends[number].text for number in range(3)] == wanted
    for number in range(10, 13):
        jsonschema.validate(ends[number].structured, SCHEMAS[15])


def test_others_decode_while_a_rule_is_compiled(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded, max_batch=4, prefill_step=16)
    slow = Future[Any]()
    monkeypatch.setattr(engine._compiler, "compile", lambda rule: slow)
    engine.submit(0, ask(schema=SMALL))
    engine.submit(1, ask(schema=SMALL))
    assert (engine.busy, engine.active, engine.waiting) == (True, 0, 2)
    assert engine.step().ended == []
    monkeypatch.undo()
    assert alone_beside(engine, 2, ask("hello", max_tokens=5, **GREEDY)).finish_reason == "length"
    (cancelled,) = engine.cancel(1).ended
    assert (cancelled[0], cancelled[1].finish_reason) == (1, "cancelled")  # type: ignore[union-attr]
    rule = read_rule(SMALL, None)
    assert rule is not None
    slow.set_result(engine._compiler.compile(rule).result(30))
    assert 3 <= drain(engine)[0].structured["a"] <= 12


def alone_beside(engine: Engine, number: int, request: Generate) -> Generated:
    engine.submit(number, request)
    ends: dict[int, Any] = {}
    while number not in ends:
        note(engine.step(), ends)
    return ends[number]  # type: ignore[no-any-return]


def test_a_rule_that_cannot_be_compiled_costs_its_own_request(engine: Engine) -> None:
    engine.submit(0, ask(max_tokens=5, **GREEDY))
    early: dict[int, Any] = {}
    for number, rule in ((1, {"schema": {"not": {"type": "null"}}}), (2, {"grammar": "start: a b"})):
        try:
            engine.submit(number, ask(**rule))
        except RpcError as error:  # it was compiled before anyone had to wait
            early[number] = error
    with pytest.raises(InvalidParams):
        engine.submit(3, ask(schema={}, grammar="start: /a/"))
    ends = drain(engine) | early
    assert isinstance(ends[0], Generated)
    assert isinstance(ends[1], Unsupported)
    assert isinstance(ends[2], InvalidParams)


def test_a_constraint_that_raises_costs_its_own_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(engine, ask(max_tokens=30, **GREEDY)).text
    follow, calls = Constraint.follow, []

    def broken(self: Constraint, newest: int) -> bytes:
        calls.append(newest)
        if len(calls) == 7:
            raise ZeroDivisionError("in a constraint")
        return follow(self, newest)

    monkeypatch.setattr(Constraint, "follow", broken)
    engine.submit(0, ask(max_tokens=30, **GREEDY))
    engine.submit(1, ask(schema={"type": "string", "minLength": 100}, **GREEDY))
    ends = drain(engine)
    assert isinstance(ends[1], InternalError)
    assert ends[0].text == wanted
    monkeypatch.undo()  # the rule is as good as new
    assert alone(engine, ask(schema={"type": "string", "minLength": 100}, max_tokens=5, **GREEDY)).text


def test_a_rule_that_takes_too_long_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "SLOW_S", 0.0)
    monkeypatch.setattr(constraints, "SLOW_TOTAL_S", 0.0)
    engine.submit(0, ask(schema={"type": "string", "minLength": 100}, **GREEDY))
    error = drain(engine)[0]
    assert isinstance(error, InvalidParams)
    assert (error.details["field"], "too complex" in error.message) == ("schema", True)


# --- cut short ------------------------------------------------------------------------------------------------------


def test_what_is_cut_short_has_no_value(engine: Engine) -> None:
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 300}
    end = alone(engine, ask(schema=long, max_tokens=10, **GREEDY))
    assert (end.finish_reason, end.structured, end.completion_tokens) == ("length", None, 10)
    engine.submit(0, ask(schema=long, **GREEDY))
    while not engine.active:
        engine.step()
    ((_, cancelled),) = engine.cancel(0).ended
    assert (cancelled.finish_reason, cancelled.structured) == ("cancelled", None)  # type: ignore[union-attr]
    stopped = alone(engine, ask(schema={"const": "abcdef"}, stop=["cd"], **GREEDY))
    assert (stopped.text, stopped.finish_reason, stopped.structured) == ('"ab', "stop", None)


def test_the_last_token_that_there_is_room_for_may_complete_it(engine: Engine) -> None:
    whole = alone(engine, ask(schema={"const": [1, 2]}, **GREEDY))
    again = alone(engine, ask(schema={"const": [1, 2]}, max_tokens=whole.completion_tokens, **GREEDY))
    assert (again.finish_reason, again.structured) == ("stop", [1, 2])


# --- thoughts -------------------------------------------------------------------------------------------------------


def think(engine: Engine, spelled: list[int], **options: Any) -> tuple[Generated, str]:
    """An answer that begins with these tokens, and what was streamed as its reasoning."""
    steps = iter(spelled)

    def force(_context: mx.array, logits: mx.array) -> mx.array:
        token = next(steps, None)
        return logits if token is None else mx.full(logits.shape, -1000.0).at[:, token].add(1000.0)

    engine.submit(0, ask(thinking=True, **options, **GREEDY))
    while not (pending := engine._generator.plain._unprocessed_sequences):
        engine.step()
        if engine._running:
            break
    assert pending, "the request began before its processor was set"
    pending[0] = (*pending[0][:6], (force,), pending[0][7])
    thoughts: dict[int, str] = {}
    end = drain(engine, {}, thoughts)[0]
    assert isinstance(end, Generated), end
    return end, thoughts.get(0, "")


@pytest.mark.parametrize("marker", ["</think>", "token by token"])
def test_the_constraint_begins_after_the_thought(engine: Engine, loaded: LoadedModel, marker: str) -> None:
    alone(engine, ask(schema=SMALL))  # compiled from here on
    encode = loaded.tokenizer.encode
    thought = encode("{well", add_special_tokens=False)
    spelled = ["</think>"] if marker == "</think>" else ["<", "/", "t", "h", "i", "n", "k", ">"]
    ending = [token for part in spelled for token in encode(part, add_special_tokens=False)]
    (eos,) = loaded.tokenizer.eos_token_ids
    end, streamed = think(engine, [*thought, *ending], schema=SMALL, max_tokens=200, logit_bias={str(eos): 0.0})
    assert end.reasoning == streamed == "{well"
    jsonschema.validate(end.structured, SMALL)


def test_a_thought_does_not_end_the_answer(engine: Engine, loaded: LoadedModel) -> None:
    (eos,) = loaded.tokenizer.eos_token_ids
    end = alone(engine, ask(thinking=True, schema=SMALL, max_tokens=12, logit_bias={str(eos): 900.0}, **GREEDY))
    assert (end.finish_reason, end.text, end.structured) == ("length", "", None)
    assert end.completion_tokens == 12


def test_markers_within_an_answer_are_text(engine: Engine) -> None:
    text = "a <think>b</think> <|im_end|> c"
    end = alone(engine, ask(schema={"const": text}, **GREEDY))
    assert (end.structured, end.reasoning) == (text, None)
    assert alone(engine, ask(grammar=f'start: "{text}"', **GREEDY)).text == text


# --- masks and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8, 9, 31, 32, 33, 100])
def test_masks_by_bit(width: int) -> None:
    random = np.random.default_rng(width)
    allowed = random.random((3, 128)) < 0.5
    masks = {row: np.packbits(allowed[row], bitorder="little").tobytes() for row in (0, 2)}
    logits = mx.array(random.normal(size=(3, width)).astype(np.float32))
    masked, before = np.array(apply_masks(logits, masks)), np.array(logits)
    assert (masked[1] == before[1]).all()
    for row in (0, 2):
        assert (masked[row][allowed[row, :width]] == before[row][allowed[row, :width]]).all()
        assert np.isneginf(masked[row][~allowed[row, :width]]).all()
        assert allows_any(masks[row], width) == allowed[row, :width].any()


def test_masks_of_half_precision() -> None:
    masked = apply_masks(mx.ones((1, 9), dtype=mx.float16), {0: b"\x01\x00\x00\x00"})
    assert masked.dtype == mx.float16
    assert masked.tolist()[0] == [1.0] + [float("-inf")] * 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("9007199254740992", 2**53), ("9007199254740993", float(2**53)), ("-1" + "0" * 30, -1e30),
     ('"\\u00e9\\ud83d\\ude00"', "\u00e9\U0001f600"), ("[1.5,null]", [1.5, None])],
)  # fmt: skip
def test_values_that_can_be_carried(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["1e999", "-1e999", '"\\ud83d"', "[" * 70 + "]" * 70, "[" * 90_000, "1" + "0" * 400, "[1", "NaN",
             "[" + "1," * 70_000 + "1]", '{"\\udc00": 1}'],
)  # fmt: skip
def test_values_that_cannot(text: str) -> None:
    with pytest.raises(ValueError):
        parse_value(text)
