"""Folders that are models, and folders that are not: each bad one is refused with a type and a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxd.worker.load import LoadedModel, context_length, load
from mlxd.worker.options import resolve
from mlxd.worker.prompt import PromptBuilder, time_limit
from mlxd_client.errors import InvalidParams, ModelInvalid, RpcError, Unsupported
from support import tiny_model

pytestmark = pytest.mark.model

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def quietly(folder: Path) -> LoadedModel:
    return load(str(folder), lambda fraction: None)


def test_a_sound_folder_loads_in_parts(folder: Path) -> None:
    heard: list[float] = []
    loaded = load(str(folder), heard.append)
    assert heard[0] == 0.0
    assert heard[-1] == 1.0
    assert heard == sorted(heard)
    assert loaded.context_length == 512
    assert loaded.vocabulary == 400
    assert set(loaded.capabilities) == {
        "process",
        "chat",
        "thinking",
        "logprobs",
        "seed",
        "structured",
        "grammar",
        "embed",
    }


BROKEN: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no config": lambda f: (f / "config.json").unlink(),
    "config no JSON": lambda f: (f / "config.json").write_text("{"),
    "config a list": lambda f: (f / "config.json").write_text("[]"),
    "config too deep": lambda f: (f / "config.json").write_text("[" * 100_000),
    "config not text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
    "no model type": lambda f: edit(f, "config.json", model_type=None),
    "unknown model type": lambda f: edit(f, "config.json", model_type="no_such_model"),
    "model type with dots": lambda f: edit(f, "config.json", model_type="..utils"),
    "endless layers": lambda f: edit(f, "config.json", num_hidden_layers=10**9),
    "negative layers": lambda f: edit(f, "config.json", num_hidden_layers=-1),
    "other shape": lambda f: edit(f, "config.json", hidden_size=128),
    "no heads": lambda f: edit(f, "config.json", num_attention_heads=0),
    "text for a number": lambda f: edit(f, "config.json", hidden_size="64"),
    "own code": lambda f: edit(f, "config.json", model_file="model.py"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "truncated weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
    "a missing part": lambda f: edit(
        f, "model.safetensors.index.json", weight_map={"a": "model-00001-of-00002.safetensors"}
    ),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer no JSON": lambda f: (f / "tokenizer.json").write_text("{"),
    "hostile defaults": lambda f: edit(f, "mlxd.json", defaults={"temperature": -5}),
    "defaults of another type": lambda f: edit(f, "mlxd.json", defaults=[1]),
    "settings no JSON": lambda f: (f / "mlxd.json").write_text("nope"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(folder: Path, name: str) -> None:
    BROKEN[name](folder)
    with pytest.raises(ModelInvalid) as caught:
        quietly(folder)
    assert caught.value.message


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    folder = tiny_model.build(tmp_path / "model")
    small = tiny_model.build(tmp_path / "small", vocabulary=300)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(small / name, folder / name)
    with pytest.raises(ModelInvalid, match="tokens"):
        quietly(folder)


def test_settings_of_the_folder(folder: Path) -> None:
    edit(folder, "mlxd.json", defaults={"temperature": 0, "max_tokens": 7, "from_the_future": 1}, guard="faithful")
    loaded = quietly(folder)
    assert loaded.faithful
    assert "faithful" in loaded.capabilities
    choices = resolve("process", {"top_k": 3}, loaded.defaults, 400)
    assert (choices.max_tokens, choices.sampling.temperature, choices.sampling.top_k) == (7, 0, 3)
    assert resolve("process", {"max_tokens": 9}, loaded.defaults, 400).max_tokens == 9


def test_defaults_of_a_request_that_says_nothing() -> None:
    process, chat = (resolve(kind, {}, {}, 400) for kind in ("process", "chat"))
    assert (process.max_tokens, chat.max_tokens) == (150, 2048)
    sampling = process.sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition) == (0.7, 0.8, 1.15)
    assert process.sampling.key != chat.sampling.key
    assert resolve("chat", {"seed": 3}, {}, 400).sampling.key == resolve("chat", {"seed": 3}, {}, 400).sampling.key
    with pytest.raises(InvalidParams):
        resolve("sing", {}, {}, 400)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 4096),
        ({"max_position_embeddings": 32768}, 32768),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": -5}, 4096),
        ({"max_position_embeddings": "many"}, 4096),
        ({"max_position_embeddings": 10**15}, 16_777_216),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 1e300}}, 2048),
    ],
)
def test_context_length(config: dict[str, Any], expected: int) -> None:
    assert context_length(config) == expected


# --- prompts --------------------------------------------------------------------------------------------------------


def builder(folder: Path, template: str | None) -> PromptBuilder:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = quietly(folder)
    return PromptBuilder(loaded.tokenizer, loaded.context_length, loaded.vocabulary)


def test_thinking_opens_a_thought_where_the_template_does(folder: Path) -> None:
    prompts = builder(folder, tiny_model.CHAT_TEMPLATE + "{%- if enable_thinking %}{{- '<think>\\n' }}{%- endif %}")
    assert prompts.build("chat", [USER], thinking=True).in_reasoning
    assert not prompts.build("chat", [USER], thinking=False).in_reasoning
    spoof = {"role": "user", "content": "<think>"}
    assert not prompts.build("chat", [spoof], thinking=False).in_reasoning


def test_without_a_template_process_takes_plain_text(folder: Path) -> None:
    prompts = builder(folder, None)
    prompt = prompts.build("process", [SYSTEM, USER], thinking=False)
    assert prompt.source == "hello"
    assert len(prompt.tokens) == prompts.count(text="be brief\n\nhello", messages=None)
    with pytest.raises(Unsupported, match="no chat template"):
        prompts.build("chat", [USER], thinking=False)


@pytest.mark.parametrize(
    ("template", "messages", "error", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", [USER], InvalidParams, "roles must alternate"),
        (
            "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{%- endif %}{{ messages[0].content }}",
            [SYSTEM, USER],
            Unsupported,
            "system",
        ),
        ("{{ nothing.at.all }}", [USER], ModelInvalid, "template"),
        ("{% for %}", [USER], ModelInvalid, "template"),
        ("", [USER], InvalidParams, "empty"),
    ],
)
def test_templates_that_refuse_or_fail(
    folder: Path, template: str, messages: list[Any], error: type[RpcError], words: str
) -> None:
    with pytest.raises(error, match=words):
        builder(folder, template).build("chat", messages, thinking=False)


def test_a_template_that_loops_is_stopped() -> None:
    def render() -> None:
        with time_limit(0.01):
            while True:
                pass

    with pytest.raises(ModelInvalid, match="longer"):
        render()
