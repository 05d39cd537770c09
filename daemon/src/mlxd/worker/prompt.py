"""Messages become prompt tokens, through the model's own chat template.

A model without a template can still `process`: its prompt is the plain text, which is what base models continue.
`chat` needs turns, and turns need a template, so that it is refused there.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from mlxd_client.errors import ContextExceeded, InvalidParams, ModelInvalid, RpcError, Unsupported
from mlxd_client.types import MAX_TEXT_CHARACTERS

# A template is a program from the model's folder: it gets this long.
TEMPLATE_LIMIT_S = 5.0
# Tokenizing takes seconds for each million characters, and nobody else is served meanwhile: a text longer than the
# probe is first judged by its start, and nothing longer than the limit is counted.
PROBE_CHARACTERS = 200_000
MAX_COUNT_CHARACTERS = MAX_TEXT_CHARACTERS
# How many tokens a cut through a text may add at its end.
_CUT_TOKENS = 8
ROLES = ("system", "user", "assistant")


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
    """

    def __init__(self, tokenizer: Any, context_length: int, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self._vocabulary = vocabulary
        # No token spells more bytes than this, so that huge texts are refused without tokenizing them.
        self._longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)

    def build(self, kind: str, messages: list[dict[str, Any]], *, thinking: bool, cut: bool = False) -> Prompt:
        """The prompt for an answer to `messages`; with `cuts` if `cut`.

        Raises:
            InvalidParams: no or malformed messages, or ones that the template refuses.
            Unsupported: roles or options that the model's template has no place for.
            ModelInvalid: the template itself is broken.
            ContextExceeded: too long to leave room for one token.
        """
        check_messages(messages)
        source = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
        if not self._tokenizer.has_chat_template:
            if kind != "process":
                raise Unsupported("this model has no chat template: it can process, not chat", option="messages")
            text = "\n\n".join(turn["content"] for turn in messages)
            return Prompt(self._encode(text, special=True), source)
        if thinking and not self._tokenizer.has_thinking:
            raise Unsupported("this model has no thinking mode", option="thinking")
        text = self._render(messages, thinking)
        opened = self._tokenizer.has_thinking and text.rstrip().endswith(self._tokenizer.think_start)
        tokens = self._encode(text, special=False)
        return Prompt(tokens, source, opened, self._cuts(messages, thinking, text, tokens) if cut else ())

    def _cuts(self, messages: list[dict[str, Any]], thinking: bool, text: str, tokens: list[int]) -> tuple[int, ...]:
        """See Prompt. Where a template allows no comparison there are none: they are of use, not needed."""
        found = set()
        with contextlib.suppress(Exception):
            # Up to where the template asks for an answer.
            rest = text[_same(text, self._apply(messages, thinking, answer=False)) :]
            found.add(len(tokens) - len(self._tokenizer.encode(rest, add_special_tokens=False)))
        if messages[0]["role"] == "system" and len(messages) > 1:
            with contextlib.suppress(Exception):
                # Up to where another first turn would make a difference.
                other = {**messages[1], "content": "y" if messages[1]["content"].startswith("x") else "x"}
                same = text[: _same(text, self._apply([messages[0], other], thinking))]
                found.add(_same(tokens, self._tokenizer.encode(same, add_special_tokens=False)))
        return tuple(sorted(cut for cut in found if 0 < cut < len(tokens)))

    def open_thought(self, prompt: Prompt) -> Prompt:
        """The prompt, with a thought begun where the template left that to the model. Raises ContextExceeded."""
        if prompt.in_reasoning:
            return prompt
        tokens = [*prompt.tokens, *self._tokenizer.think_start_tokens]
        if len(tokens) >= self.context_length:
            raise self._too_long(len(tokens))
        return Prompt(tokens, prompt.source, True, dropped=prompt.dropped)

    def count(self, *, text: str | None, messages: list[dict[str, Any]] | None) -> int:
        """How many tokens a plain text has, or the prompt that `chat` would make of messages, context or not.

        Raises:
            InvalidParams: more than MAX_COUNT_CHARACTERS, or messages that `build` would refuse.
        """
        if messages is not None:
            check_messages(messages)
            if not self._tokenizer.has_chat_template:
                raise Unsupported("this model has no chat template to count messages with", option="messages")
            text = self._render(messages, False)
        text = text or ""
        if len(text) > MAX_COUNT_CHARACTERS:
            raise InvalidParams(
                f"a text of {len(text)} characters is over the limit of {MAX_COUNT_CHARACTERS} to count",
                field="text" if messages is None else "messages",
            )
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        least = len(text) // self._longest_token
        if least >= self.context_length:
            raise self._too_long(least)
        if len(text) > PROBE_CHARACTERS:
            least = len(self._tokenizer.encode(text[:PROBE_CHARACTERS], add_special_tokens=special)) - _CUT_TOKENS
            if least >= self.context_length:
                raise self._too_long(least)
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
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

    def _render(self, messages: list[dict[str, Any]], thinking: bool) -> str:
        try:
            return self._apply(messages, thinking)
        except RpcError:
            raise
        except Exception as error:
            refusal = _refusal(error)
        # Some templates raise on, others stumble over, a system turn: say that, where that is what it was.
        if messages[0]["role"] == "system" and len(messages) > 1:
            with contextlib.suppress(Exception):
                self._apply(messages[1:], thinking)
                raise_as = Unsupported(f"this model takes no system message: {refusal.message}", option="system")
                refusal = raise_as
        raise refusal

    def _apply(self, messages: list[dict[str, Any]], thinking: bool, *, answer: bool = True) -> str:
        with time_limit(TEMPLATE_LIMIT_S):
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, enable_thinking=thinking
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


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Raises InvalidParams or Unsupported unless `messages` are turns of text that this engine can take."""
    if not messages:
        raise InvalidParams("there are no messages", field="messages")
    for index, turn in enumerate(messages):
        role, field = turn.get("role"), f"messages[{index}]"
        if role == "tool":
            raise Unsupported("this engine cannot take tool turns yet", option="messages", field=f"{field}.role")
        if role not in ROLES:
            raise InvalidParams(f"a message's role is one of {', '.join(ROLES)}", field=f"{field}.role")
        if not isinstance(turn.get("content", ""), str):
            raise InvalidParams("a message's content is text", field=f"{field}.content")
        if turn.get("tool_calls") or turn.get("tool_call_id"):
            raise Unsupported("this engine cannot take tool calls yet", option="messages", field=field)
        turn.setdefault("content", "")


def _refusal(error: Exception) -> RpcError:
    """Why a template gave no prompt. A plain TemplateError is the template's own `raise_exception`."""
    if type(error) is jinja2.TemplateError:
        return InvalidParams(f"the model's chat template refuses: {error}", field="messages")
    return ModelInvalid(f"the model's chat template fails: {type(error).__name__}: {error}")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code that runs longer. On any thread but the main one there is no limit.

    Raises:
        ModelInvalid: out of the code that ran too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(_number: int, _frame: Any) -> None:
        raise ModelInvalid(f"the model's chat template ran longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
