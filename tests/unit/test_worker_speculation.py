"""Guessing ahead on real, tiny models: the same tokens as without it, whoever guesses and whatever comes between."""

from __future__ import annotations

from typing import Any

import pytest

from mlxd.childwire import Generate, Generated
from mlxd.worker.engine import Engine, Outcome
from mlxd.worker.load import LoadedModel, load
from support import tiny_model

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2}
# Penalties, a bias and a report for each token.
ALL: dict[str, Any] = SAMPLED | {
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {"70": 2.0},
    "logprobs": 2,
}
TEXT = "the quick brown fox jumps over the lazy dog and then it rests"
FAMILIES = ("llama", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: load(str(tiny_model.build(folder / family, family=family)), lambda fraction: None)
        for family in (*FAMILIES, "mamba2")
    }


def make(loaded: LoadedModel, **options: Any) -> Engine:
    return Engine(loaded, **{"max_batch": 8, "prefill_step": 64, "cache_bytes": 1 << 26} | options)


def ask(text: str = TEXT, **options: Any) -> Generate:
    turns = [{"role": "user", "content": text}]
    return Generate(kind="chat", messages=turns, options={"max_tokens": 60} | options, stream=True)


def drain(engine: Engine, ends: dict[int, Any] | None = None, pieces: dict[int, str] | None = None) -> dict[int, Any]:
    ends = {} if ends is None else ends
    while engine.busy:
        note(engine.step(), ends, pieces)
    return ends


def note(outcome: Outcome, ends: dict[int, Any], pieces: dict[int, str] | None = None) -> None:
    for number, text, _ in outcome.pieces:
        if pieces is not None:
            pieces[number] = pieces.get(number, "") + text
    ends.update(outcome.ended)


def alone(engine: Engine, request: Generate) -> Generated:
    engine.submit(0, request)
    return drain(engine)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, ALL], ids=["greedy", "sampled", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lookup_gives_the_same_tokens(models: dict[str, LoadedModel], family: str, options: dict[str, Any]) -> None:
    engine = make(models[family], cache_bytes=0)
    plain = alone(engine, ask(speculation="off", **options))
    assert plain.speculation is None
    guessed = alone(engine, ask(speculation="lookup", **options))
    assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
    assert guessed.completion_tokens == plain.completion_tokens
    assert guessed.speculation is not None
    assert 0 <= guessed.speculation.accepted_tokens <= guessed.speculation.drafted_tokens
    print(guessed.speculation)
