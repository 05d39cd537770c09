"""Tool calls on real, tiny models of the families that mlx_lm's parsers read: whole or malformed, whatever they say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from mlxd.childwire import Calls, CountTokens, Generate, Generated
from mlxd.worker import calls
from mlxd.worker.engine import Engine
from mlxd.worker.load import load
from mlxd.worker.running import Outcome
from mlxd_client.errors import InvalidParams, RpcError, Unsupported
from mlxd_client.types import MalformedToolCall, ToolCall
from support import tiny_model, tool_templates

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"the {name}"} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function | more}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


WEATHER = tool("get_weather", record(city={"type": "string", "minLength": 2, "maxLength": 8}))
CLOCK = tool("clock")
TOOLS = [WEATHER, CLOCK]
PARIS = {
    "json_tools": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "mistral_args": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>",
    "glm47": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
    "function_gemma": "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>',
    "pythonic": '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "longcat": "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
    "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>",
    "minicpm5": '<function name="get_weather"><param name="city">Paris</param></function>',
}
OPEN = {"mistral", "mistral_args"}  # their calls end the answer


class Engines(dict[str, Engine]):
    """By family; each is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> Engine:
        loaded = load(str(tool_templates.build(self.folder / name, name)), lambda fraction: None)
        self[name] = Engine(loaded, max_batch=4, prefill_step=512)
        return self[name]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(engines: dict[str, Engine]) -> Engine:
    return engines["json_tools"]


def ask(text: str = "what is the weather?", **more: Any) -> Generate:
    fields = {name: more.pop(name) for name in ("tool_choice", "messages", "stream") if name in more}
    options = GREEDY | {"max_tokens": 600, "speculation": "off"} | more  # `force` counts the steps
    fields = {"messages": [{"role": "user", "content": text}], "tools": options.pop("tools", TOOLS)} | fields
    return Generate(kind="chat", options=options, **({"stream": True} | fields))


class Told:
    """What one request was told, in order."""

    def __init__(self) -> None:
        self.parts: list[Any] = []  # texts, calls
        self.thought = ""
        self.end: Any = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[ToolCall]:
        return [call for part in self.parts if isinstance(part, Calls) for call in part.tool_calls]

    @property
    def malformed(self) -> list[MalformedToolCall]:
        return [call for part in self.parts if isinstance(part, Calls) for call in part.malformed_tool_calls]


def run(engine: Engine, told: dict[int, Told] | None = None) -> dict[int, Told]:
    told = {} if told is None else told
    while engine.busy:
        outcome = engine.step()
        for number, text, reasoning in outcome.pieces:
            one = told.setdefault(number, Told())
            one.thought += reasoning
            if text:
                one.parts.append(text)
        for made in outcome.calls:
            told.setdefault(made.id, Told()).parts.append(made)
        for number, end in outcome.ended:
            told.setdefault(number, Told()).end = end
    for one in told.values():
        if isinstance(one.end, Generated):
            assert one.text == one.end.text
            assert one.calls == (one.end.tool_calls or [])
            assert one.malformed == (one.end.malformed_tool_calls or [])
            msgspec.msgpack.encode(one.end)
    return told


def force(engine: Engine, tokens: list[int]) -> None:
    """Have the request that was submitted last say these tokens."""
    steps = iter([*tokens, *[engine._loaded.tokenizer.eos_token_id] * 3])

    def processor(_context: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -1000.0).at[:, next(steps)].add(1000.0)

    rules = engine._arrivals.compiling
    for _, compiled in rules.waiting.values():
        compiled.result()
    rules.go_on(Outcome())
    pending = engine._generator.plain._unprocessed_sequences
    pending[-1] = (*pending[-1][:6], (processor,), pending[-1][7])


def say(engine: Engine, text: str, *, single: bool = False, request: Generate | None = None) -> Told:
    """The model says `text`, with its markers as tokens, or `single` characters one by one."""
    engine.submit(0, request or ask())
    encode = engine._loaded.tokenizer.encode
    parts = list(text) if single else [text]
    force(engine, [token for part in parts for token in encode(part, add_special_tokens=False)])
    return run(engine)[0]


# --- calls are read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [False, True], ids=["tokens", "characters"])
@pytest.mark.parametrize("family", PARIS)
def test_a_call_of_each_family(engines: dict[str, Engine], family: str, single: bool) -> None:
    told = say(engines[family], "Let me look. " + PARIS[family], single=single)
    assert told.end.finish_reason == "tool_calls"
    assert told.text == "Let me look. "
    assert [(call.name, call.arguments) for call in told.calls] == [("get_weather", {"city": "Paris"})]
    assert not told.malformed


