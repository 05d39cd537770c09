"""Quantised, rotating and deterministic requests through a real daemon, and its memory budget down to a KV cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd.store.folder import examine
from mlxd_client.errors import InsufficientMemory, Unsupported
from support import tiny_model
from support.daemon import Daemon

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0}
SPARE_BYTES = 400_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny", heads=2, kv_heads=1, context=16_384)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "narrow")


@pytest.fixture(scope="module")
def daemon(folder: Path, narrow: Path) -> Iterator[Daemon]:
    budget = examine(folder).memory_bytes + SPARE_BYTES
    with Daemon(memory_budget_bytes=budget, kv_bits=json.dumps({str(narrow): 8})) as running:
        yield running


def test_each_kind_is_served_and_says_so(daemon: Daemon, folder: Path) -> None:
    with daemon.client() as client:
        plain = client.process("hello", model=str(folder), max_tokens=8, **GREEDY)
        quantised = client.process("hello", model=str(folder), max_tokens=8, kv_bits=8, **GREEDY)
        fixed = [client.process("hello", model=str(folder), max_tokens=8, deterministic=True) for _ in range(2)]
        rotating = client.process("hello", model=str(folder), max_tokens=8, context_policy="rotate", **GREEDY)
    assert [made.alone for made in (plain, quantised, *fixed, rotating)] == [False, False, True, True, True]
    assert fixed[0].text == fixed[1].text
    assert rotating.text == plain.text
    assert quantised.usage.completion_tokens > 0


def test_a_prompt_beyond_the_budget_is_refused_and_the_worker_lives(daemon: Daemon, folder: Path) -> None:
    found = examine(folder)
    with daemon.client() as client:
        client.process("hello", model=str(folder), max_tokens=1)
        before = client.status().models
        with pytest.raises(InsufficientMemory) as caught:
            client.process("the quick brown fox " * 2000, model=str(folder), max_tokens=10)
        details = caught.value.details
        assert details["prompt_tokens"] > 5000
        assert details["max_tokens"] == 10
        reserved = found.kv_token_bytes * (4096 + 256)
        assert reserved <= details["available_bytes"] <= reserved + SPARE_BYTES < details["needed_bytes"]
        assert client.process("hello", model=str(folder), max_tokens=1).usage.completion_tokens == 1
        assert client.status().models == before


def test_a_setting_that_the_model_cannot_have_is_not_passed_over(daemon: Daemon, narrow: Path) -> None:
    with daemon.client() as client, pytest.raises(Unsupported) as caught:
        client.process("hello", model=str(narrow), max_tokens=1)
    assert caught.value.details["option"] == "kv_bits"
