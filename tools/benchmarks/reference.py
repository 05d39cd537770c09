"""What daemon and worker are measured against: mlx_lm called directly, in one process, by an app of its own.

Run as a process: `python -m benchmarks.reference FOLDER` loads the model and says `{}`; then each line on stdin asks
for one run and gets one line back, both JSON. Times are in seconds, from the request in hand to the text in hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.utils import load


class Runner:
    """One loaded model. Each public method is one kind of run."""

    def __init__(self, folder: str) -> None:
        self._model, self._tokenizer = load(folder)
        self._drafts: dict[str, Any] = {}

    def stream(self, messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
        """One answer through `stream_generate`, greedy."""
        began = time.perf_counter()
        first: float | None = None
        text = []
        for made in stream_generate(self._model, self._tokenizer, self._prompt(messages), max_tokens=tokens):
            if first is None and made.text:
                first = time.perf_counter()
            text.append(made.text)
        ended = time.perf_counter()
        first = ended if first is None else first
        return {
            "first_s": first - began, "decode_s": ended - first, "total_s": ended - began,
            "tokens": made.generation_tokens, "text": "".join(text),
        }  # fmt: skip

    def guess(self, messages: list[dict[str, str]], tokens: int, draft: str, guesses: int) -> dict[str, Any]:
        """One answer through `stream_generate` with a draft model, greedy."""
        if draft not in self._drafts:
            self._drafts[draft] = load(draft)[0]
        began = time.perf_counter()
        first: float | None = None
        count = 0
        for _ in stream_generate(
            self._model, self._tokenizer, self._prompt(messages), max_tokens=tokens, draft_model=self._drafts[draft],
            num_draft_tokens=guesses,
        ):  # fmt: skip
            first = first or time.perf_counter()
            count += 1
        return {"decode_s": time.perf_counter() - (first or began), "tokens": count}

    def batch(self, prompts: list[list[dict[str, str]]], tokens: int) -> dict[str, Any]:
        """All answers through one `BatchGenerator`, greedy, as tokens that nobody turns into text."""
        began = time.perf_counter()
        generator = BatchGenerator(self._model, max_tokens=tokens)
        generator.insert([self._prompt(messages) for messages in prompts])
        count, left = 0, len(prompts)
        while left:
            for response in generator.next_generated():
                count += 1
                left -= response.finish_reason is not None
        generator.close()
        return {"total_s": time.perf_counter() - began, "tokens": count}

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        tokens: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False
        )
        return tokens


def main(folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; only answers go where answers are read
    runner = Runner(folder)
    mx.clear_cache()
    print("{}", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(runner, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