@pytest.mark.parametrize("family", sorted(PARIS.keys() - OPEN))
def test_text_goes_on_after_a_call(engines: dict[str, Engine], family: str) -> None:
    told = say(engines[family], f"one {PARIS[family]}\n\n{PARIS[family]}\n two")
    assert told.text == "one two"
    assert len({call.id for call in told.calls}) == 2
    first = next(index for index, part in enumerate(told.parts) if isinstance(part, Calls))
    assert len(told.parts[first].tool_calls) == 1  # it was told when it was complete, before the second
    assert told.end.finish_reason == "tool_calls"


def test_several_calls_of_mistrals(engines: dict[str, Engine]) -> None:
    one = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
    told = say(engines["mistral"], f'[TOOL_CALLS] [{one}, {{"name": "clock", "arguments": {{}}}}]')
    assert [call.name for call in told.calls] == ["get_weather", "clock"]
    told = say(engines["mistral_args"], "[TOOL_CALLS]clock[ARGS]{}" + PARIS["mistral_args"])
    assert [call.name for call in told.calls] == ["clock", "get_weather"]


def test_without_tools_markup_is_text(engine: Engine) -> None:
    told = say(engine, PARIS["json_tools"], request=ask(tools=[]))
    assert (told.text, told.end.tool_calls, told.end.finish_reason) == (PARIS["json_tools"], None, "stop")


def test_what_only_looks_like_a_marker_is_text(engine: Engine) -> None:
    told = say(engine, "a <tool_cal> b </tool_call> <tool_", single=True)
    assert (told.text, told.end.finish_reason) == ("a <tool_cal> b </tool_call> <tool_", "stop")


def test_a_call_in_a_thought_ends_it(engine: Engine) -> None:
    told = say(engine, f"<think>\nhm {PARIS['json_tools']}", request=ask(thinking=True))
    assert (told.thought, told.text, len(told.calls)) == ("hm ", "", 1)


def test_a_stop_text_counts_outside_of_calls(engine: Engine) -> None:
    told = say(engine, f"ok {PARIS['json_tools']} and Paris too", request=ask(stop=["Paris"]))
    assert (told.text, len(told.calls), told.end.finish_reason) == ("ok and ", 1, "tool_calls")


# --- what is no call ------------------------------------------------------------------------------------------------


def call(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    ("body", "name", "reason"),
    [
        ("", None, "no call"),
        ("not json", None, "no call"),
        ("[]", None, "no call"),
        ("3", None, "names no tool"),
        ('{"name": 3, "arguments": {}}', None, "names no tool"),
        ('{"name": "rm", "arguments": {}}', "rm", "no tool named rm"),
        ('{"name": "get_weather"}', "get_weather", "'city' is a required"),
        ('{"name": "get_weather", "arguments": []}', "get_weather", "no object"),
        ('{"name": "get_weather", "arguments": {"city": 3}}', "get_weather", "arguments.city: 3 is not"),
        ('{"name": "get_weather", "arguments": {"city": "x"}}', "get_weather", "too short"),
        ('{"name": "get_weather", "arguments": {"city": "Rome", "b": 1}}', "get_weather", "'b' was unexpected"),
        ('{"name": "clock", "arguments": {"zone": 1}}', "clock", "unexpected"),
        ('{"name": "clock", "arguments": NaN}', "clock", "no JSON"),
        ('{"name": "clock", "arguments": ' + '{"a": ' * 80 + "1" + "}" * 80 + "}", "clock", "too deep"),
        ('{"name": "\\ud800", "arguments": {}}', "?", "no tool named"),
        ("[" * 3000, None, "no call"),
    ],
)
def test_malformed_calls_say_why(engine: Engine, body: str, name: str | None, reason: str) -> None:
    tools = engine._requests.toolbox.use(ask())
    assert tools is not None
    made, (malformed,) = tools.take(body, True, None)
    assert not made
    assert (malformed.text, malformed.name) == (body, name)
    assert reason in malformed.reason
    msgspec.msgpack.encode(malformed)


