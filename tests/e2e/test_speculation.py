"""Draft models through a real daemon: loaded beside the model, swapped, refused, given by the settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client.errors import InvalidParams, ModelNotFound, Unsupported
from support import tiny_model
from support.daemon import Daemon, until

pytestmark = pytest.mark.model

SEEDED: dict[str, Any] = {"seed": 5, "temperature": 0.8, "max_tokens": 40}
TURNS = [{"role": "user", "content": "So I think we should meet on Monday"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "target": tiny_model.build(folder / "target", family="llama"),
        "draft": tiny_model.build(folder / "draft", family="llama"),
        "other": tiny_model.build(folder / "other", family="qwen3", layers=1),
        "stranger": tiny_model.build(folder / "stranger", family="llama", vocabulary=320),
        "state": tiny_model.build(folder / "state", family="mamba2"),
        "broken": tiny_model.build(folder / "broken", family="llama"),
    }
    (made["broken"] / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing of that")
    return {name: str(path.resolve()) for name, path in made.items()}


@pytest.fixture(scope="module")
def daemon(folders: dict[str, str]) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


def test_a_draft_model_is_attached_swapped_and_reported(daemon: Daemon, folders: dict[str, str]) -> None:
    target = folders["target"]
    with daemon.client() as client:
        assert client.load(target).draft_model is None
        pid = daemon.worker().pid
        plain = client.chat(TURNS, model=target, speculation="off", **SEEDED)
        with pytest.raises(Unsupported) as refused:
            client.chat(TURNS, model=target, speculation="draft")
        assert refused.value.details["option"] == "speculation"
        with client.events(topics=["draft_attached"]) as events:
            for name in ("draft", "other", "other"):
                assert client.load(target, draft_model=folders[name]).draft_model == folders[name]
                made = client.chat(TURNS, model=target, speculation="draft", **SEEDED)
                assert made.text == plain.text
                assert made.speculation is not None
                assert made.speculation.kind == "draft"
                assert made.speculation.accepted_tokens <= made.speculation.drafted_tokens
            until(events, "draft_attached", draft_model=folders["other"])
        assert daemon.worker().pid == pid, "it was loaded anew"
        assert client.model(target).draft_model == folders["other"]
        assert client.unload(target).draft_model is None
        assert client.load(target).draft_model is None


def test_what_is_no_draft_model_is_refused_and_the_model_goes_on(daemon: Daemon, folders: dict[str, str]) -> None:
    target = folders["target"]
    with daemon.client() as client:
        client.load(target, draft_model=folders["draft"])
        for name in ("stranger", "state", "broken", "target"):
            with pytest.raises(InvalidParams) as refused:
                client.load(target, draft_model=folders[name])
            assert refused.value.details["field"] == "draft_model", name
        for ref in ("no/such", folders["target"] + "/nothing"):
            with pytest.raises(ModelNotFound) as missing:
                client.load(target, draft_model=ref)
            assert missing.value.details["field"] == "draft_model"
        with pytest.raises(Unsupported) as unsupported:
            client.load(folders["state"], draft_model=folders["draft"])
        assert unsupported.value.details["option"] == "draft_model"
        assert client.model(target).draft_model == folders["draft"]
        assert client.chat(TURNS, model=target, speculation="draft", **SEEDED).speculation is not None


def test_the_settings_give_a_model_its_draft(folders: dict[str, str]) -> None:
    given = {folders["target"]: folders["draft"], folders["other"]: str(Path(folders["other"]) / "nothing")}
    with Daemon(draft_models=json.dumps(given)) as daemon, daemon.client() as client:
        alone = client.plan(folders["draft"]).memory_bytes
        made = client.chat(TURNS, model=folders["target"], speculation="draft", **SEEDED)
        assert made.speculation is not None
        assert client.model(folders["target"]).draft_model == folders["draft"]
        assert client.status().memory.used_bytes > alone
        assert client.chat(TURNS, model=folders["other"], **SEEDED).text
        assert client.model(folders["other"]).draft_model is None
