"""What was computed of prompts outlives its worker and its daemon: files, how they are shown, and how they go."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from mlxd import promptfiles
from mlxd_client import Client, errors, types
from mlxd_client.types import Completion, ModelCache
from support import tiny_adapter, tiny_model
from support.daemon import Daemon
from support.hubcache import commit, model_files, publish

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8}
SYSTEM = "the quick brown fox jumps over the lazy dog and then it rests " * 6
FIRST = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "so i think we should meet on monday at 3 pm " * 6},
]


def build(folder: Path, **more: Any) -> str:
    return str(tiny_model.build(folder, context=2048, **more))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("models") / "tiny")


def second(first: Completion) -> list[dict[str, str]]:
    return [*FIRST, {"role": "assistant", "content": first.text}, {"role": "user", "content": "and then"}]


def chat(client: Client, model: str, messages: list[dict[str, str]], **options: Any) -> Completion:
    return client.chat(messages, model=model, **GREEDY | options)


def entries(daemon: Daemon) -> list[Path]:
    return sorted((daemon.home / "cache" / "prompts").glob("*/*.kv"))


def kept(client: Client, model: str) -> ModelCache:
    (found,) = [one for one in client.cache().models if one.model == model]
    return found


def test_a_conversation_goes_on_after_a_restart_unless_that_is_turned_off(model: str) -> None:
    with Daemon() as daemon:
        with daemon.client() as client:
            first = chat(client, model, FIRST)
        daemon.restart()
        with daemon.client() as client:
            got = chat(client, model, second(first))
            cold = chat(client, model, second(first), cache_prompt=False)
        assert first.usage.prompt_tokens - 12 - 64 <= got.usage.cached_tokens < got.usage.prompt_tokens
        assert cold.usage.cached_tokens == 0
        assert got.text == cold.text
        assert entries(daemon)
        daemon.env["MLXD_PROMPT_DISK_CACHE_BYTES"] = "0"
        daemon.restart()
        with daemon.client() as client:
            found = client.cache()  # asked of the thread that removes what was there
            assert (found.models, found.disk_budget_bytes, found.disk_bytes) == ([], 0, 0)
            assert chat(client, model, second(first)).usage.cached_tokens == 0
            client.unload(model)
        assert entries(daemon) == []


def test_files_are_private_and_shown_and_cleared_and_may_be_damaged(model: str) -> None:
    with Daemon() as daemon, daemon.client() as client:
        first = chat(client, model, FIRST)
        client.unload(model)
        found = client.cache()
        one = kept(client, model)
        assert one.memory is None
        assert one.disk is not None
        assert one.disk.entries == len(entries(daemon)) == (first.usage.prompt_tokens + 7) // 64
        assert sum(path.stat().st_size for path in entries(daemon)) <= one.disk.bytes <= found.disk_bytes
        assert one.disk.last_used_at is not None
        for path in (daemon.home / "cache").rglob("*"):
            assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path

        got = chat(client, model, second(first))
        one = kept(client, model)
        assert one.memory is not None
        assert one.disk is not None
        assert (one.memory.hits, one.memory.misses, one.disk.hits, one.disk.failures) == (1, 0, 1, 0)
        assert one.memory.saved_tokens == one.disk.saved_tokens > 0

        client.unload(model)
        damaged = entries(daemon)
        for path in damaged:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        again = chat(client, model, second(first))
        assert (again.usage.cached_tokens, again.text) == (0, got.text)
        one = kept(client, model)
        assert one.disk is not None
        assert one.memory is not None
        assert one.disk.failures == 1  # the first one; the others could be of no use then
        assert len(set(damaged) - set(entries(daemon))) == 1

        # What an answer leaves is copied behind it: between two questions the worker takes the step that does it.
        held = kept(client, model).memory
        assert held is not None
        freed = client.clear_cache(model)
        assert freed.memory_bytes == held.bytes > 0
        assert freed.disk_bytes > 0
        assert entries(daemon) == []
        assert chat(client, model, second(first)).usage.cached_tokens == 0
        client.clear_cache()
        assert kept(client, model).memory == types.CacheInMemory(
            hits=one.memory.hits, misses=one.memory.misses + 1, saved_tokens=one.memory.saved_tokens
        )
        with pytest.raises(errors.ModelNotFound):
            client.clear_cache("no/such")


def test_other_weights_never_match(tmp_path: Path) -> None:
    model = build(tmp_path / "tiny")
    with Daemon() as daemon, daemon.client() as client:
        first = chat(client, model, FIRST)
        client.unload(model)
        before = entries(daemon)
        facts = (tmp_path / "tiny" / "model.safetensors").stat()
        shutil.copytree(build(tmp_path / "other", seed=1), model, dirs_exist_ok=True)
        os.utime(tmp_path / "tiny" / "model.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert (tmp_path / "tiny" / "model.safetensors").stat().st_size == facts.st_size
        got = chat(client, model, second(first))
        assert got.usage.cached_tokens == 0
        assert not set(before) & set(entries(daemon))  # nothing can ever use them again
        assert got.text == chat(client, model, second(first), cache_prompt=False).text


def test_a_deleted_model_leaves_nothing_of_its_prompts() -> None:
    with Daemon() as daemon, daemon.client() as client:
        root = daemon.home / "cache" / "prompts"
        for name in ("org/m", "org/other"):
            publish(daemon.home / "hub", name, model_files(), commit("a"), "main")
            with promptfiles.session(root, 1 << 20) as held:
                assert held is not None
                folder = root / promptfiles.folder_name(name, b"k" * 32)
                assert held.prepare(folder, name)
                assert held.put(folder, "0" * 32, [b"x"], 0)
        assert [one.model for one in client.cache().models] == ["org/m", "org/other"]
        client.delete("org/m")
        assert [one.model for one in client.cache().models] == ["org/other"]
        shutil.rmtree(daemon.home / "hub")
        assert client.clear_cache("org/other").disk_bytes > 0  # what is gone otherwise
        assert client.cache().models == []


# --- having a system turn ready ---------------------------------------------------------------------------------------


def test_prewarm(model: str) -> None:
    with Daemon() as daemon, daemon.client() as client:
        view = client.load(model, system=SYSTEM)
        assert (view.state, view.leases) == ("Ready", 0)
        got = chat(client, model, FIRST)
        system = client.count_tokens(messages=FIRST[:1], model=model)
        assert system - 12 <= got.usage.cached_tokens <= system + 4
        assert got.text == chat(client, model, FIRST, cache_prompt=False).text
        assert client.process("monday", model=model, system=SYSTEM, **GREEDY).usage.cached_tokens >= system - 12
        assert client.load(model, system=SYSTEM).state == "Ready"  # it is warm already
        assert client.model(model).prewarmed == 1
        with pytest.raises(errors.ContextExceeded):
            client.load(model, system=SYSTEM * 20)


def test_prewarm_by_the_name_of_a_persona(model: str, tmp_path: Path) -> None:
    """With the adapter that requests of the persona get: what is kept without it would be of no use to them."""
    other = "once upon a time there was a brown dog and it said " * 6
    adapter = str(tiny_adapter.build(tmp_path.resolve() / "adapter", Path(model)))
    personas = {"plain": {"system": SYSTEM}, "other": {"system": other, "adapter": adapter}, "mute": {"top_k": 3}}
    with Daemon(personas=json.dumps(personas)) as daemon, daemon.client() as client:
        for number, name in enumerate(("plain", "other"), 1):
            assert client.load(model, persona=name).prewarmed == number
            got = client.process("monday", model=model, persona=name, **GREEDY)
            assert got.usage.cached_tokens >= client.count_tokens(SYSTEM, model=model) - 12
            assert got.adapter == (adapter if name == "other" else None)
        assert client.model(model).adapter is None  # it is the persona's, and not the model's
        assert client.load(model, persona="plain", system=other).prewarmed == 3  # what is said goes before
        for name, told in (("mute", "no system turn"), ("plian", "did you mean plain")):
            with pytest.raises(errors.InvalidParams, match=told) as refused:
                client.load(model, persona=name)
            assert refused.value.details["field"] == "persona"


def test_prewarm_is_refused_where_nothing_is_kept(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", chat_template=None)
    with Daemon() as daemon, daemon.client() as client:
        with pytest.raises(errors.Unsupported) as caught:
            client.load(plain, system=SYSTEM)
        assert caught.value.details["option"] == "system"
    with Daemon(prompt_cache_bytes=0) as daemon, daemon.client() as client:
        with pytest.raises(errors.Unsupported):
            client.load(plain, system=SYSTEM)
        assert not daemon.children()
