"""Architectures of every sort through the daemon: several at once, a cancel, and a folder that is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client
from mlxd_client.errors import ModelInvalid
from support import tiny_model
from support.daemon import Daemon

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 10}
TEXTS = ["hello", "the quick brown fox jumps over the lazy dog " * 2, "numbers 1 2 3"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_several_at_once_and_one_that_leaves(client: Client, tmp_path: Path, family: str) -> None:
    model = str(tiny_model.build(tmp_path / family, family=family, context=4096))
    alone = [client.chat(text, model=model, **GREEDY).text for text in TEXTS]
    leaving = client.stream_chat("go on", model=model, temperature=0, max_tokens=3000)
    next(iter(leaving))
    with ThreadPoolExecutor(3) as pool:
        together = pool.map(lambda text: client.chat(text, model=model, **GREEDY), TEXTS)
        leaving.close()
        assert [done.text for done in together] == alone
    client.unload(model)


def test_a_folder_that_would_never_be_read(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    model = tiny_model.build(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(ModelInvalid, match="no file"):
        client.chat("hello", model=str(model))
    assert client.chat("hello", max_tokens=3).usage.completion_tokens > 0