def test_a_malformed_call_is_told_and_is_no_call(engine: Engine) -> None:
    told = say(engine, "a " + call('{"name": "rm", "arguments": {}}') + PARIS["json_tools"])
    assert told.text == "a "
    assert [type(part) for part in told.parts[-2:]] == [Calls, Calls]
    assert (told.malformed[0].name, told.calls[0].name) == ("rm", "get_weather")
    told = say(engine, call("nonsense"))
    assert told.end.finish_reason == "stop"
    assert (told.end.tool_calls, told.end.malformed_tool_calls[0].text) == (None, "\nnonsense\n")


@pytest.mark.parametrize("family", ["json_tools", "mistral", "mistral_args", "qwen3_coder", "glm47", "gemma4"])
def test_a_call_that_max_tokens_cuts_is_never_whole(engines: dict[str, Engine], family: str) -> None:
    engine, whole = engines[family], PARIS[family]
    tokens = len(engine._loaded.tokenizer.encode(whole, add_special_tokens=False))
    for left in (1, 3, tokens // 2):
        told = say(engine, whole, request=ask(max_tokens=tokens - left))
        assert (told.end.finish_reason, told.text, told.calls) == ("length", "", [])
        assert "before the call did" in told.malformed[0].reason
    assert told.malformed[0].text in whole


def test_an_answer_that_ends_in_a_call(engines: dict[str, Engine]) -> None:
    told = say(engines["json_tools"], PARIS["json_tools"].removesuffix("</tool_call>"))
    assert [call.arguments for call in told.calls] == [{"city": "Paris"}]  # JSON says itself that it is whole
    told = say(engines["glm47"], "<tool_call>clock<arg_key>zone</arg_key><arg_value>Eu")
    assert (told.calls, told.end.finish_reason) == ([], "stop")
    assert told.malformed[0].text.endswith("Eu")


def test_a_parser_that_fails_or_loops_costs_its_own_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(text: str, tools: Any) -> Any:
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # as parsers do
                pass

    def explode(text: str, tools: Any) -> Any:
        raise ZeroDivisionError("in a parser")

    monkeypatch.setattr(calls, "PARSER_LIMIT_S", 0.05)
    for parser, reason in ((loop, "longer than 0.05"), (explode, "ZeroDivisionError")):
        engine.submit(1, ask("another", max_tokens=30))
        monkeypatch.setattr(engine._requests.toolbox, "_parser", parser)
        engine.submit(0, ask())
        force(engine, engine._loaded.tokenizer.encode(PARIS["json_tools"], add_special_tokens=False))
        told = run(engine)
        assert reason in told[0].malformed[0].reason
        assert isinstance(told[1].end, Generated)
        assert told[1].end.completion_tokens > 1


@pytest.mark.parametrize(
    ("parsed", "arguments"),
    [
        ({"name": "any", "arguments": {"a": (1, 2), 3: None}}, {"a": [1, 2], "3": None}),
        ({"name": "any", "arguments": {"a": 2**60}}, {"a": float(2**60)}),
        ({"name": "any", "arguments": '{"a": 1}'}, {"a": 1}),
        ({"name": "any", "arguments": None}, {}),
        ({"name": "any", "arguments": {"a": {1}}}, None),
        ({"name": "any", "arguments": {"a": b"x"}}, None),
        ({"name": "any", "arguments": {"a": float("inf")}}, None),
        ({"name": "any", "arguments": {"a": "\ud800"}}, None),
        ({"name": "any", "arguments": {"a": [0] * 40_000}}, None),
        ({"name": "any", "arguments": {"a": 1j}}, None),
    ],
)
def test_arguments_are_what_the_wire_carries(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, parsed: Any, arguments: Any
) -> None:
    monkeypatch.setattr(engine._requests.toolbox, "_parser", lambda text, tools: parsed)
    tools = engine._requests.toolbox.use(ask(tools=[tool("any", {"type": "object"})]))
    assert tools is not None
    made, malformed = tools.take("x", True, None)
    assert [one.arguments for one in made] == ([] if arguments is None else [arguments])
    assert len(malformed) == (arguments is None)


def test_calls_without_end_stay_within_a_frame(engine: Engine) -> None:
    tools = engine._requests.toolbox.use(ask(stream=False))
    assert tools is not None
    for _ in range(400):
        tools.take('{"name": "clock"}', True, None)
    assert (len(tools.calls), len(tools.malformed)) == (calls.MAX_CALLS, calls.MAX_CALLS)
    assert tools.malformed[-1].text.count("clock") == 400 - 2 * calls.MAX_CALLS + 1
    assert len({call.id for call in tools.calls}) == len(tools.calls)


def test_a_models_own_ids(engines: dict[str, Engine]) -> None:
    told = say(engines["kimi_k2"], PARIS["kimi_k2"] + PARIS["kimi_k2"])
    first, second = told.calls
    assert first.id == "functions.get_weather:0"
    assert second.id != first.id


# --- tool_choice ----------------------------------------------------------------------------------------------------

# What spells arguments one by one, and how it would spell a note.
FLAT = {
    "qwen3_coder": "<tool_call>\n<function=note>\n<parameter=text>\n{}\n</parameter>\n<parameter=count>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>note<arg_key>text</arg_key><arg_value>{}</arg_value><arg_key>count</arg_key><arg_value>3"
    "</arg_value></tool_call>",
    "function_gemma": "<start_function_call>call:note{{text:<escape>{}<escape>,count:3}}<end_function_call>",
    "gemma4": '<|tool_call>call:note{{text:<|"|>{}<|"|>,count:3}}<tool_call|>',
    "pythonic": '<|tool_call_start|>[note(text="{}", count=3)]<|tool_call_end|>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="note">\n<parameter name="text">{}</parameter>\n'
    '<parameter name="count">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "longcat": "<longcat_tool_call>note\n<longcat_arg_key>text</longcat_arg_key>\n<longcat_arg_value>{}"
    "</longcat_arg_value>\n<longcat_arg_key>count</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n"
    "</longcat_tool_call>",
}
NOTE = tool("note", record(text={"type": "string"}, count={"type": "integer"}))
PICK = tool("pick", {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 2, "maximum": 4},
        "near": {"type": "boolean"}, "unit": {"$ref": "#/$defs/unit", "type": "integer"},
    },
    "required": ["near"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": [5, 7]}},
})  # fmt: skip


