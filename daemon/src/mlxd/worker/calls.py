"""Tool calls out of what a model wrote: mlx_lm's parser of its family reads them, and each is measured by its tool.

A call is whole, and fits its tool's schema, or it is malformed; nothing that a model writes raises.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Any

from mlxd_client.errors import ModelInvalid, RpcError, Unsupported
from mlxd_client.types import MalformedToolCall, ToolCall

from ..childwire import Calls, Generate
from .constraint import parse_value
from .grammar import Rule
from .timelimit import time_limit
from .tools import AUTO, NONE, REQUIRED, Toolset, Toolsets, read_choice
from .toolsyntax import Syntax
from .turns import SHORT_ID

# A parser is Python over regular expressions, some of them quadratic.
PARSER_LIMIT_S, MAX_CHARACTERS = 1.0, 131_072
# Of one answer, and how deep arguments may be, so that a frame carries them here and back again.
MAX_CALLS, MAX_VALUES, MAX_ARGUMENTS_DEPTH = 128, 32_768, 56
# Of what is wrong.
MAX_REASON = 500

_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)
_ALPHABET = string.ascii_letters + string.digits


class Toolbox:
    """What one model can do with tools.

    Args:
        tokenizer: mlx_lm's TokenizerWrapper.
        eos: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, eos: set[int]) -> None:
        self._sets = Toolsets()
        self._parser = tokenizer.tool_parser
        self.syntax = Syntax(tokenizer, eos) if can_call(tokenizer) else None

    def read(self, tools: list[dict[str, Any]]) -> Toolset:
        """Raises Unsupported or InvalidParams."""
        if self.syntax is None:
            raise Unsupported("this model has no tool calls that mlx_lm can read", option="tools")
        return self._sets.read(tools)

    def use(self, request: Generate) -> ToolUse | None:
        """The tools of a request; None where it has none.

        Raises:
            Unsupported: the model has no tools, or none that can be made to be called.
            InvalidParams: no tools, or no choice among them.
        """
        if not request.tools:
            return None
        tools = self.read(request.tools)
        assert self.syntax is not None
        choice, only = read_choice(request.tool_choice, tools.schemas)
        rule = self.syntax.rule(tools, only) if choice == REQUIRED else None
        return ToolUse(self._parser, self.syntax, tools, choice, rule)


def can_call(tokenizer: Any) -> bool:
    """Whether a model has calls that can be told from its text. What reads a whole protocol of channels is not here."""
    return bool(
        tokenizer.has_tool_calling
        and tokenizer.has_chat_template
        and not tokenizer.response_transitions
        and not tokenizer.structural_markers
    )


