"""What a Plan does to logits against what mlx_lm's own sampler and processors do to them, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import sample_utils

from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, load
from mlxd.worker.options import resolve
from mlxd.worker.sampling import PENALTY_WINDOW, Plan, Sampling, apply_xtc, make_key, other_key
from mlxd_client.errors import InvalidParams
from support import tiny_model
from support.asking import alone, ask, drain

pytestmark = pytest.mark.model

VOCABULARY = 60
SPARED = (3, 11)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """mlx_lm's filters are compiled anew for each number and shape, which takes most of a second on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(rows: int, seed: int) -> mx.array:
    return mx.random.normal((rows, VOCABULARY), key=mx.random.key(seed)) * 3


def filtered(row: Sampling, logprobs: mx.array, *, xtc: bool) -> mx.array:
    """mlx_lm's filters in the order of its make_sampler; `xtc` says what it drew."""
    if row.top_p < 1:
        logprobs = sample_utils.apply_top_p(logprobs, row.top_p)
    if row.min_p > 0:
        logprobs = sample_utils.apply_min_p(logprobs, row.min_p)
    if xtc:
        logprobs = sample_utils.apply_xtc(logprobs, 1.0, row.xtc_threshold, list(row.spared))
    if row.top_k > 0:
        logprobs = sample_utils.apply_top_k(logprobs, row.top_k)
    return logprobs


def draw_of(row: Sampling, position: int) -> float:
    """What decides whether xtc is applied at a position."""
    first, second = row.key
    key = mx.array([first ^ 0x9E3779B9, (second + position) & 0xFFFFFFFF], dtype=mx.uint32)
    return float(mx.random.uniform(shape=(1,), key=key).item())


def expected(row: Sampling, logprobs: mx.array, position: int) -> int:
    """The token that a row gets at a position, by mlx_lm's filters and the row's own noise."""
    if row.temperature == 0:
        return int(sample_utils.make_sampler(0.0)(logprobs).item())
    kept = filtered(row, logprobs, xtc=row.xtc_probability > 0 and draw_of(row, position) <= row.xtc_probability)
    key = mx.array([row.key[0], (row.key[1] + position) & 0xFFFFFFFF], dtype=mx.uint32)
    noise = mx.random.gumbel((1, VOCABULARY), key=key)
    return int(mx.argmax(kept / row.temperature + noise, axis=-1).item())


ROWS = [
    Sampling(),
    Sampling(temperature=1.0, key=(1, 2)),
    Sampling(temperature=0.7, top_p=0.8, key=(3, 4)),
    Sampling(temperature=0.9, top_p=0.8, key=(5, 6)),
    Sampling(temperature=1.5, min_p=0.1, key=(7, 8)),
    Sampling(temperature=1.5, top_k=5, key=(9, 10)),
    Sampling(temperature=2.0, top_p=0.9, min_p=0.02, top_k=9, key=(11, 12)),
    Sampling(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.02, spared=SPARED, key=(13, 14)),
    Sampling(temperature=3.0, xtc_probability=0.9, xtc_threshold=0.01, spared=SPARED, key=(15, 2**32 - 3)),
    Sampling(temperature=2.0, top_p=0.95, min_p=0.01, top_k=20, xtc_probability=0.3, xtc_threshold=0.1, key=(17, 18)),
]