@pytest.mark.parametrize("family", FLAT)
def test_a_call_can_be_required_argument_by_argument(engines: dict[str, Engine], family: str) -> None:
    engine = engines[family]
    for number in range(3):
        options = {"temperature": 5.0, "top_p": 1.0, "seed": number, "max_tokens": 300}
        engine.submit(number, ask(tools=[PICK, NOTE], tool_choice={"name": "pick"}, **options))
    told = run(engine)
    for one in told.values():
        assert (one.end.finish_reason, one.malformed, one.text) == ("tool_calls", [], ""), one.end
        assert [call.name for call in one.calls] == ["pick"]


@pytest.mark.parametrize("given", ["near:true", "city:{}Rome{},near:false", "days:2,near:true,unit:7"])
def test_optional_arguments_come_and_go(engines: dict[str, Engine], given: str) -> None:
    text = f"<|tool_call>call:pick{{{given.format('<|' + chr(34) + '|>', '<|' + chr(34) + '|>')}}}<tool_call|>"
    told = say(engines["gemma4"], text, request=ask(tools=[PICK], tool_choice="required"))
    assert [*told.calls[0].arguments] == [part.split(":")[0] for part in given.split(",")]
    assert told.end.completion_tokens < 100


@pytest.mark.parametrize("family", FLAT)
def test_any_text_can_be_an_argument(engines: dict[str, Engine], family: str) -> None:
    """The rule lets the model say what its family would."""
    text = "it is <b>fine</b> at 5, a:b & c < d"
    told = say(engines[family], FLAT[family].format(text), request=ask(tools=[NOTE], tool_choice={"name": "note"}))
    assert [call.arguments for call in told.calls] == [{"text": text, "count": 3}], told.end
    assert told.end.completion_tokens < 300


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        (record(a={"type": "string", "maxLength": 3}), "maxLength"),
        (record(a={"type": ["string", "null"]}), "type"),
        (record(a={"enum": [1, "x"]}), "type"),
        (record(a={"anyOf": [{"type": "string"}]}), "type"),
        ({"anyOf": [record(a={"type": "string"})]}, "anyOf"),
        ({"type": "object", "required": ["a"]}, "required"),
        (record(**{"a b": {"type": "string"}}), "properties"),
    ],
)
def test_what_cannot_be_spelled_is_refused(engines: dict[str, Engine], schema: Any, keyword: str) -> None:
    with pytest.raises(Unsupported) as caught:
        engines["qwen3_coder"].submit(0, ask(tools=[tool("x", schema)], tool_choice="required"))
    assert caught.value.details == {"option": "tools", "keyword": keyword}
    told = say(engines["qwen3_coder"], "no", request=ask(tools=[tool("x", schema)]))  # not required, it is fine
    assert told.text == "no"


