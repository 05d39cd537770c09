"""How each family of models spells a tool call, as far as it matters outside mlx_lm's parsers: its markers, whether it
ends by itself, and a grammar of it where a call is required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mlxd_client.errors import Unsupported

from .grammar import Rule, backend, check_schema, sized
from .toolflat import STYLES, Style, spell
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
        known: dict[int, Any] = getattr(backend(tokenizer), "get_added_tokens_decoder", dict)()
        longest = sorted(known.items(), key=lambda one: -len(one[1].content))
        self._added = {token.content: (number, _special(token)) for number, token in longest if len(token.content) > 1}
        self.start_token = self._token(self.markers[0])
        self.ends_by_itself = not self.markers[1] or self.family == "json_tools" or self._token(self.markers[1]) in eos

    def rule(self, tools: Toolset, only: str | None) -> Rule:
        """The rule of an answer that is nothing but calls: one or some of any tools, or one of `only`.

        Raises:
            Unsupported: this family's calls cannot be put into a grammar, nor such a schema.
            InvalidParams: more, or a more complex schema, than can be compiled.
        """
        how, style = _SPELLINGS.get(self.family), STYLES.get(self.family)
        if how is None and style is None:
            told = f"the calls of this model's family, {self.family}, cannot be enforced"
            raise Unsupported(told, option="tool_choice")
        names = list(tools.schemas) if only is None else [only]
        schemas = {}
        for name in names:
            plain = {key: value for key, value in tools.schemas[name].items() if key != "x-guidance"}
            schemas[name] = {"type": "object", **plain}
            check_schema(schemas[name], "tools")
        if how is not None:
            lines = how(self, names, only is None)
            for number, name in enumerate(names):
                lines.append(f"args_{number}: %json {json.dumps(schemas[name], separators=(',', ':'))}")
        else:
            assert style is not None
            lines = [*_flat(self, style, len(names), only is None), *spell(self, style, names, schemas)]
        return sized(Rule("tools", "\n".join(lines)))

    def marker(self, text: str) -> str:
        """A marker in a grammar: as the token that it is, where it is one."""
        token = self._token(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def literal(self, text: str) -> str:
        """Text in a grammar, and what are tokens of their own in it as those."""
        if not self._added:
            return json.dumps(text) if text else ""
        parts = re.split("(" + "|".join(map(re.escape, self._added)) + ")", text)
        return " ".join(
            f"<[{self._added[part][0]}]>" if part in self._added else json.dumps(part) for part in parts if part
        )

    def special(self, text: str) -> str | None:
        """The special token that the text begins with, which no text in an answer can be part of."""
        return next((one for one, (_, special) in self._added.items() if special and text.startswith(one)), None)

    def _token(self, text: str) -> int | None:
        tokens = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        return int(tokens[0]) if len(tokens) == 1 and len(text) > 1 else None

    @property
    def template(self) -> str:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template)


def _special(token: Any) -> bool:
    """Whether llguidance takes it for a token that no text spells: in its eyes those in angle brackets are, too."""
    return bool(token.special or (token.content.startswith("<") and token.content.endswith(">")))


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


def _flat(syntax: Syntax, style: Style, tools: int, several: bool) -> list[str]:
    start, end = (syntax.marker(marker) for marker in syntax.markers)
    one = "one: " + " | ".join(f"tool_{number}" for number in range(tools))
    between = syntax.literal(style.joined)
    if style.section is None:
        return ["start: " + _some("call", between, several), f"call: {start} one {end}", one]
    opening, closing = (syntax.literal(part) for part in style.section)
    return [f"start: {start} {opening} {_some('one', between, several)} {closing} {end}", one]


_SPELLINGS: dict[str, Callable[[Syntax, list[str], bool], list[str]]] = {
    "json_tools": _json_tools,
    "mistral": _mistral,
    "kimi_k2": _kimi_k2,
}
