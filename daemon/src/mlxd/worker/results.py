"""What one answer is once it ended: its text, its counts and times, and what its options asked to be told besides."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..childwire import Generated, WorkerTimings
from .load import LoadedModel
from .running import Running

Guard = Callable[[str, str], tuple[str, ...]]


class Results:
    """Makes the results of one model's requests.

    Args:
        guard: (source, answer) → words the answer invents; used for models that promise to rewrite faithfully.
    """

    def __init__(self, loaded: LoadedModel, guard: Guard | None) -> None:
        self._tokenizer = loaded.tokenizer
        self._guard = guard if loaded.faithful else None

    def result(self, running: Running, reason: str) -> Generated:
        """Raises what parsing the answer by its rule does."""
        text = "".join(running.text.text)
        structured = None
        if running.constraint is not None and reason == "stop" and not running.text.stopped:
            structured = running.constraint.value(text)
        calls = running.tools.calls if running.tools is not None else []
        malformed = running.tools.malformed if running.tools is not None else []
        return Generated(
            text=text,
            finish_reason="tool_calls" if calls and reason == "stop" else reason,
            prompt_tokens=len(running.prompt.tokens),
            completion_tokens=running.tokens,
            cached_tokens=running.reuse.cached if running.reuse is not None else 0,
            timings=_timings(running),
            reasoning="".join(running.text.reasoning) or None,
            logprobs=running.logprobs if running.choices.sampling.logprobs >= 0 else None,
            invented=self._invented(running, text),
            structured=structured,
            reasoning_tokens=running.text.reasoning_tokens,
            tool_calls=calls or None,
            malformed_tool_calls=malformed or None,
            speculation=running.guess.report() if running.guess is not None else None,
            dropped_messages=running.prompt.dropped,
            alone=running.choices.lane.alone,
        )

    def _invented(self, running: Running, text: str) -> list[str] | None:
        rewritten = running.request.kind == "process" and running.choices.rule is None  # a rule has words of its own
        if self._guard is None or not rewritten:
            return None
        return list(self._guard(running.prompt.source, text)) or None

    def report(self, count: int, token: int, note: tuple[mx.array, mx.array, mx.array]) -> dict[str, Any]:
        """One entry of `logprobs`, as in the wire's TokenLogprob."""
        parts: list[Any] = [part.tolist() for part in note]
        chosen, ids, values = parts
        decode = self._tokenizer.decode
        entry: dict[str, Any] = {"token": decode([token]), "token_id": token, "logprob": max(chosen, -1e9)}
        if count:
            best = zip(ids[:count], values[:count], strict=True)
            entry["top"] = [(decode([other]), value) for other, value in best if value > -1e9]
        return entry


def _timings(running: Running) -> WorkerTimings:
    now = time.perf_counter()
    start, first = running.received_at, running.first_at
    return WorkerTimings(
        prompt_s=(running.prompt_at or now) - start,
        first_token_s=first - start if first else 0.0,
        decode_s=now - first if first else 0.0,
    )