def test_a_call_that_its_parser_could_not_read_is_refused(engines: dict[str, Engine]) -> None:
    for family, name in (("longcat", "clock"), ("function_gemma", "get-time"), ("pythonic", "class")):
        with pytest.raises(Unsupported) as caught:
            engines[family].submit(0, ask(tools=[tool(name)], tool_choice="required"))
        assert caught.value.details["option"] == "tools"


ENFORCED = ["json_tools", "mistral", "mistral_args", "kimi_k2"]


@pytest.mark.parametrize("family", ENFORCED)
def test_a_call_can_be_required(engines: dict[str, Engine], family: str) -> None:
    engine = engines[family]
    choices: list[Any] = ["required", {"name": "get_weather"}, {"type": "function", "function": {"name": "clock"}}]
    for number, choice in enumerate(choices):
        options = {"temperature": 1.5, "seed": number, "max_tokens": 120}
        engine.submit(number, ask(f"text {number}", tool_choice=choice, **options))
    engine.submit(3, ask("free", tools=[], max_tokens=20))
    told = run(engine)
    for number in range(3):
        one = told[number]
        if number or one.end.finish_reason != "length":  # a random model may go on calling
            assert (one.end.finish_reason, one.malformed) == ("tool_calls", []), one.end
        assert one.text == ""
    assert [call.name for call in told[1].calls] == ["get_weather"]
    assert 2 <= len(told[1].calls[0].arguments["city"]) <= 8
    assert [(call.name, call.arguments) for call in told[2].calls] == [("clock", {})]
    assert {call.name for call in told[0].calls} <= {"get_weather", "clock"}
    engine.submit(3, ask("free", tools=[], max_tokens=20))
    assert run(engine)[3].text == told[3].text  # company changes nothing


def test_a_family_whose_calls_cannot_be_required(engines: dict[str, Engine]) -> None:
    with pytest.raises(Unsupported, match="minicpm5") as caught:
        engines["minicpm5"].submit(0, ask(tool_choice="required"))
    assert caught.value.details["option"] == "tool_choice"
    assert not engines["minicpm5"].busy


def test_a_required_call_uses_the_markers_tokens(engine: Engine) -> None:
    tokenizer = engine._loaded.tokenizer
    engine.submit(0, ask(tool_choice={"name": "clock"}, logprobs=0))
    end = run(engine)[0].end
    assert end.logprobs[0]["token_id"] == tokenizer.encode("<tool_call>", add_special_tokens=False)[0]
    assert [call.name for call in end.tool_calls] == ["clock"]


def test_after_a_thought_a_call_can_be_required(engine: Engine) -> None:
    engine.submit(0, ask(tool_choice={"name": "clock"}, thinking_budget=7, temperature=1.5, seed=3))
    told = run(engine)[0]
    assert (told.end.finish_reason, [call.name for call in told.calls]) == ("tool_calls", ["clock"])
    assert told.thought.strip()
    assert 0 < told.end.reasoning_tokens <= 7


def test_with_none_nothing_is_called(engine: Engine) -> None:
    start = engine._loaded.tokenizer.tool_call_start_tokens[0]
    request = ask(tool_choice="none", logit_bias={str(start): 900.0}, max_tokens=8)
    engine.submit(0, request)
    assert "<tool_call>" not in run(engine)[0].end.text
    told = say(engine, PARIS["json_tools"], single=True, request=ask(tool_choice="none"))
    assert (told.calls, told.malformed[0].reason, told.end.finish_reason) == ([], "tool_choice is none", "stop")


def test_a_grammar_may_spell_a_call(engine: Engine) -> None:
    grammar = "start: " + json.dumps("ok " + PARIS["json_tools"])
    engine.submit(0, ask(grammar=grammar))
    told = run(engine)[0]
    assert (told.text, told.calls[0].arguments, told.end.finish_reason) == ("ok ", {"city": "Paris"}, "tool_calls")


# --- bad input ------------------------------------------------------------------------------------------------------