@dataclass(slots=True)
class ToolUse:
    """The tools of one answer, and the calls that it has made so far.

    Attributes:
        rule: what the answer has to follow, where a call is required.
        calls, malformed: as in Completion.
    """

    parser: Any
    syntax: Syntax
    tools: Toolset
    choice: str
    rule: Rule | None
    calls: list[ToolCall] = field(default_factory=list)
    malformed: list[MalformedToolCall] = field(default_factory=list)
    _values: int = 0

    @property
    def may_call(self) -> bool:
        return self.choice != NONE

    @property
    def banned(self) -> int | None:
        """The token that may not come."""
        return self.syntax.start_token if self.choice == NONE else None

    def take(self, text: str, whole: bool, reason: str | None) -> tuple[list[ToolCall], list[MalformedToolCall]]:
        """Read what stood where a call was to be.

        Args:
            whole: the marker that ends a call came.
            reason: why the answer ended, where it has.

        Returns:
            The calls that are new, and what was none.
        """
        before = len(self.calls), len(self.malformed)
        if not whole and not (reason == "stop" and self.syntax.ends_by_itself):
            self._refuse(text, "the answer ended before the call did")
        elif self.choice == NONE:
            self._refuse(text, "tool_choice is none")
        elif len(text) > MAX_CHARACTERS:
            self._refuse(text, f"a call of {len(text)} characters is over the limit of {MAX_CHARACTERS}")
        else:
            self._read(text)
        return self.calls[before[0] :], self.malformed[before[1] :]

    def _read(self, text: str) -> None:
        try:
            with time_limit(PARSER_LIMIT_S, "reading the call"):
                parsed = self.parser(text, self.tools.shown)
        except ModelInvalid as error:
            self._refuse(text, error.message)
            return
        except Exception as error:
            self._refuse(text, f"it is no call: {type(error).__name__}: {error}")
            return
        several = parsed if isinstance(parsed, list) else [parsed]
        if not several:
            self._refuse(text, "it is no call")
        for one in several:
            self._judge(text, one)

    def _judge(self, text: str, parsed: Any) -> None:
        name = parsed.get("name") if isinstance(parsed, dict) else None
        if not isinstance(name, str):
            self._refuse(text, "it is no call: it names no tool")
        elif name not in self.tools.schemas:
            self._refuse(text, f"there is no tool named {name[:100]}", name[:256])
        elif len(self.calls) >= MAX_CALLS:
            self._refuse(text, f"an answer makes {MAX_CALLS} calls at most", name)
        else:
            try:
                arguments = self._arguments(name, parsed.get("arguments"))
            except (ValueError, RpcError) as error:
                self._refuse(text, str(error), name)
            else:
                self.calls.append(ToolCall(id=self._id(parsed.get("id")), name=name, arguments=arguments))

    def _arguments(self, name: str, raw: Any) -> dict[str, Any]:
        """What a call gives its tool, as the wire carries it. Raises ValueError, ModelInvalid."""
        with time_limit(PARSER_LIMIT_S, "checking the arguments"):
            try:
                # Parsers give what Python has and JSON has not: tuples become arrays, keys text.
                spelled = raw if isinstance(raw, str) else json.dumps({} if raw is None else raw, allow_nan=False)
                arguments = parse_value(spelled, MAX_ARGUMENTS_DEPTH)
                self._values += spelled.count(",") + spelled.count("{") + spelled.count("[")
            except (TypeError, RecursionError, ValueError) as error:
                raise ValueError(f"its arguments are no JSON: {error}") from None
            if not isinstance(arguments, dict):
                raise ValueError("its arguments are no object")
            if self._values > MAX_VALUES:
                raise ValueError("its arguments hold too many values")
            try:
                wrong = next(iter(self.tools.validators[name].iter_errors(arguments)), None)
            except Exception as error:
                raise ValueError(f"its arguments could not be checked: {type(error).__name__}: {error}") from None
        if wrong is not None:
            raise ValueError(f"{wrong.json_path.replace('$', 'arguments', 1)}: {wrong.message}")
        return arguments

    def _id(self, own: Any) -> str:
        """The model's own id, as some families count their calls; else a new one."""
        taken = {call.id for call in self.calls}
        if isinstance(own, str) and _ID.fullmatch(own) and own not in taken:
            return own
        while True:
            made = "".join(secrets.choice(_ALPHABET) for _ in range(SHORT_ID))
            if made not in taken:
                return made

    def _refuse(self, text: str, reason: str, name: str | None = None) -> None:
        if len(self.malformed) >= MAX_CALLS:  # a frame holds so much; what was told in a stream stays as it was
            last = self.malformed[-1]
            self.malformed[-1] = MalformedToolCall(text=last.text + _sound(text), reason="there are too many of them")
            return
        reason = _sound(reason)[:MAX_REASON]
        self.malformed.append(
            MalformedToolCall(text=_sound(text), reason=reason, name=None if name is None else _sound(name))
        )


def _sound(text: str) -> str:
    """Without halves of surrogate pairs, which no frame carries."""
    return text.encode("utf-8", "replace").decode()


def news(request_id: int, calls: list[ToolCall], malformed: list[MalformedToolCall]) -> Calls | None:
    """What goes to a streaming client; None for nothing."""
    return Calls(request_id, calls, malformed) if calls or malformed else None


__all__ = ["AUTO", "ToolUse", "Toolbox", "can_call", "news"]
