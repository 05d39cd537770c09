"""Folders that are models, and folders that are not: each bad one is refused with a type and a reason."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxd.childwire import Generate
from mlxd.worker.engine import Engine
from mlxd.worker.load import LoadedModel, context_length, load
from mlxd.worker.options import resolve
from mlxd.worker.prompt import PromptBuilder
from mlxd.worker.timelimit import time_limit
from mlxd_client.errors import ContextExceeded, InvalidParams, LoadFailed, ModelInvalid, RpcError, Unsupported
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
        "adapters",
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


# --- folders that lie -------------------------------------------------------------------------------------------------


def weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors"
    arrays: Any = {name: mx.array(array) for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]
    mx.eval(arrays)
    change(arrays)
    file.unlink()
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def hole(folder: Path, name: str) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(2**40)


LIES: dict[str, Callable[[Path], Any]] = {
    "more layers": lambda f: edit(f, "config.json", num_hidden_layers=3),
    "fewer layers": lambda f: edit(f, "config.json", num_hidden_layers=1),
    "no layers": lambda f: edit(f, "config.json", num_hidden_layers=0),
    "more tokens": lambda f: edit(f, "config.json", vocab_size=401),
    "fewer tokens": lambda f: edit(f, "config.json", vocab_size=399),
    "other heads": lambda f: edit(f, "config.json", num_key_value_heads=4),
    "another family": lambda f: edit(f, "config.json", model_type="mamba2"),
    "half a head": lambda f: edit(f, "config.json", num_attention_heads=2.5),
    "quantized": lambda f: edit(f, "config.json", quantization={"group_size": 32, "bits": 4}),
    "absurd bits": lambda f: edit(f, "config.json", quantization={"group_size": 32, "bits": 10**9}),
    "a weight of another shape": lambda f: weights(f, lambda w: w.update({"lm_head.weight": mx.zeros((400, 32))})),
    "a weight too few": lambda f: weights(f, lambda w: w.pop("lm_head.weight")),
    "a weight too many": lambda f: weights(f, lambda w: w.update(another=mx.zeros(3))),
    "no weight at all": lambda f: weights(f, lambda w: w.clear()),
    "whole numbers": lambda f: weights(f, lambda w: w.update({"lm_head.weight": mx.zeros((400, 64), mx.int32)})),
    "a config in a circle": lambda f: link(f, "config.json", "config.json"),
    "weights in a circle": lambda f: link(f, "model.safetensors", "model.safetensors"),
    "a tokenizer in a circle": lambda f: link(f, "tokenizer.json", "tokenizer.json"),
    "a config without end": lambda f: link(f, "config.json", "/dev/zero"),
    "a tokenizer without end": lambda f: link(f, "tokenizer.json", "/dev/zero"),
    "a template without end": lambda f: link(f, "chat_template.jinja", "/dev/zero"),
    "a tokenizer nobody writes": lambda f: pipe(f, "tokenizer.json"),
    "weights nobody writes": lambda f: pipe(f, "model.safetensors"),
    "a template nobody writes": lambda f: pipe(f, "chat_template.jinja"),
    "a huge tokenizer": lambda f: hole(f, "tokenizer.json"),
    "a huge template": lambda f: hole(f, "chat_template.jinja"),
    "a tokenizer of bytes": lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256)) * 40),
    "a tokenizer without a model": lambda f: (f / "tokenizer.json").write_text("{}"),
    "a tokenizer too deep": lambda f: (f / "tokenizer.json").write_text("[" * 100_000),
    "tokenizer settings no JSON": lambda f: (f / "tokenizer_config.json").write_text("{"),
    "tokenizer settings a list": lambda f: (f / "tokenizer_config.json").write_text("[1]"),
    "a template of another type": lambda f: edit(f, "tokenizer_config.json", chat_template={"a": 1}),
    "a package that is not there": lambda f: edit(f, "config.json", model_type="olmo"),
}


# These load, and compute something: mlx_lm finds nothing to quantize, and takes the numbers for what they are.
SERVED = ("quantized", "absurd bits", "whole numbers")


def serve(folder: Path) -> Any:
    """What a request on this folder's model ends with."""
    engine = Engine(quietly(folder), max_batch=2, prefill_step=16)
    engine.warm_up()
    engine.submit(1, Generate(kind="chat", messages=[USER], options={"max_tokens": 3}))
    ends: dict[int, Any] = {}
    while engine.busy:
        ends.update(engine.step().ended)
    return ends[1]


@pytest.mark.parametrize("name", [name for name in LIES if name not in SERVED])
def test_a_folder_that_lies_is_refused(folder: Path, name: str) -> None:
    LIES[name](folder)
    with pytest.raises((ModelInvalid, LoadFailed)) as caught:
        serve(folder)
    assert caught.value.message


@pytest.mark.parametrize("name", SERVED)
def test_a_folder_that_lies_and_serves(folder: Path, name: str) -> None:
    LIES[name](folder)
    assert serve(folder).completion_tokens == 3


@pytest.mark.parametrize("said", [-1, 0, 7, 10**30, 1e308, "512", None, [512]])
def test_a_context_that_is_none(folder: Path, said: Any) -> None:
    edit(folder, "config.json", max_position_embeddings=said)
    with contextlib.suppress(ModelInvalid):
        assert 8 <= quietly(folder).context_length <= 16_777_216


def test_ten_thousand_files(folder: Path) -> None:
    for number in range(10_000):
        (folder / f"{number}.json").touch()
    assert serve(folder).completion_tokens == 3


def test_no_code_of_the_folder_runs(folder: Path) -> None:
    trace = folder / "trace"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    edit(folder, "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    with contextlib.suppress(ModelInvalid):
        quietly(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10**12) %}{% endfor %}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.append(messages[0]) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_template_costs_its_request(folder: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxd.worker.prompt.TEMPLATE_LIMIT_S", 0.2)
    prompts = builder(folder, template)
    gc.collect()  # what earlier tests left must not be finalized where the stack is full
    with pytest.raises(RpcError) as caught:
        prompts.build("chat", [USER], thinking=False)
    assert isinstance(caught.value, ModelInvalid | InvalidParams | ContextExceeded)