REMOTE = "https://example.org/schema.json"


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        ({"tools": [WEATHER, CLOCK, WEATHER]}, InvalidParams, "tools[2].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, InvalidParams, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, InvalidParams, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, InvalidParams, "tools[0].function"),
        ({"tools": [{"name": "clock"}]}, InvalidParams, "tools[0].type"),
        ({"tools": [tool("a", description=3)]}, InvalidParams, "tools[0].function.description"),
        ({"tools": [tool("a", [])]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", {"type": "string"})]}, InvalidParams, "tools[0].function.parameters.type"),
        ({"tools": [tool("a", {"properties": 3})]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", record(x={"type": "text"}))]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", record(x={"pattern": "("}))]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", record(x={"$ref": REMOTE}))]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", {"$ref": "#/$defs/none"})]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", {"$ref": "#"})]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool("a", {"$id": REMOTE, "$ref": "#x"})]}, InvalidParams, "tools[0].function.parameters"),
        ({"tools": [tool(f"t{number}") for number in range(129)]}, InvalidParams, "tools"),
        ({"tools": [tool("a", description="x" * 600_000)]}, InvalidParams, "tools"),
        ({"tool_choice": "perhaps"}, InvalidParams, "tool_choice"),
        ({"tool_choice": {"name": "rm"}}, InvalidParams, "tool_choice"),
        ({"tool_choice": {"name": "clock", "more": 1}}, InvalidParams, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, InvalidParams, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": "clock"}}, InvalidParams, "tool_choice"),
        ({"tool_choice": {}}, InvalidParams, "tool_choice"),
        ({"tool_choice": "required", "schema": True}, InvalidParams, "tool_choice"),
        ({"tool_choice": {"name": "clock"}, "grammar": 'start: "a"'}, InvalidParams, "tool_choice"),
        ({"schema": True}, InvalidParams, "schema"),
        ({"n": 2}, Unsupported, "n"),
        (
            {"tool_choice": "required", "tools": [tool("a", record(x={"type": "array", "uniqueItems": True}))]},
            Unsupported,
            "tools",
        ),
    ],
)
def test_bad_tools_are_refused_by_name(
    engine: Engine, fields: dict[str, Any], error: type[RpcError], name: str
) -> None:
    try:
        engine.submit(0, ask(**fields))
        got: Any = run(engine)[0].end
    except RpcError as refused:
        got = refused
    assert type(got) is error, got
    assert name in (got.details.get("field"), got.details.get("option"))
    assert not engine.busy


def test_a_conversation_that_is_too_long_keeps_its_tools(engine: Engine) -> None:
    long = [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "word " * 900}]
    policy = {"context_policy": "drop_oldest", "tool_choice": {"name": "clock"}}
    engine.submit(0, ask(messages=[*long * 2, USER], **policy))
    told = run(engine)[0]
    assert [call.name for call in told.calls] == ["clock"]
    assert told.end.dropped_messages > 0
    kept = [*long * 2, USER][told.end.dropped_messages :]
    assert told.end.prompt_tokens == engine.count(CountTokens(messages=kept, tools=TOOLS))


def test_schemas_are_whole_json_schema(engine: Engine) -> None:
    parameters = {
        "type": "object",
        "properties": {"ids": {"type": "array", "items": {"$ref": "#/$defs/id"}, "uniqueItems": True}},
        "not": {"required": ["secret"]},
        "$defs": {"id": {"type": "integer", "multipleOf": 3}},
    }
    tools = engine._requests.toolbox.use(ask(tools=[tool("pick", parameters)]))
    assert tools is not None
    for arguments, fits in (
        ({"ids": [3, 6]}, True), ({"ids": [3, 3]}, False), ({"ids": [4]}, False), ({"secret": 1}, False), ({}, True),
    ):  # fmt: skip
        made, malformed = tools.take(json.dumps({"name": "pick", "arguments": arguments}), True, None)
        assert (len(made), len(malformed)) == (fits, not fits)


def test_a_pattern_that_takes_for_ever_is_stopped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PARSER_LIMIT_S", 0.05)
    tools = engine._requests.toolbox.use(ask(tools=[tool("a", record(x={"type": "string", "pattern": "^(a|a)*b$"}))]))
    assert tools is not None
    _, (malformed,) = tools.take(json.dumps({"name": "a", "arguments": {"x": "a" * 40}}), True, None)
    assert "longer than" in malformed.reason


