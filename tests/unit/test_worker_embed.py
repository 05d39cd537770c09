"""Vectors of texts on real, tiny models: as computed one by one, whatever comes together and meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxd.childwire import Embedded, EmbedTexts
from mlxd.worker.embed import MAX_JOBS, Embedder
from mlxd.worker.engine import Engine
from mlxd.worker.faults import EngineLost
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.pooling import Pooling, read_pooling
from mlxd_client.errors import (
    Cancelled,
    ContextExceeded,
    InternalError,
    InvalidParams,
    ModelInvalid,
    QueueFull,
    RpcError,
    Unsupported,
)
from support import tiny_model
from support.asking import GREEDY, Collected, alone, ask, drain

pytestmark = pytest.mark.model

TEXTS = [
    "hello",
    "the quick brown fox",
    "a",
    "So I think we should meet on Monday at 3 PM, if that is fine",
    "Grüße 你好",
]
AMPLE = 2_500_000


class Models(dict[str, LoadedModel]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, family: str) -> LoadedModel:
        folder = tiny_model.build(self._folders.mktemp(family), family=family, context=256)
        self[family] = load(str(folder), lambda fraction: None)
        return self[family]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory)


@pytest.fixture
def loaded(models: Models) -> LoadedModel:
    return models["qwen3"]


def pooled(loaded: LoadedModel, pooling: Pooling) -> LoadedModel:
    return LoadedModel(loaded.model, loaded.tokenizer, loaded.context_length, loaded.vocabulary, pooling=pooling)


def make(loaded: LoadedModel, **limits: int) -> Engine:
    return Engine(loaded, **{"max_batch": 4, "prefill_step": 16} | limits)


def wish(*texts: str, **options: Any) -> EmbedTexts:
    return EmbedTexts(input=list(texts), **{"most_values": AMPLE} | options)


def vectors(result: Embedded) -> np.ndarray[Any, Any]:
    assert isinstance(result, Embedded), result
    return np.frombuffer(result.vectors, "<f4").reshape(-1, result.dimensions)


def embed(engine: Engine, *texts: str, **options: Any) -> np.ndarray[Any, Any]:
    engine.embed(0, wish(*texts, **options))
    return vectors(drain(engine).ends[0])


def by_hand(loaded: LoadedModel, text: str, mode: str = "lasttoken") -> np.ndarray[Any, Any]:
    """The unscaled vector of one text, in one pass."""
    tokens = loaded.tokenizer.encode(text, add_special_tokens=True)
    states = np.array(loaded.model.model(mx.array([tokens]))[0].astype(mx.float32))
    return {"lasttoken": states[-1], "cls": states[0], "mean": states.mean(axis=0)}[mode]  # type: ignore[no-any-return]


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("mode", ["lasttoken", "mean", "cls"])
def test_a_batch_of_any_lengths_is_as_one_by_one(models: Models, family: str, mode: str) -> None:
    loaded = models[family]
    texts = [*TEXTS, "word " * 60, "word " * 61 + "b"]
    made = embed(make(pooled(loaded, Pooling(mode))), *texts)
    for vector, text in zip(made, texts, strict=True):
        assert np.allclose(vector, unit(by_hand(loaded, text, mode)), atol=2e-5)
    assert len({vector.tobytes() for vector in made}) == (len(texts) if mode != "cls" else len({t[0] for t in texts}))


def test_texts_longer_than_a_step_go_in_parts(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(loaded)
    engine._embedder._most_tokens = 10
    parts: list[tuple[int, ...]] = []
    engine._embedder._prepare()
    inner = engine._embedder._inner
    monkeypatch.setattr(
        engine._embedder, "_inner", lambda tokens, cache: parts.append(tokens.shape) or inner(tokens, cache=cache)
    )
    made = embed(engine, *TEXTS, "word " * 30)
    assert max(rows * width for rows, width in parts) <= 10
    for vector, text in zip(made, [*TEXTS, "word " * 30], strict=True):
        assert np.allclose(vector, unit(by_hand(loaded, text)), atol=2e-5)


def test_lengths_and_dimensions(loaded: LoadedModel) -> None:
    engine = make(loaded)
    raw = [by_hand(loaded, text) for text in TEXTS]
    assert np.allclose(np.linalg.norm(embed(engine, *TEXTS), axis=1), 1, atol=1e-6)
    for vector, wanted in zip(embed(engine, *TEXTS, normalize=False), raw, strict=True):
        assert np.allclose(vector, wanted, atol=1e-4)
    for vector, wanted in zip(embed(engine, *TEXTS, dimensions=7), raw, strict=True):
        assert np.allclose(vector, unit(wanted[:7]), atol=1e-5)
    for vector, wanted in zip(embed(engine, *TEXTS, dimensions=7, normalize=False), raw, strict=True):
        assert np.allclose(vector, wanted[:7], atol=1e-4)


def test_requests_share_passes_and_get_their_own(loaded: LoadedModel) -> None:
    engine = make(loaded)
    for number, text in enumerate(TEXTS):
        engine.embed(number, wish(text, "x" * number, dimensions=8 + number) if number else wish(text))
    ends = drain(engine).ends
    for number, text in enumerate(TEXTS):
        made = vectors(ends[number])
        wanted = by_hand(loaded, text)
        assert np.allclose(made[0], unit(wanted[: 8 + number] if number else wanted), atol=2e-5)
        assert ends[number].prompt_tokens == sum(
            len(loaded.tokenizer.encode(each)) for each in ([text, "x" * number] if number else [text])
        )


def test_what_a_tokenizer_puts_around_a_text_is_there(tmp_path: Path) -> None:
    folder = tiny_model.build(tmp_path / "tiny", context=64)
    raw = json.loads((folder / "tokenizer.json").read_text())
    end = {"id": "<|endoftext|>", "type_id": 0}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": end}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    loaded = load(str(folder), lambda fraction: None)
    assert loaded.tokenizer.encode("hello")[-1] == 0
    made = embed(make(loaded), "hello", "", "word " * 500, truncate=True)
    assert np.allclose(made[0], unit(by_hand(loaded, "hello")), atol=2e-5)
    assert np.allclose(made[1], unit(by_hand(loaded, "")), atol=2e-5)
    cut = [*loaded.tokenizer.encode("word " * 500, add_special_tokens=False)[:63], 0]
    wanted = np.array(loaded.model.model(mx.array([cut]))[0, -1])
    assert np.allclose(made[2], unit(wanted), atol=2e-5)


# --- beside others --------------------------------------------------------------------------------------------------


def test_an_answer_goes_on_meanwhile(loaded: LoadedModel) -> None:
    engine = make(loaded)
    plain = alone(engine, ask("hello", max_tokens=60, **GREEDY)).text
    engine.submit(1, ask("hello", max_tokens=60, **GREEDY))
    engine.embed(2, wish(*[f"word {number} " * 20 for number in range(40)]))
    collected, between = Collected(), 0
    while 1 not in collected.ends:
        collected.take(engine.step())
        between += bool(collected.pieces) and 2 not in collected.ends
    drain(engine, collected)
    assert between > 5, "no text came while vectors were made"
    assert collected.ends[1].text == plain
    assert vectors(collected.ends[2]).shape == (40, 64)


def test_a_small_request_does_not_wait_for_a_large_one(loaded: LoadedModel) -> None:
    engine = make(loaded)
    engine._embedder._most_tokens = 32
    engine.embed(1, wish(*["word " * 40] * 30))
    collected = Collected()
    for _ in range(3):
        collected.take(engine.step())
    engine.embed(2, wish("hello"))
    while 2 not in collected.ends:
        collected.take(engine.step())
    assert 1 not in collected.ends
    drain(engine, collected)
    assert np.allclose(vectors(collected.ends[2])[0], unit(by_hand(loaded, "hello")), atol=2e-5)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_takes_effect_at_once(loaded: LoadedModel, steps: int) -> None:
    engine = make(loaded)
    engine._embedder._most_tokens = 16
    engine.embed(1, wish(*["word " * 40] * 30))
    engine.embed(2, wish("hello"))
    collected = Collected()
    for _ in range(steps):
        collected.take(engine.step())
    collected.take(engine.cancel(1))
    assert isinstance(collected.ends[1], Cancelled)
    assert engine.cancel(1).ended == []
    drain(engine, collected)
    assert np.allclose(vectors(collected.ends[2])[0], unit(by_hand(loaded, "hello")), atol=2e-5)
    assert not engine.busy


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "details"),
    [
        (wish("x", dimensions=65), InvalidParams, {"field": "dimensions", "limit": 64}),
        (wish("x", "y", most_values=100), InvalidParams, {"field": "input", "limit": 1, "dimensions": 64}),
    ],
)
def test_what_no_answer_could_hold_is_refused_before_it_is_computed(
    loaded: LoadedModel, request_: EmbedTexts, error: type[RpcError], details: dict[str, Any]
) -> None:
    engine = make(loaded)
    with pytest.raises(error) as caught:
        engine.embed(0, request_)
    assert caught.value.details == details
    assert not engine.busy


@pytest.mark.parametrize("length", [257, 3000, 400_000, 1_900_000])
def test_a_text_that_is_too_long_is_named_with_its_numbers_or_cut(loaded: LoadedModel, length: int) -> None:
    engine = make(loaded)
    text = ("word " * (length // 5 + 1))[:length] if length > 257 else "!" * length
    engine.embed(0, wish("hello", text, "a"))
    engine.embed(1, wish("hello"))
    ends = drain(engine).ends
    assert isinstance(ends[0], ContextExceeded)
    assert ends[0].details["field"] == "input[1]"
    assert ends[0].details["context_length"] == loaded.context_length
    assert ends[0].details["prompt_tokens"] > loaded.context_length
    assert vectors(ends[1]).shape == (1, 64)
    tokens = loaded.tokenizer.encode(text[:3000])[: loaded.context_length]
    wanted = np.array(loaded.model.model(mx.array([tokens]))[0, -1])
    assert np.allclose(embed(engine, text, truncate=True)[0], unit(wanted), atol=5e-5)


def test_a_text_of_nothing_is_named(loaded: LoadedModel) -> None:
    engine = make(loaded)
    engine.embed(0, wish("hello", ""))
    error = drain(engine).ends[0]
    assert isinstance(error, InvalidParams)
    assert error.details["field"] == "input[1]"


def test_how_many_may_wait_is_bounded(loaded: LoadedModel) -> None:
    engine = make(loaded)
    for number in range(MAX_JOBS):
        engine.embed(number, wish("a"))
    with pytest.raises(QueueFull):
        engine.embed(MAX_JOBS, wish("a"))
    assert len(drain(engine).ends) == MAX_JOBS


def test_numbers_that_are_not_finite_cost_their_own_request(loaded: LoadedModel) -> None:
    engine = make(loaded)
    engine._embedder._prepare()
    inner = engine._embedder._inner

    def flawed(tokens: mx.array, cache: Any) -> mx.array:
        states = inner(tokens, cache=cache)
        worst = (tokens == 0).sum(axis=1) == 0  # the longest row of a pass has no padding
        return mx.where(worst[:, None, None], mx.nan, states)

    engine._embedder._inner = flawed
    engine.embed(0, wish("the quick brown fox jumps"))
    engine.embed(1, wish("a"))
    ends = drain(engine).ends
    assert isinstance(ends[0], ModelInvalid)
    assert vectors(ends[1]).shape == (1, 64)


def test_a_pass_that_raises_ends_what_it_computed_and_a_device_error_the_engine(loaded: LoadedModel) -> None:
    engine = make(loaded)
    engine._embedder._prepare()
    told = ["the kernel failed", "[METAL] Command buffer execution failed"]

    def broken(tokens: mx.array, cache: Any) -> mx.array:
        raise RuntimeError(told.pop(0))

    inner, engine._embedder._inner = engine._embedder._inner, broken
    engine.submit(5, ask("hello", max_tokens=20, **GREEDY))
    engine.embed(0, wish("a"))
    collected = Collected()
    while 0 not in collected.ends:
        collected.take(engine.step())
    assert isinstance(collected.ends[0], InternalError)
    drain(engine, collected)
    assert collected.ends[5].completion_tokens == 20
    engine.embed(1, wish("a"))
    with pytest.raises(EngineLost, match="METAL"):
        drain(engine)
    engine._embedder._inner = inner


def test_a_model_whose_states_cannot_be_had(models: Models) -> None:
    loaded = models["mamba2"]
    assert "embed" not in loaded.capabilities
    assert "embed" in models["qwen3"].capabilities
    engine = make(loaded)
    with pytest.raises(Unsupported) as caught:
        engine.embed(0, wish("a"))
    assert caught.value.details["option"] == "embed"

    class Odd:
        """Something named like the part that gives states, which gives logits, or nothing."""

        def __init__(self, result: Any) -> None:
            self.model = lambda tokens, cache: result

    for result in (None, mx.zeros((1, 2)), mx.zeros((1, 3, 8)), mx.zeros((1, 2, 8), dtype=mx.int32)):
        odd = LoadedModel(Odd(result), loaded.tokenizer, 256, 400)
        with pytest.raises(Unsupported):
            Embedder(odd, 64, 8).submit(0, wish("a"))


# --- what folders say -----------------------------------------------------------------------------------------------


def module(name: str, path: str = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{name}"}


USUAL = [module("Transformer"), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]
LAST = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}


def write(folder: Path, modules: Any = None, pooling: Any = None) -> Path:
    (folder / "1_Pooling").mkdir()
    if modules is not None:
        (folder / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(pooling if isinstance(pooling, str) else json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("modules", "pooling", "wanted"),
    [
        (None, None, Pooling()),
        (None, LAST, Pooling("lasttoken", True)),
        (USUAL, LAST, Pooling("lasttoken", True)),
        (USUAL[:2], LAST, Pooling("lasttoken", False)),
        (USUAL, {"pooling_mode_mean_tokens": True}, Pooling("mean", True)),
        (USUAL, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling("cls", True)),
        (USUAL, {"pooling_mode": "lasttoken"}, Pooling("lasttoken", True)),
    ],
)
def test_how_a_folder_says_it(tmp_path: Path, modules: Any, pooling: Any, wanted: Pooling) -> None:
    assert read_pooling(write(tmp_path, modules, pooling), {}) == wanted


@pytest.mark.parametrize(
    ("modules", "pooling", "told"),
    [
        (USUAL, None, "is not there"),
        (USUAL, {}, "nothing"),
        (USUAL, {"pooling_mode_max_tokens": True}, "max"),
        (USUAL, {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "lasttoken, mean"),
        (USUAL, {"pooling_mode_lasttoken": "yes"}, "nothing"),
        (USUAL, [1], "no object"),
        (USUAL, "{", "no JSON"),
        (USUAL, "[" * 100_000, "no JSON"),
        ([*USUAL, module("Dense", "3_Dense")], LAST, "Dense"),
        ([module("Pooling", "../../etc")], LAST, "no sound folder"),
        ([module("Pooling", "1_Pooling/..")], LAST, "no sound folder"),
        ([{"type": 3}], LAST, "module ''"),
        ([None], LAST, "module ''"),
        ({}, LAST, "no list"),
        ("nonsense", LAST, "no JSON"),
        ("[]" + " " * 2_000_000, LAST, "too long"),
    ],
)
def test_what_a_folder_asks_that_is_not_done_here(tmp_path: Path, modules: Any, pooling: Any, told: str) -> None:
    pooling = read_pooling(write(tmp_path, modules, pooling), {})
    assert told in (pooling.refusal or "")


@pytest.mark.parametrize("config", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_models_that_look_ahead_are_not_taken_for_causal_ones(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "both directions" in (read_pooling(tmp_path, config).refusal or "")


def test_a_folders_wish_is_kept_and_generating_is_untouched(tmp_path: Path) -> None:
    folder = write(tiny_model.build(tmp_path / "tiny", context=256), USUAL[:2], {"pooling_mode_mean_tokens": True})
    loaded = load(str(folder), lambda fraction: None)
    made = embed(make(loaded), *TEXTS)
    for vector, text in zip(made, TEXTS, strict=True):
        assert np.allclose(vector, by_hand(loaded, text, "mean"), atol=1e-4)
    (folder / "modules.json").write_text("[null]")
    loaded = load(str(folder), lambda fraction: None)
    engine = make(loaded)
    with pytest.raises(Unsupported):
        engine.embed(0, wish("a"))
    assert alone(engine, ask("hello", max_tokens=3, **GREEDY)).completion_tokens == 3