@settings(max_examples=12, deadline=None)
@given(picked=st.lists(st.sampled_from(ROWS), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_every_row_of_any_batch_gets_what_mlx_lms_filters_leave(picked: list[Sampling], seed: int) -> None:
    histories = [[1] * (seed % 5 + at) for at in range(len(picked))]
    plan = Plan(picked, histories, mx.zeros(len(picked), dtype=mx.uint32))
    for step in range(4):
        values = logits(len(picked), seed + 7919 * step)
        logprobs = values - mx.logsumexp(values, axis=-1, keepdims=True)
        wanted = [expected(row, logprobs[at : at + 1], len(histories[at]) + step) for at, row in enumerate(picked)]
        assert plan.sample(logprobs).tolist() == wanted


# --- xtc ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.5])
def test_xtc_leaves_what_mlx_lms_leaves_given_the_same_draw(threshold: float) -> None:
    logprobs = logits(6, 1) - mx.logsumexp(logits(6, 1), axis=-1, keepdims=True)
    always, never = mx.zeros((6, 1)), mx.ones((6, 1))
    half, thresholds = mx.full((6, 1), 0.5), mx.full((6, 1), threshold)
    wanted = sample_utils.apply_xtc(logprobs, 1.0, threshold, list(SPARED))
    assert mx.array_equal(apply_xtc(logprobs, always, half, thresholds, SPARED), wanted)
    assert mx.array_equal(apply_xtc(logprobs, never, half, thresholds, SPARED), logprobs)
    bare = sample_utils.apply_xtc(logprobs, 1.0, threshold, [])
    assert mx.array_equal(apply_xtc(logprobs, always, half, thresholds, ()), bare)


def test_xtc_takes_each_rows_own_numbers() -> None:
    probs = mx.array([[0.5, 0.3, 0.15, 0.05]] * 3)
    kept = apply_xtc(
        mx.log(probs), mx.array([[0.2], [0.2], [0.2]]), mx.array([[0.1], [0.5], [0.5]]),
        mx.array([[0.1], [0.1], [0.2]]), (),
    )  # fmt: skip
    left = [[at for at, value in enumerate(row) if value > -math.inf] for row in kept.tolist()]  # type: ignore[union-attr, arg-type]
    assert left == [[0, 1, 2, 3], [2, 3], [1, 2, 3]]


def test_xtc_happens_as_often_as_asked() -> None:
    row = Sampling(temperature=0.01, xtc_probability=0.3, xtc_threshold=0.1, key=make_key(1))
    plan = Plan([row], [[0]], mx.array([0]))
    logprobs = mx.log(mx.array([[0.6, 0.3, 0.1]]))
    draws = [plan.sample(logprobs).tolist()[0] for _ in range(1500)]  # type: ignore[index]
    assert abs(draws.count(1) / 1500 - 0.3) < 0.05
    assert draws.count(2) == 0


def test_xtc_with_a_seed_is_the_same_in_any_company_and_spares_ends(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_batch=8, prefill_step=16)
    request = ask("hello", seed=3, temperature=1.0, xtc_probability=0.6, xtc_threshold=0.005, max_tokens=20, top_p=1.0)
    first = alone(engine, request).text
    assert first != alone(engine, ask("hello", seed=3, temperature=1.0, max_tokens=20, top_p=1.0)).text
    engine.submit(1, ask("others", xtc_probability=1.0, xtc_threshold=0.2, max_tokens=30))
    engine.submit(2, request)
    assert drain(engine).ends[2].text == first
    newline = loaded.tokenizer.encode("\n", add_special_tokens=False)
    assert {*newline, *loaded.tokenizer.eos_token_ids} <= set(engine._requests.spared)


def test_a_threshold_alone_would_do_nothing_and_is_refused() -> None:
    with pytest.raises(InvalidParams) as caught:
        resolve("chat", {"xtc_threshold": 0.2}, {}, 100)
    assert caught.value.details["field"] == "xtc_threshold"
    assert resolve("chat", {"xtc_probability": 0.2}, {}, 100).sampling.xtc_threshold == 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [("xtc_probability", 1.5), ("xtc_probability", -0.1), ("xtc_threshold", 0.6), ("xtc_probability", float("nan"))],
)
def test_xtc_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidParams) as caught:
        resolve("chat", {"xtc_probability": 0.5, name: value}, {}, 100)
    assert caught.value.details["field"] == name


# --- bias, penalties, reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")), lambda fraction: None)


@settings(max_examples=15, deadline=None)
@given(
    history=st.lists(st.integers(0, VOCABULARY - 1), max_size=45),
    steps=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=25),
    penalties=st.tuples(st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2)),
)
def test_penalties_look_at_the_last_tokens_as_mlx_lms_do(
    history: list[int], steps: list[int], penalties: tuple[float, float, float]
) -> None:
    """As rows grow, and as a Plan is made anew at any moment, which is what a change of the batch does."""
    repetition, presence, frequency = penalties
    rows = [Sampling(), Sampling(repetition=repetition, presence=presence, frequency=frequency)]
    processors = sample_utils.make_logits_processors(
        None, repetition, PENALTY_WINDOW, presence, PENALTY_WINDOW, frequency, PENALTY_WINDOW
    )
    plan = None
    for at, token in enumerate(steps):
        inputs = mx.array([0, token], dtype=mx.uint32)
        if plan is None or at % 7 == 3:
            plan = Plan(rows, [[5], list(history)], inputs)
        values = logits(2, at)
        got = plan.penalise(inputs, mx.array(values))
        history = [*history, token]
        wanted = mx.array(values[1:])
        for processor in processors:
            wanted = processor(mx.array(history), wanted)
        assert np.allclose(np.array(got[1]), np.array(wanted[0]), atol=1e-4)
        assert mx.array_equal(got[0], values[0])


def test_logprobs_are_the_models_own_whatever_is_drawn(loaded: LoadedModel) -> None:
    """Of the logits with bias and penalties, before any filter: what mlx_lm hands out as `logprobs`."""
    engine = Engine(loaded, max_batch=4, prefill_step=64)
    options: dict[str, Any] = {
        "temperature": 1.0, "seed": 2, "top_k": 3, "repetition_penalty": 1.3, "logit_bias": {"40": 2.0}, "logprobs": 4,
    }  # fmt: skip
    made = alone(engine, ask("hello", max_tokens=8, **options))
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, enable_thinking=False
    )
    tokens = list(prompt)
    assert made.logprobs is not None
    processors = sample_utils.make_logits_processors({40: 2.0}, 1.3, PENALTY_WINDOW)
    for entry in made.logprobs:
        values = loaded.model(mx.array([tokens]))[:, -1, :]
        for processor in processors:
            values = processor(mx.array(tokens), values)
        wanted = (values - mx.logsumexp(values, axis=-1, keepdims=True))[0]
        order = mx.argsort(-wanted).tolist()[:4]  # type: ignore[index]
        assert entry["logprob"] == pytest.approx(wanted[entry["token_id"]].item(), abs=1e-3)
        assert [value for _, value in entry["top"]] == pytest.approx([wanted[at].item() for at in order], abs=1e-3)
        assert [name for name, _ in entry["top"]] == [loaded.tokenizer.decode([at]) for at in order]
        tokens.append(entry["token_id"])


def test_answers_have_keys_of_their_own() -> None:
    keys = {other_key(make_key(1), number) for number in range(16)} | {other_key(make_key(2), 1)}
    assert len(keys) == 17
    assert other_key(make_key(1), 0) == make_key(1)
