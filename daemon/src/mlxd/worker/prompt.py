"""Messages become prompt tokens, through the model's own chat template.

A model without a template can still `process`: its prompt is the plain text, which is what base models continue.
`chat` needs turns, and turns need a template, so that it is refused there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from mlxd_client.errors import ContextExceeded, InvalidParams, ModelInvalid, RpcError, Unsupported
from mlxd_client.types import MAX_TEXT_CHARACTERS

from .templates import rendering
from .turns import read_turns

# A template is a program from the model's folder: it gets this long.
TEMPLATE_LIMIT_S = 5.0
# Tokenizing takes seconds for each million characters, and nobody else is served meanwhile: a text longer than the
# probe is first judged by its start, and nothing longer than the limit is counted.
PROBE_CHARACTERS = 200_000
MAX_COUNT_CHARACTERS = MAX_TEXT_CHARACTERS
# How many tokens a cut through a text may add at its end.
_CUT_TOKENS = 8

Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """`source` is the text that the last user turn brought; `in_reasoning` says that the template opened a thought;
    `cuts` are where other prompts may go on differently, in tokens: after the system turn, and after the last one;
    `dropped` is how many messages were left out, see shorten.py."""

    tokens: list[int]
    source: str
    in_reasoning: bool = False
    cuts: tuple[int, ...] = ()
    dropped: int = 0


class PromptBuilder:
    """Builds the prompts of one model.

    Args:
        tokenizer: mlx_lm's TokenizerWrapper.
        context_length: in tokens; longer prompts are refused.
        vocabulary: how many rows the model's embeddings have.
        parts: the template takes a turn's content as parts.

    Attributes:
        longest_token: no token spells more bytes than this, so that huge texts are refused without tokenizing them.
    """

    def __init__(self, tokenizer: Any, context_length: int, vocabulary: int, *, parts: bool = False) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self._vocabulary = vocabulary
        self._parts = parts
        self.longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._shows_tools = False  # the template was seen to

    def build(
        self,
        kind: str,
        messages: list[dict[str, Any]],
        *,
        thinking: bool,
        cut: bool = False,
        tools: Tools | None = None,
        encode: Callable[[str], list[int]] | None = None,
    ) -> Prompt:
        """The prompt for an answer to `messages`, with `tools` shown to the model; with `cuts` if `cut`.

        Args:
            encode: makes tokens of the rendered text, where that takes more than the tokenizer.

        Raises:
            InvalidParams: no or malformed messages, or ones that the template refuses.
            Unsupported: roles or options that the model's template has no place for.
            ModelInvalid: the template itself is broken.
            ContextExceeded: too long to leave room for one token.
        """
        messages = self._read(messages)
        source = next((_text(turn["content"]) for turn in reversed(messages) if turn["role"] == "user"), "")
        if not self._tokenizer.has_chat_template:
            if kind != "process":
                raise Unsupported("this model has no chat template: it can process, not chat", option="messages")
            text = "\n\n".join(turn["content"] for turn in messages)
            return Prompt(self._encode(text, special=True), source)
        if thinking and not self._tokenizer.has_thinking:
            raise Unsupported("this model has no thinking mode", option="thinking")
        text = self._render(messages, thinking, tools)
        opened = self._tokenizer.has_thinking and text.rstrip().endswith(self._tokenizer.think_start)
        tokens = self._encode(text, special=False) if encode is None else self._checked(encode(text))
        return Prompt(tokens, source, opened, self._cuts(messages, thinking, tools, text, tokens) if cut else ())

    def _read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parser = self._tokenizer.tool_parser if self._tokenizer.has_tool_calling else None
        short_ids = parser is not None and parser.__module__.endswith(".mistral")
        return read_turns(messages, tools=parser is not None, short_ids=short_ids)

    def _cuts(
        self, messages: list[dict[str, Any]], thinking: bool, tools: Tools | None, text: str, tokens: list[int]
    ) -> tuple[int, ...]:
        """See Prompt. Where a template allows no comparison there are none: they are of use, not needed."""
        found = set()
        with contextlib.suppress(Exception):
            # Up to where the template asks for an answer.
            rest = text[_same(text, self._apply(messages, thinking, tools, answer=False)) :]
            found.add(len(tokens) - len(self._tokenizer.encode(rest, add_special_tokens=False)))
        first = 1 if messages[0]["role"] == "system" else 0
        if (first or tools) and len(messages) > first:
            with contextlib.suppress(Exception):
                found.add(self._first_turn_cut(messages, thinking, tools, text, tokens))
        return tuple(sorted(cut for cut in found if 0 < cut < len(tokens)))

    def _first_turn_cut(
        self, messages: list[dict[str, Any]], thinking: bool, tools: Tools | None, text: str, tokens: list[int]
    ) -> int:
        """After how many tokens another first turn would make a difference. Raises what the template raises."""
        first = 1 if messages[0]["role"] == "system" else 0
        other = {**messages[first], "content": "y" if messages[first]["content"].startswith("x") else "x"}
        same = text[: _same(text, self._apply([*messages[:first], other], thinking, tools))]
        return _same(tokens, self._tokenizer.encode(same, add_special_tokens=False))

    def system(self, text: str, *, thinking: bool) -> Prompt:
        """A prompt with this system turn and a first turn; its only cut is where other first turns would differ.

        Raises:
            Unsupported: the model's template takes no such turn, or no prompts begin alike with it.
            RpcError: as `build`.
        """
        if not self._tokenizer.has_chat_template:
            raise Unsupported("this model has no chat template: it takes no system turn", option="system")
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
        prompt = self.build("chat", messages, thinking=thinking)
        rendered = self._render(messages, thinking, None)
        cut = self._first_turn_cut(messages, thinking, None, rendered, prompt.tokens)
        if not 0 < cut < len(prompt.tokens):
            raise Unsupported("the prompts of this model do not begin with the system turn", option="system")
        return replace(prompt, cuts=(cut,))

    def open_thought(self, prompt: Prompt) -> Prompt:
        """The prompt, with a thought begun where the template left that to the model. Raises ContextExceeded."""
        if prompt.in_reasoning:
            return prompt
        tokens = [*prompt.tokens, *self._tokenizer.think_start_tokens]
        if len(tokens) >= self.context_length:
            raise self._too_long(len(tokens))
        return Prompt(tokens, prompt.source, True, dropped=prompt.dropped)

    def count(
        self, *, text: str | None, messages: list[dict[str, Any]] | None = None, tools: Tools | None = None
    ) -> int:
        """How many tokens a plain text has, or the prompt that `chat` would make of messages and tools, context or not.

        Raises:
            InvalidParams: more than MAX_COUNT_CHARACTERS, or messages that `build` would refuse.
        """
        if messages is not None:
            messages = self._read(messages)
            if not self._tokenizer.has_chat_template:
                raise Unsupported("this model has no chat template to count messages with", option="messages")
            text = self._render(messages, False, tools)
        text = text or ""
        if len(text) > MAX_COUNT_CHARACTERS:
            raise InvalidParams(
                f"a text of {len(text)} characters is over the limit of {MAX_COUNT_CHARACTERS} to count",
                field="text" if messages is None else "messages",
            )
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        least = len(text) // self.longest_token
        if least >= self.context_length:
            raise self._too_long(least)
        if len(text) > PROBE_CHARACTERS:
            least = len(self._tokenizer.encode(text[:PROBE_CHARACTERS], add_special_tokens=special)) - _CUT_TOKENS
            if least >= self.context_length:
                raise self._too_long(least)
        return self._checked(self._tokenizer.encode(text, add_special_tokens=special))

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise InvalidParams("the prompt is empty", field="messages")
        if len(tokens) >= self.context_length:
            raise self._too_long(len(tokens))
        if max(tokens) >= self._vocabulary:
            raise Unsupported("the prompt holds a token that the model has no embedding for", option="messages")
        return tokens

    def _too_long(self, tokens: int) -> ContextExceeded:
        return ContextExceeded(
            f"the prompt has {tokens} tokens or more; the model's context holds {self.context_length},"
            " of which one is for the answer",
            prompt_tokens=tokens,
            context_length=self.context_length,
        )

    def _render(self, messages: list[dict[str, Any]], thinking: bool, tools: Tools | None = None) -> str:
        try:
            text = self._apply(messages, thinking, tools)
            if tools and not self._shows_tools:
                self._shows_tools = text != self._apply(messages, thinking)
                if not self._shows_tools:
                    raise Unsupported("the model's chat template has no place for tools", option="tools")
            return text
        except RpcError:
            raise
        except Exception as error:
            refusal = _refusal(error)
        # Some templates raise on, others stumble over, a system turn: say that, where that is what it was.
        if messages[0]["role"] == "system" and len(messages) > 1:
            with contextlib.suppress(Exception):
                self._apply(messages[1:], thinking, tools)
                raise_as = Unsupported(f"this model takes no system message: {refusal.message}", option="system")
                refusal = raise_as
        raise refusal

    def _apply(
        self, messages: list[dict[str, Any]], thinking: bool, tools: Tools | None = None, *, answer: bool = True
    ) -> str:
        more: dict[str, Any] = {"tools": tools} if tools else {}
        if self._parts:
            messages = [{**turn, "content": _in_parts(turn["content"])} for turn in messages]
        with rendering(TEMPLATE_LIMIT_S):
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, enable_thinking=thinking, **more
            )
        if not isinstance(text, str):
            raise ModelInvalid("the model's chat template gives no text")
        return text


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long both begin alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _in_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _refusal(error: Exception) -> RpcError:
    """Why a template gave no prompt. A plain TemplateError is the template's own `raise_exception`."""
    if type(error) is jinja2.TemplateError:
        return InvalidParams(f"the model's chat template refuses: {error}", field="messages")
    return ModelInvalid(f"the model's chat template fails: {type(error).__name__}: {error}")