def test_a_template_without_a_place_for_tools(tmp_path: Path) -> None:
    template = tiny_model.CHAT_TEMPLATE.replace("{%- endfor %}", "{%- endfor %}{# <tool_call> tool_call.name #}", 1)
    loaded = load(str(tiny_model.build(tmp_path / "model", chat_template=template)), lambda fraction: None)
    with pytest.raises(Unsupported) as caught:
        Engine(loaded, max_batch=2, prefill_step=64).submit(0, ask())
    assert caught.value.details["option"] == "tools"


# --- turns ----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "what is the weather?"}
ROME = {"id": "call-1", "name": "get_weather", "arguments": {"city": "Rome"}}
NESTED = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
SUNNY = {"role": "tool", "tool_call_id": "call-1", "content": "sunny"}


def calling(*made: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made)}


@pytest.mark.parametrize("family", PARIS)
def test_results_go_back_into_the_prompt(engines: dict[str, Engine], family: str) -> None:
    engine = engines[family]
    one, other = ([USER, calling(made), SUNNY] for made in (ROME, NESTED))
    engine.submit(0, ask(messages=one, max_tokens=3))
    engine.submit(1, ask(messages=other, max_tokens=3))
    told = run(engine)
    assert told[0].end.text == told[1].end.text
    count = engine.count(CountTokens(messages=one, tools=TOOLS))
    assert count == told[0].end.prompt_tokens
    prompt = engine._prompts._apply(engine._prompts._read(one), False, TOOLS)
    assert "sunny" in prompt
    assert "get_weather" in prompt


def test_the_prompt_is_the_templates_own(engine: Engine) -> None:
    """What the model sees of a call that it made is what it wrote."""
    told = say(engine, PARIS["json_tools"])
    turn = {"role": "assistant", "content": "", "tool_calls": msgspec.to_builtins(told.calls)}
    assert PARIS["json_tools"] in engine._prompts._apply(engine._prompts._read([USER, turn]), False, TOOLS)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([USER, SUNNY], "messages[1].tool_call_id"),
        ([USER, calling(ROME), {"role": "tool", "content": "x"}], "messages[2].tool_call_id"),
        ([USER, calling(ROME), SUNNY | {"tool_call_id": "call-2"}], "messages[2].tool_call_id"),
        ([USER, calling(ROME), SUNNY, SUNNY], "messages[3].tool_call_id"),
        ([USER, calling(ROME), USER, SUNNY], "messages[3].tool_call_id"),
        ([USER, calling(ROME), SUNNY | {"name": "clock"}], "messages[2].name"),
        ([USER, calling(ROME, ROME)], "messages[1].tool_calls[1].id"),
        ([USER, calling(3)], "messages[1].tool_calls[0]"),
        ([USER, calling({})], "messages[1].tool_calls[0].id"),
        ([USER, calling({"id": "a"})], "messages[1].tool_calls[0].name"),
        ([USER, calling(ROME | {"arguments": [1]})], "messages[1].tool_calls[0].arguments"),
        ([USER, calling(ROME | {"arguments": "{"})], "messages[1].tool_calls[0].arguments"),
        ([USER, calling(ROME | {"arguments": "[" * 100_000})], "messages[1].tool_calls[0].arguments"),
        ([USER, calling(NESTED | {"type": "code"})], "messages[1].tool_calls[0].function"),
        ([USER | {"tool_calls": [ROME]}], "messages[0].tool_calls"),
        ([USER | {"tool_call_id": "call-1"}], "messages[0].tool_call_id"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
    ],
)
def test_turns_that_do_not_follow(engine: Engine, messages: list[Any], field: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        engine.submit(0, ask(messages=messages))
    assert caught.value.details["field"] == field
    with pytest.raises(InvalidParams):
        engine.count(CountTokens(messages=messages, tools=TOOLS))


def test_prefixes_with_tools_are_found_again(engines: dict[str, Engine]) -> None:
    engine = Engine(engines["json_tools"]._loaded, max_batch=2, prefill_step=512, cache_bytes=64 * 1024 * 1024)
    first = say(engine, PARIS["json_tools"])
    turn = {"role": "assistant", "content": "", "tool_calls": msgspec.to_builtins(first.calls)}
    result = {"role": "tool", "tool_call_id": first.calls[0].id, "content": "sunny"}
    engine.submit(1, ask(messages=[USER, turn, result], max_tokens=3))
    second = run(engine)[1].end
    assert second.cached_tokens > first.end.prompt_tokens - 12  # all but what opened the answer
    engine.submit(2, ask("something else", max_tokens=3))
    assert run(engine)[2].end.cached_tokens > 200  # the tools
