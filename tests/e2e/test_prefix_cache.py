"""What a conversation computed is not computed again: through a daemon, told by `usage.cached_tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from mlxd_client.types import Completion
from support import tiny_model
from support.daemon import Daemon

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8}
FIRST = [
    {"role": "system", "content": "the quick brown fox jumps over the lazy dog"},
    {"role": "user", "content": "so i think we should meet on monday at 3 pm"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")
    return str(folder)


def second(first: Completion) -> list[dict[str, str]]:
    return [*FIRST, {"role": "assistant", "content": first.text}, {"role": "user", "content": "and then"}]


def chat(client: Client, model: str, messages: list[dict[str, str]], **options: Any) -> Completion:
    return client.chat(messages, model=model, **GREEDY | options)


def test_a_second_turn_computes_what_is_new(model: str) -> None:
    with Daemon() as daemon, daemon.client() as client:
        first = chat(client, model, FIRST)
        assert first.usage.cached_tokens == 0
        got = chat(client, model, second(first))
        # The prompt of the first turn but for how it asked for an answer.
        assert first.usage.prompt_tokens - 12 <= got.usage.cached_tokens < got.usage.prompt_tokens
        client.unload(model)
        cold = chat(client, model, second(first))
        assert cold.usage.cached_tokens == 0
        assert (cold.text, cold.usage.prompt_tokens) == (got.text, got.usage.prompt_tokens)
        assert chat(client, model, second(first), cache_prompt=False).usage.cached_tokens == 0


def test_it_can_be_turned_off(model: str) -> None:
    with Daemon(prompt_cache_bytes=0) as daemon, daemon.client() as client:
        first = chat(client, model, FIRST)
        assert chat(client, model, second(first)).usage.cached_tokens == 0
        with pytest.raises(errors.Unsupported) as caught:
            chat(client, model, FIRST, cache_prompt=True)
        assert caught.value.details["option"] == "cache_prompt"
