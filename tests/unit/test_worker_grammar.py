"""Schemas and grammars as they are compiled: what is refused, and by which name; what is kept; how long it may take."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mlxd.worker import grammar, trial
from mlxd.worker.grammar import Compiled, Compiler, Rule, can_constrain, read_rule
from mlxd.worker.load import LoadedModel, load
from mlxd_client.errors import InvalidParams, RpcError, Unsupported
from support import tiny_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")), lambda fraction: None)


@pytest.fixture(scope="module")
def compiler(loaded: LoadedModel) -> Compiler:
    return Compiler(loaded.tokenizer, loaded.vocabulary, set(loaded.tokenizer.eos_token_ids))


def compiled(compiler: Compiler, schema: Any = None, lark: str | None = None) -> Compiled:
    rule = read_rule(schema, lark)
    assert rule is not None
    return compiler.compile(rule).result(30)


def refused(compiler: Compiler, schema: Any = None, lark: str | None = None) -> RpcError:
    with pytest.raises(RpcError) as caught:
        compiled(compiler, schema, lark)
    return caught.value


TREE: dict[str, Any] = {"type": "object", "properties": {"value": {"type": "integer"}, "child": {"$ref": "#"}}}
TREE_IN_DEFS: dict[str, Any] = {
    "type": "object", "properties": {"child": {"$ref": "#/$defs/tree"}}, "required": ["child"]
}  # fmt: skip


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


# --- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        (False, "false"),
        ({"$ref": "http://example.org/a.json"}, "example.org"),
        ({"$ref": "file:///etc/passwd"}, "passwd"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"type": "wizard"}, "wizard"),
        ({"type": "string", "pattern": "(a"}, "unclosed"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible"),
        ({"enum": []}, "empty"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
        (TREE | {"required": ["value", "child"]}, "no end"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}}},
            "no end",
        ),
        ({"anyOf": [TREE_IN_DEFS, {"allOf": [{"$ref": "#/$defs/tree"}]}], "$defs": {"tree": TREE_IN_DEFS}}, "no end"),
        ({"description": "x" * 300_000}, "limit"),
        ({"type": "object", "properties": {f"k{i}": {} for i in range(1001)}}, "limit"),
        ({"type": "object", "properties": {f"k{i}": {} for i in range(1000)}}, "complex"),
        (nested(13), "limit"),
        (
            {"allOf": [{"properties": {f"k{i}_{j}": {"type": "integer"} for j in range(200)}} for i in range(20)]},
            "too large",
        ),
    ],
)
def test_schemas_that_nothing_can_follow(compiler: Compiler, schema: Any, what: str) -> None:
    error = refused(compiler, schema)
    assert isinstance(error, InvalidParams)
    assert error.details["field"] == "schema"
    assert what in error.message
    assert "verbose" not in error.message
    assert "llguidance" not in error.message


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {}}, "if"),
        ({"properties": {"a": {"contains": {}}}}, "contains"),
        ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "string", "format": "wizardry"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ],
)
def test_keywords_that_cannot_be_enforced(compiler: Compiler, schema: Any, keyword: str) -> None:
    error = refused(compiler, schema)
    assert isinstance(error, Unsupported)
    assert (error.details["option"], error.details["keyword"]) == ("schema", keyword)


@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        TREE | {"required": ["value"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["a"]},
    ],
)
def test_recursion_that_can_end(compiler: Compiler, schema: Any) -> None:
    assert compiled(compiler, schema)


def test_long_chains_of_references(compiler: Compiler) -> None:
    for length in (150, 800):
        chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"minimum": i}]} for i in range(length)}
        schema = {"$ref": "#/$defs/d0", "$defs": chain | {f"d{length}": {"type": "integer"}}}
        assert follows(compiled(compiler, schema), str(length))
        assert not follows(compiled(compiler, schema), str(length - 2))


def test_chains_that_take_more_stack_than_there_is(compiler: Compiler) -> None:
    schema = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3500)}
    lark = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(15_000)) + '\nr15000: "a"'
    for rule in ({"schema": {"$ref": "#/$defs/d0", "$defs": schema | {"d3500": {}}}}, {"lark": lark}):
        error = refused(compiler, **rule)
        assert isinstance(error, InvalidParams)
        assert "too complex" in error.message


# --- grammars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lark", "what"),
    [
        ("root ::= 'a'", "grammar"),
        ('start: "a" | foo', "foo"),
        ('foo: "a"', "start"),
        ('start: "a" {', "1(13)"),
        ('start: ""', "matches nothing"),
        ("start: X\nX: /a/ & /b/", "matches nothing"),
        ("start: a\na: b\nb: a", "matches nothing"),
        ('start: "a" start', "no end"),
        ("start: @other", "other"),
        ("start: <|wizard|>", "wizard"),
        ("x" * 300_000, "limit"),
        ("start: \ud800", "grammar"),
    ],
)
def test_grammars_that_nothing_can_follow(compiler: Compiler, lark: str, what: str) -> None:
    error = refused(compiler, None, lark)
    assert isinstance(error, InvalidParams)
    assert error.details["field"] == "grammar"
    assert what in error.message


def test_a_schema_within_a_grammar_is_held_to_the_same(compiler: Compiler) -> None:
    assert isinstance(refused(compiler, None, 'start: %json {"not": {}}'), Unsupported)
    lark = 'start: %json {"const": {"a": [1, 2]}}'
    assert follows(compiled(compiler, None, lark), '{"a": [1,2]}')
    assert not follows(compiled(compiler, None, lark), '{ "a": [1,2]}')
    assert not follows(compiled(compiler, None, lark), '{"a":  [1,2]}')


def test_one_rule_at_a_time() -> None:
    with pytest.raises(InvalidParams) as caught:
        read_rule({}, "start: /a/")
    assert caught.value.details["field"] == "grammar"
    assert read_rule(None, None) is None
    assert read_rule(True, None) == Rule("schema", "{}")


# --- white space, regular expressions -------------------------------------------------------------------------------


def follows(rule: Compiled, text: str) -> bool:
    """Whether `text` is a whole answer."""
    matcher, tokens = rule.fresh(), rule.tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"a":[1,{"b":2}]}', True),
        ('{"a": [1, {"b": 2}]}', True),
        ('{"a":  1}', False),
        ('{ "a":1}', False),
        ('{"a":1 }', False),
        ('{"a":1}\n', False),
        ("\n1", False),
        ("[1,\n2]", False),
    ],
)
def test_white_space_cannot_run_away(compiler: Compiler, text: str, fits: bool) -> None:
    assert json.loads(text)
    assert follows(compiled(compiler, True), text) is fits


@pytest.mark.parametrize(
    "pattern",
    ["(a|aa)+$", "(a+)+b", ".*a.{2000}", "(a{1,1000}){1,1000}", "((a{1,100}){1,100}){1,100}", "(.*a){30}",
     "\\w{1,500}@\\w{1,500}", "[\\p{L}\\p{N}]{1,3000}", "(x+x+)+y"],
)  # fmt: skip
def test_regular_expressions_that_explode_elsewhere(compiler: Compiler, pattern: str) -> None:
    began = time.monotonic()
    rule = compiled(compiler, {"type": "string", "pattern": pattern})
    matcher = rule.fresh()
    for _ in range(50):
        mask = matcher.compute_bitmask()
        token = next((i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1), None)
        if token is None or matcher.is_error() or not matcher.consume_token(token) or matcher.is_stopped():
            break
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("schema", "lark"),
    [
        ({"allOf": [{"type": "string", "pattern": f"a{i}.*b{i}"} for i in range(100)]}, None),
        ({"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {} for i in range(3000)}}, None),
        (None, "start: A\nA: " + " & ".join(f"/.*a{i}.*b{i}.*/" for i in range(300))),
    ],
)
def test_regular_expressions_that_explode_together(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, schema: Any, lark: str | None
) -> None:
    monkeypatch.setattr(trial, "WALL_S", 1.0)
    error = refused(compiler, schema, lark)
    assert isinstance(error, InvalidParams)
    assert "too complex" in error.message


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_rule_is_compiled_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(loaded.tokenizer, loaded.vocabulary, set(loaded.tokenizer.eos_token_ids))
    first = compiler.compile(Rule("schema", "{}"))
    assert compiler.compile(Rule("schema", "{}")) is first
    assert compiler.compile(Rule("grammar", "start: /a/")) is not first
    assert isinstance(first.result(30), Compiled)
    failed = compiler.compile(Rule("schema", '{"enum":[]}'))
    assert compiler.compile(Rule("schema", '{"enum":[]}')) is failed

    monkeypatch.setattr(grammar, "KEPT", 2)
    compiler.compile(Rule("schema", "{}"))
    compiler.compile(Rule("schema", '{"type":"null"}'))
    assert compiler.compile(Rule("schema", "{}")) is first
    assert compiler.compile(Rule("schema", '{"enum":[]}')) is not failed

    monkeypatch.setattr(grammar, "KEPT_BYTES", 20)
    compiler.compile(Rule("schema", '{"type":"boolean"}'))
    assert compiler.compile(Rule("schema", "{}")) is not first
    compiler.close()


def test_copies_share_nothing(compiler: Compiler) -> None:
    rule = compiled(compiler, None, 'start: "ab" | "cd"')
    one, other = rule.fresh(), rule.fresh()
    assert one.consume_tokens(rule.tokenizer.tokenize_str("ab"))
    assert not other.is_accepting()
    assert follows(rule, "cd")


# --- tokenizers -----------------------------------------------------------------------------------------------------


class Backend:
    """A tokenizer whose decoder describes itself as this."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self.backend_tokenizer = self
        self.decoder = self if decoder is not None else None
        self._described = json.dumps(decoder).encode()

    def __getstate__(self) -> bytes:
        return self._described


@pytest.mark.parametrize(
    ("decoder", "usable"),
    [
        ({"type": "ByteLevel"}, True),
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]}, True),
        ({"type": "WordPiece"}, False),
        ({"type": "Sequence", "decoders": [{"type": "Metaspace"}]}, False),
        (None, False),
    ],
)
def test_which_tokenizers_tell_their_bytes(decoder: dict[str, Any] | None, usable: bool) -> None:
    tokenizer = Backend(decoder)
    assert can_constrain(tokenizer) is usable
    if not usable:
        with pytest.raises(Unsupported) as caught:
            Compiler(tokenizer, 10, {0}).compile(Rule("schema", "{}"))
        assert caught.value.details["option"] == "schema"


def test_a_tokenizer_that_cannot_be_read_after_all() -> None:
    with pytest.raises(Unsupported) as caught:
        Compiler(Backend({"type": "ByteLevel"}), 10, {0}).compile(Rule("grammar", "start: /a/")).result(30)
    assert caught.value.details["option"] == "grammar"


def test_capabilities_say_so(loaded: LoadedModel) -> None:
    assert {"structured", "grammar"} <= set(loaded.capabilities)
