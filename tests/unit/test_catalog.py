"""The catalog: what is recommended is consistent in itself, and what users add is checked by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mlxd.catalog import CatalogError, load
from mlxd.store.hub import is_repo_id

BUILT_IN = load({})
GB = 1_000_000_000


def test_the_recommended_models_are_all_there() -> None:
    names = [
        "Qwen3-1.7B", "Mistral-7B-Instruct-v0.3", "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct", "Qwen2.5-3B-Instruct",
        "gemma-2-2b-it", "Qwen2.5-Coder-7B-Instruct", "DeepSeek-Coder-V2-Lite-Instruct", "Meta-Llama-3-8B-Instruct",
    ]  # fmt: skip
    ids = [entry.model for entry in BUILT_IN]
    assert len(ids) == len(names)
    for name in names:
        (found,) = [id for id in ids if f"/{name}-4bit" in id or f"/Meta-{name}-4bit" in id]
        assert found.startswith("mlx-community/")
        assert is_repo_id(found)
    assert [entry.model for entry in BUILT_IN if entry.default] == ["mlx-community/Qwen3-1.7B-4bit"]


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda entry: entry.name)
def test_each_says_what_it_takes(entry: Any) -> None:
    assert entry.uses
    assert set(entry.uses) <= {"general", "light", "coding", "vision"}
    assert entry.name
    assert entry.note
    # Weights, a KV cache of 4,096 tokens, and a worker; at 4.5 bits a weight.
    assert entry.memory_bytes > entry.size_bytes + 0.1 * GB
    billions = entry.size_bytes * 8 / 4.5 / GB
    assert entry.smallest_mac_gb == (8 if billions < 3.5 else 16 if billions < 9 else 32)
    # Comfortable: it leaves more than half of such a Mac to everything else.
    assert entry.memory_bytes < entry.smallest_mac_gb * GB / 2


def test_users_add_and_change() -> None:
    made = {
        entry.model: entry
        for entry in load(
            {
                "me/mine": {"uses": ["dictation"], "size_bytes": 2 * GB, "default": True},
                "me/unknown": {},
                "mlx-community/gemma-2-2b-it-4bit": {"note": "mine"},
            }
        )
    }
    assert list(made) == [*(entry.model for entry in BUILT_IN), "me/mine", "me/unknown"]
    assert [entry.model for entry in made.values() if entry.default] == ["me/mine"]
    assert made["me/mine"].memory_bytes > 2 * GB
    assert (made["me/unknown"].size_bytes, made["me/unknown"].memory_bytes) == (0, 0)
    gemma = made["mlx-community/gemma-2-2b-it-4bit"]
    assert (gemma.note, gemma.smallest_mac_gb) == ("mine", 8)
    assert load({}) == BUILT_IN


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 5}, "'size'"),
        ({"size_bytes": "5 GB"}, "size_bytes cannot be '5 GB': expected `int"),
        ({"size_bytes": -1}, "size_bytes"),
        ({"uses": "coding"}, "uses cannot be 'coding'"),
        ({"uses": [""]}, "uses"),
        ({"default": 1}, "default"),
        ({"smallest_mac_gb": 0}, "smallest_mac_gb"),
        ({"name": "x" * 1000}, "name"),
        ({"state": "Ready"}, "'state'"),
        ([], "table"),
    ],
)
def test_what_is_wrong_is_named(fields: Any, said: str) -> None:
    with pytest.raises(CatalogError) as raised:
        load({"me/ok": {}, "me/bad": fields})
    assert isinstance(raised.value, ValueError)
    assert 'catalog."me/bad"' in str(raised.value)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300


def test_two_defaults_are_refused() -> None:
    with pytest.raises(CatalogError, match=r"me/a and me/b"):
        load({"me/a": {"default": True}, "me/b": {"default": True}})


def test_it_costs_nothing_until_it_is_wanted() -> None:
    script = "import sys, mlxd.cli.main, mlxd.settings; print('mlxd.catalog' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
