"""The store: what is whole is found, what is not is refused with the reason, and no name leads anywhere else."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.store import Store, hub
from mlxd.store.folder import RESERVED_TOKENS, WORKER_BYTES
from mlxd_client.errors import ModelInvalid, ModelNotFound

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 32,
    "max_position_embeddings": 512,
    "quantization": {"bits": 4, "group_size": 64},
}
COMMIT = "a" * 40


def weights(path: Path, count: int = 16) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * count))


def model(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    weights(folder / "model.safetensors")
    return folder


def cached(cache: Path, repo: str, commit: str = COMMIT, branch: str | None = "main") -> Path:
    """A repository as huggingface_hub lays it out: snapshots of links into blobs."""
    folder = hub.repo_folder(cache, repo)
    plain = model(folder / "blobs")
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for blob in plain.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    if branch:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def store(tmp_path: Path, cache: Path) -> Store:
    model(tmp_path / "builtin" / "cleanup")
    return Store(aliases={"dictation": "mlxd/cleanup"}, env={"HF_HUB_CACHE": str(cache)}, builtin=tmp_path / "builtin")


# --- what is there --------------------------------------------------------------------------------------------------


def test_builtin_and_alias(store: Store, tmp_path: Path) -> None:
    found = store.resolve("mlxd/cleanup")
    assert (found.model, found.source, found.path) == ("mlxd/cleanup", "builtin", str(tmp_path / "builtin" / "cleanup"))
    assert store.resolve("dictation") == found
    assert found.weights_bytes == 64
    assert found.context_length == 512
    assert found.size_bytes > 64


def test_memory_is_weights_cache_and_worker(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    found = store.resolve("mlxd/cleanup")
    assert found.kv_token_bytes == 2 * 2 * 8 * 2 * 2
    assert found.memory_bytes == 64 + 512 * found.kv_token_bytes + WORKER_BYTES
    model(tmp_path / "long", {"max_position_embeddings": 131_072, "quantization": None, "torch_dtype": "bfloat16"})
    long = store.resolve(str(tmp_path / "long"))
    assert long.memory_bytes == 64 + RESERVED_TOKENS * long.kv_token_bytes + WORKER_BYTES
    monkeypatch.setattr("sys.platform", "linux")
    model(tmp_path / "linux", {"quantization": None, "torch_dtype": "bfloat16"})
    linux = store.resolve(str(tmp_path / "linux"))
    assert linux.kv_token_bytes == 2 * found.kv_token_bytes
    assert linux.memory_bytes == 2 * 64 + 512 * linux.kv_token_bytes + WORKER_BYTES


def test_the_cache(store: Store, cache: Path) -> None:
    assert [found.model for found in store.scan()] == ["mlxd/cleanup"]  # no cache folder at all
    snapshot = cached(cache, "org/some-model_1.5")
    found = store.resolve("org/some-model_1.5")
    assert (found.source, found.revision, found.path) == ("hub", COMMIT, str(snapshot))
    cached(cache, "gpt2", branch=None)
    (cache / "models--org--half" / "snapshots").mkdir(parents=True)
    (cache / "datasets--org--data").mkdir()
    (cache / "models--..--x").mkdir()
    assert [found.model for found in store.scan()] == ["mlxd/cleanup", "gpt2", "org/some-model_1.5"]


def test_main_decides_which_snapshot(store: Store, cache: Path) -> None:
    cached(cache, "org/m", "b" * 40)
    second = hub.repo_folder(cache, "org/m") / "snapshots" / ("c" * 40)
    model(second)
    assert store.resolve("org/m").revision == "b" * 40
    (hub.repo_folder(cache, "org/m") / "refs" / "main").write_text("../../../etc")
    os.utime(second, (2**31, 2**31))
    assert store.resolve("org/m").revision == "c" * 40


def test_shards_are_those_of_the_index(store: Store, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights(folder / names[0])
    with pytest.raises(ModelInvalid, match=r"00002-of-00002.safetensors is missing"):
        store.resolve(str(folder))
    weights(folder / names[1], 32)
    assert store.resolve(str(folder)).weights_bytes == 64 + 128


def test_models_that_generate_nothing_are_not_listed(store: Store, cache: Path) -> None:
    snapshot = cached(cache, "org/encoder")
    config = json.dumps({**CONFIG, "architectures": ["BertForMaskedLM"]})
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(config)
    assert [found.model for found in store.scan()] == ["mlxd/cleanup"]


def test_unchanged_folders_are_not_examined_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m")
    looked: list[object] = []
    from mlxd.store import store as module

    examine = module.examine
    monkeypatch.setattr(module, "examine", lambda *args: (looked.append(args), examine(*args))[1])
    first = store.resolve(str(folder))
    assert store.resolve(str(folder)) == first
    assert len(looked) == 1
    weights(folder / "model.safetensors", 100)
    assert store.resolve(str(folder)).weights_bytes == 400
    (folder / "config.json").unlink()
    with pytest.raises(ModelInvalid):
        store.resolve(str(folder))


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"HF_HUB_CACHE": "/x/c", "HF_HOME": "/x/h"}, "/x/c"),
        ({"HF_HOME": "/x/h"}, "/x/h/hub"),
        ({"HF_HOME": "~/h", "HOME": "/u"}, "/u/h/hub"),
        ({"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/huggingface/hub"),
        ({"HOME": "/u"}, "/u/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(env: dict[str, str], folder: str) -> None:
    assert hub.cache_folder(env) == Path(folder)


# --- what is not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), "no model_type"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text(" " * (16 * 2**20 + 1)), "larger than"),
        (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "config.json is no file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model*.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "model.safetensors: truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors: truncated"),
        (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "is no file"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index names no files"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "index names no files"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "files elsewhere",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            "gone.safetensors is missing",
        ),
    ],
)
def test_a_folder_that_is_no_model(store: Store, tmp_path: Path, break_it: Any, says: str) -> None:
    folder = model(tmp_path / "m")
    break_it(folder)
    with pytest.raises(ModelInvalid) as caught:
        store.resolve(str(folder))
    assert says in caught.value.message
    assert len(caught.value.message) < 500


def test_what_is_incomplete_in_the_cache_is_not_there(store: Store, cache: Path) -> None:
    snapshot = cached(cache, "org/m")
    (hub.repo_folder(cache, "org/m") / "blobs" / "model.safetensors").unlink()  # the link leads nowhere now
    with pytest.raises(ModelNotFound, match=r"not complete: model.safetensors is missing"):
        store.resolve("org/m")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="not complete"):
        store.resolve("org/m")


def test_links_out_of_the_cache_are_refused(store: Store, cache: Path, tmp_path: Path) -> None:
    snapshot = cached(cache, "org/m")
    model(tmp_path / "elsewhere")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "tokenizer.json")
    with pytest.raises(ModelInvalid, match=r"tokenizer.json leads outside"):
        store.resolve("org/m")
    assert [found.model for found in store.scan()] == ["mlxd/cleanup"]


@pytest.mark.parametrize(
    "ref",
    [
        "", "..", ".", "../x", "a/../b", "mlxd/..", "mlxd/../cleanup", "mlxd/cleanup/..", "mlxd/", "a/b/c", "a//b", "/",
        "/nowhere/at/all", "/dev/null", "org/name\n", "org/\0name", "/tmp/\0", "~/x", "./x", "a--b/c", "-x", "x" * 5000,
        "/" + "x" * 4000, "org/name@main", "org\\name", "\u202eorg/x", "\ud800", "C:/x", "file:///etc", "org/.hidden",
    ],
)  # fmt: skip
def test_hostile_names(store: Store, ref: str) -> None:
    with pytest.raises((ModelNotFound, ModelInvalid)) as caught:
        store.resolve(ref)
    json.dumps(caught.value.to_wire()).encode()
    assert "\n" not in caught.value.message


@given(ref=st.text(max_size=40) | st.text(alphabet="./-~ab\\@%", max_size=12))
def test_no_name_leads_out(ref: str) -> None:
    store = Store(env={"HF_HUB_CACHE": "/nowhere/hub"}, builtin=Path("/nowhere/builtin"))
    with pytest.raises((ModelNotFound, ModelInvalid)):
        store.resolve(ref)
    if hub.is_repo_id(ref):
        assert hub.repo_folder(Path("/c"), ref).parent == Path("/c")
        assert os.path.normpath(f"/c/{ref}").startswith("/c/")


def test_near_matches(store: Store, cache: Path) -> None:
    cached(cache, "mlx-community/Qwen3-1.7B-4bit")
    with pytest.raises(ModelNotFound, match=r"did you mean mlx-community/Qwen3-1.7B-4bit") as caught:
        store.resolve("qwen3-1.7b-4bit")
    assert caught.value.details["near"] == ["mlx-community/Qwen3-1.7B-4bit"]
    with pytest.raises(ModelNotFound, match="did you mean mlxd/cleanup"):
        store.resolve("mlxd/cleanpu")
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("zzzzzz")
    assert "near" not in caught.value.details
    hub.repo_folder(cache, "org/zzzzz").joinpath("blobs").mkdir(parents=True)  # of a download that came to nothing
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("zzzzzz")
    assert "near" not in caught.value.details
