"""Computing layer by layer: the same numbers and the same model, only sooner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlxd.worker.early import start_early
from support import tiny_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")


def logits(model: Any) -> mx.array:
    cache = make_prompt_cache(model)
    model(mx.array([[5, 6, 7]]), cache=cache)
    made: mx.array = model(mx.array([[8]]), cache=cache)
    return made


def test_the_same_numbers_sooner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain, _), (early, _) = load_model(folder), load_model(folder)
    kinds = [type(layer) for layer in early.layers]
    start_early(early)
    start_early(early)  # once is enough

    asked: list[mx.array] = []
    evaluate = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda made: (asked.append(made), evaluate(made)))
    assert mx.array_equal(logits(early), logits(plain))
    assert len(asked) == 2 * (len(kinds) - 1)  # two calls of the model, all layers but the last
    assert all(isinstance(layer, kind) for layer, kind in zip(early.layers, kinds, strict=True))
    assert [name for name, _ in tree_flatten(early.parameters())] == [
        name for name, _ in tree_flatten(plain.parameters())
    ]


@pytest.mark.parametrize("layers", [None, 7, [], [None, object(), None]])
def test_what_has_no_layers_stays_as_it_is(layers: Any) -> None:
    model = type("Model", (), {"layers": layers})()
    start_early(model)
    assert model.layers == layers
    start_early(object())
