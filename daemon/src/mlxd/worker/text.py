"""Tokens become text: whole characters only, stop strings cut out, reasoning and tool calls kept apart. One object per
request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine

ANSWER = "normal"
REASONING = "reasoning"
CALL = "call"


def make_machine(
    stop: Sequence[str],
    think: tuple[str, str] | None,
    *,
    once: bool = False,
    call: tuple[str, str] | None = None,
    thought_calls: bool = True,
) -> TextStateMachine | None:
    """What finds stop strings and the markers of reasoning and calls in text; None where there is nothing to find.

    Args:
        stop: texts that end the answer. They are looked for in the answer, not in the reasoning, nor in calls.
        think: the markers around reasoning, for models that have them.
        once: the answer has none of its own; what looks like a marker there is text.
        call: the markers around tool calls, where there are tools. Where the second is empty, a call ends the answer.
        thought_calls: a call may come in a thought, and ends it.
    """
    edges: dict[str, list[tuple[str, str | None]]] = {ANSWER: [(text, None) for text in stop]}
    if think is not None:
        if not once:
            edges[ANSWER].append((think[0], REASONING))
        edges[REASONING] = [(think[1], ANSWER)]
    if call is not None:
        edges[ANSWER].append((call[0], CALL))
        edges[CALL] = [(call[1], ANSWER)] if call[1] else []
        if think is not None and thought_calls:
            edges[REASONING].append((call[0], CALL))
    return TextStateMachine(edges) if any(edges.values()) else None


class TextStream:
    """The text of one answer as it grows.

    `add` and `finish` return the (text, reasoning) that is new and can be shown: never half a character, never what
    may yet turn out to be the start of a stop string or marker.

    Attributes:
        stopped: a stop string came; nothing after it is text.
        text, reasoning: all that was returned so far, as lists of parts.
        calls: what stood between the markers of tool calls, and whether the second one came; whoever reads them takes
            them out.
        reasoning_tokens: how many tokens the reasoning took, its markers not counted.
    """

    def __init__(
        self,
        detokenizer: Any,
        machine: TextStateMachine | None,
        *,
        in_reasoning: bool = False,
        marker_tokens: int = 1,
    ) -> None:
        """`marker_tokens`: how many tokens the marker has that ends the reasoning."""
        self._detokenizer = detokenizer
        self._state = machine.make_state(REASONING if in_reasoning else ANSWER) if machine is not None else None
        self._trim = in_reasoning
        self._marker_tokens = marker_tokens
        self._call: list[str] | None = None
        self.stopped = False
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[tuple[str, bool]] = []
        self.reasoning_tokens = 0

    def add(self, token: int) -> tuple[str, str]:
        self._detokenizer.add_token(token)
        segment = self._detokenizer.last_segment
        if self._state is not None and self._state[0] == REASONING:
            return self._think(segment)
        return self._feed(segment) if segment else ("", "")

    def _think(self, segment: str) -> tuple[str, str]:
        new = self._feed(segment) if segment else ("", "")
        if self._state is not None and self._state[0] == REASONING:
            self.reasoning_tokens += 1
        else:
            self.reasoning_tokens = max(0, self.reasoning_tokens + 1 - self._marker_tokens)
        return new

    def finish(self) -> tuple[str, str]:
        """Everything that was held back. After a stop string there is none."""
        if self.stopped:
            return "", ""
        try:
            self._detokenizer.finalize()
            segment = self._detokenizer.last_segment
        except KeyError:  # mlx_lm's byte table lacks some special tokens' characters; what is pending is no character
            segment = ""
        text, reasoning = self._feed(segment)
        if self.stopped or self._state is None:
            return text, reasoning
        self._state, held, where = TextStateMachine.flush(self._state)
        more_text, more_reasoning = self._file([(where, held)])
        if self._call is not None:
            self._end_call(whole=False)
        return text + more_text, reasoning + more_reasoning

    def _feed(self, segment: str) -> tuple[str, str]:
        if self._state is None:
            self.text.append(segment)
            return segment, ""
        self._state, segments = TextStateMachine.split(self._state, segment)
        if segments[-1][0] is None:
            self.stopped = True
            segments.pop()
        return self._file(segments)

    def _file(self, segments: list[tuple[str, str]]) -> tuple[str, str]:
        text = reasoning = ""
        for where, part in segments:
            if where == CALL:
                if self._call is None:
                    self._call = []
                self._call.append(part)
                continue
            if self._call is not None:
                self._end_call(whole=True)
            # Markers stand on lines of their own; the line breaks around them belong to neither text.
            if where == REASONING and not self.reasoning and not reasoning:
                part, self._trim = part.lstrip(), True
            elif where == ANSWER and self._trim:
                part = part.lstrip()
                self._trim = not part
            if where == REASONING:
                reasoning += part
            else:
                text += part
        if text:
            self.text.append(text)
        if reasoning:
            self.reasoning.append(reasoning)
        return text, reasoning

    def _end_call(self, *, whole: bool) -> None:
        self.calls.append(("".join(self._call or ()), whole))
        self._call, self._trim = None, True
