"""How each family of models spells a tool call, as far as it matters outside mlx_lm's parsers: its markers, whether it
ends by itself, and a grammar of it where a call is required.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlxd_client.errors import Unsupported

from .grammar import Rule, check_schema, sized
from .tools import Toolset

# How many calls one answer may make that has to make one.
MOST_CALLS = 16


class Syntax:
    """How one model spells its calls.

    Args:
        tokenizer: mlx_lm's TokenizerWrapper, with a tool parser.
        eos: the tokens that end an answer.

    Attributes:
        markers: what stands around calls; the second is empty where calls end the answer.
        start_token: the first marker, where that is one token; else None.
        ends_by_itself: a call whose second marker did not come may be whole, where the model ended its answer there.
    """

    def __init__(self, tokenizer: Any, eos: set[int]) -> None:
        # The parser's module, as some families share one.
        self.family = tokenizer.tool_parser.__module__.rpartition(".")[2]
        self.markers = (tokenizer.tool_call_start, tokenizer.tool_call_end or "")
        self._tokenizer = tokenizer
        self.start_token = self._token(self.markers[0])
        self.ends_by_itself = not self.markers[1] or self.family == "json_tools" or self._token(self.markers[1]) in eos

    def rule(self, tools: Toolset, only: str | None) -> Rule:
        """The rule of an answer that is nothing but calls: one or some of any tools, or one of `only`.

        Raises:
            Unsupported: this family's calls cannot be put into a grammar, nor such a schema.
            InvalidParams: more, or a more complex schema, than can be compiled.
        """
        spell = _SPELLINGS.get(self.family)
        if spell is None:
            told = f"the calls of this model's family, {self.family}, cannot be enforced"
            raise Unsupported(told, option="tool_choice")
        names = list(tools.schemas) if only is None else [only]
        lines = []
        for number, name in enumerate(names):
            schema = {key: value for key, value in tools.schemas[name].items() if key != "x-guidance"}
            schema = {"type": "object", **schema}
            check_schema(schema, "tools")
            lines.append(f"args_{number}: %json {json.dumps(schema, separators=(',', ':'))}")
        return sized(Rule("tools", "\n".join([*spell(self, names, only is None), *lines])))

    def marker(self, text: str) -> str:
        """A marker in a grammar: as the token that it is, where it is one."""
        token = self._token(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def _token(self, text: str) -> int | None:
        tokens = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        return int(tokens[0]) if len(tokens) == 1 and len(text) > 1 else None

    @property
    def template(self) -> str:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template)


def _some(one: str, between: str, several: bool) -> str:
    return f"{one} ({between} {one}){{0,{MOST_CALLS - 1}}}" if several else one


def _objects(names: list[str]) -> list[str]:
    """`one`: an object with a tool's name and arguments."""
    lines = ["one: " + " | ".join(f"tool_{number}" for number in range(len(names)))]
    for number, name in enumerate(names):
        opening = json.dumps(f'{{"name": "{name}", "arguments": ')
        lines.append(f'tool_{number}: {opening} args_{number} "}}"')
    return lines


def _json_tools(syntax: Syntax, names: list[str], several: bool) -> list[str]:
    """<tool_call>, an object on a line of its own, </tool_call>."""
    start, end = (syntax.marker(marker) for marker in syntax.markers)
    return [
        "start: " + _some("call", r'"\n"', several),
        rf'call: {start} "\n" one "\n" {end}',
        *_objects(names),
    ]


def _mistral(syntax: Syntax, names: list[str], several: bool) -> list[str]:
    """[TOOL_CALLS] and an array of objects; with newer models [TOOL_CALLS]name[ARGS]{…} for each call."""
    start = syntax.marker(syntax.markers[0])
    if "[ARGS]" not in syntax.template:
        return [f'start: {start} " "? "[" ' + _some("one", '", "', several) + ' "]"', *_objects(names)]
    split = syntax.marker("[ARGS]")
    return [
        "start: " + _some("call", "", several),
        f"call: {start} (" + " | ".join(f"tool_{number}" for number in range(len(names))) + ")",
        *(f"tool_{number}: {json.dumps(name)} {split} args_{number}" for number, name in enumerate(names)),
    ]


def _kimi_k2(syntax: Syntax, names: list[str], several: bool) -> list[str]:
    """One section, in it functions.name:number and the arguments of each call."""
    start, end = (syntax.marker(marker) for marker in syntax.markers)
    begin, split, done = (syntax.marker(f"<|tool_call_{part}|>") for part in ("begin", "argument_begin", "end"))
    lines = [f"start: {start} {_some('call', '', several)} {end}"]
    lines.append(f"call: {begin} (" + " | ".join(f"tool_{number}" for number in range(len(names))) + f") {done}")
    for number, name in enumerate(names):
        opening = json.dumps(f"functions.{name}:")
        lines.append(f"tool_{number}: {opening} NUMBER {split} args_{number}")
    return [*lines, "NUMBER: /0|[1-9][0-9]?/"]


_SPELLINGS: dict[str, Callable[[Syntax, list[str], bool], list[str]]] = {
    "json_tools": _json_tools,
    "mistral": _mistral,
    "kimi_k2": _kimi_k2,
}
