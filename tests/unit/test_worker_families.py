"""The family matrix: in a batch, beside cancelled requests, from a kept prefix, each says what mlx_lm makes it say.

Conversations, system prompts and small budgets by family are in test_worker_cache.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.generate import stream_generate

from mlxd.childwire import Generate
from mlxd.worker.engine import Engine
from mlxd.worker.families import Batching
from mlxd.worker.load import LoadedModel, load
from support import tiny_model
from support.families import FAMILIES, MORE

pytestmark = pytest.mark.model

TEXTS = ["hello", "the quick brown fox jumps over the lazy dog " * 2, "numbers 1 2 3", "So I think we should meet"]
TOKENS = 10
GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "logprobs": 0}
BATCHING: dict[str, Batching] = {"mamba": "decode", "jamba": "decode", "gpt_bigcode": "alone", "llama4": "alone"}


class Family:
    """A model, and what mlx_lm says with it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._said: dict[str, list[int]] = {}

    def said(self, text: str) -> list[int]:
        if text not in self._said:
            prompt = self.loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=False
            )
            made = stream_generate(self.loaded.model, self.loaded.tokenizer, prompt, max_tokens=TOKENS)
            self._said[text] = [part.token for part in made]
        return self._said[text]

    def engine(self, **limits: Any) -> Engine:
        return Engine(self.loaded, **{"max_batch": 8, "prefill_step": 16} | limits)


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tiny_model.build(tmp_path_factory.mktemp("model"), family=request.param, context=4096)
    loaded = load(str(folder), lambda fraction: None)
    assert loaded.batching == BATCHING.get(request.param, "together")
    loaded.tokenizer.eos_token_ids = []  # answers have the length that is asked for
    return Family(loaded)


def ask(text: str, **options: Any) -> Generate:
    messages = [{"role": "user", "content": text}]
    return Generate(kind="chat", messages=messages, options=GREEDY | {"max_tokens": TOKENS} | options, stream=True)


def step(engine: Engine, ends: dict[int, Any], pieces: dict[int, str] | None = None) -> None:
    outcome = engine.step()
    ends.update(outcome.ended)
    for number, text, reasoning in outcome.pieces:
        if pieces is not None:
            pieces[number] = pieces.get(number, "") + text + reasoning


def drain(engine: Engine, ends: dict[int, Any] | None = None, pieces: dict[int, str] | None = None) -> dict[int, Any]:
    ends = {} if ends is None else ends
    while engine.busy:
        step(engine, ends, pieces)
    return ends


def tokens(end: Any) -> list[int]:
    return [entry["token_id"] for entry in end.logprobs]


def test_a_batch_that_others_join(family: Family) -> None:
    engine = family.engine()
    ends: dict[int, Any] = {}
    pieces: dict[int, str] = {}
    most = 0
    for number, text in enumerate(TEXTS):
        engine.submit(number, ask(text))
        for _ in range(2):  # while others decode, and while others are read
            step(engine, ends, pieces)
            most = max(most, engine.active)
    drain(engine, ends, pieces)
    assert (most == 1) == (family.loaded.batching == "alone")
    for number, text in enumerate(TEXTS):
        assert tokens(ends[number]) == family.said(text)
        assert pieces[number] == ends[number].text + (ends[number].reasoning or "")


def test_prompts_that_come_at_once(family: Family) -> None:
    engine = family.engine()
    for number, text in enumerate(TEXTS):
        engine.submit(number, ask(text))
    ends = drain(engine)
    assert [tokens(ends[number]) for number in range(len(TEXTS))] == [family.said(text) for text in TEXTS]


def test_who_is_cancelled_harms_nobody_and_what_was_read_serves_others(family: Family) -> None:
    engine = family.engine(cache_bytes=1 << 26)
    ends: dict[int, Any] = {}
    engine.submit(1, ask(TEXTS[0]))
    engine.submit(2, ask(TEXTS[3], max_tokens=400))
    engine.submit(3, ask("monday " * 300))
    for _ in range(4):
        step(engine, ends)
    for number in (2, 3):
        ((cancelled, end),) = engine.cancel(number).ended
        assert (cancelled, end.finish_reason) == (number, "cancelled")  # type: ignore[union-attr]
    drain(engine, ends)
    assert ends.keys() == {1}
    assert tokens(ends[1]) == family.said(TEXTS[0])
    for _ in range(2):
        engine.submit(4, ask(TEXTS[1]))
        drain(engine, ends)
        assert tokens(ends[4]) == family.said(TEXTS[1])
    assert (ends[4].cached_tokens > 20) == (engine.cache is not None)
    assert (engine.active, engine.waiting) == (0, 0)


def test_which_prefixes_are_kept(family: Family) -> None:
    """All but those of caches that mlx_lm cannot take apart."""
    kept = family.engine(cache_bytes=1 << 26).cache is not None
    assert kept == (family.loaded.model.model_type != "llama4")
