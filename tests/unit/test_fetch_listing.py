"""What the hub says of a repository: what is believed, what is refused, what is fetched."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxd.fetch.listing import INDEX, Listing, choose, indexed, may_fetch, read_listing
from mlxd_client.errors import DownloadFailed, ModelInvalid
from support.hub import EVIL_NAMES

COMMIT = "c" * 40
OID = "a" * 64


def listing(*names: str) -> Listing:
    return read_listing(COMMIT, [(name, 10, f"{number:064x}") for number, name in enumerate(names)])


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt",
     "vocab.txt", "vocab.bpe", "qwen.tiktoken", "chat_template.jinja", INDEX, "modules.json", "1_Pooling/config.json"],
)  # fmt: skip
def test_what_a_model_needs_may_be_fetched(name: str) -> None:
    assert may_fetch(name)


@pytest.mark.parametrize(
    "name",
    [*EVIL_NAMES, "", "README.md", ".gitattributes", "model.gguf", "model.onnx", "a.json/../b.json", "sub/config.json",
     "config.json\n", "config.JSON.py", "1_Pooling/model.json", "1_Pooling/config.json.py", "../1_Pooling/config.json",
     "1_Pooling/../config.json", "x/1_Pooling/config.json", "٣_Pooling/config.json", "1_Pooling/config.json\n",
     "x.json.py", "vocab.bin", "vocab.py", "vocab.pkl", "..json", "a..json", ".config.json", "~.json",
     "x" * 200 + ".json", "con\u202efig.json", "ｃonfig.json"],
)  # fmt: skip
def test_nothing_else_may(name: str) -> None:
    assert not may_fetch(name)


@pytest.mark.parametrize("commit", ["", "main", "C" * 40, "c" * 39, "c" * 40 + "\n", "../" + "c" * 37, None, 7, ["c"]])
def test_a_commit_that_is_none_is_refused(commit: Any) -> None:
    with pytest.raises(DownloadFailed):
        read_listing(commit, [])


@pytest.mark.parametrize(
    ("size", "oid"),
    [(-1, OID), (2**50, OID), (1.5, OID), (True, OID), ("1", OID), (None, OID), (1, ""), (1, "A" * 64), (1, None),
     (1, OID + "0"), (1, "../" + "a" * 61), (1, "a" * 64 + "\n"), (1, 5)],
)  # fmt: skip
def test_sizes_and_hashes_are_sound_or_refused(size: Any, oid: Any) -> None:
    with pytest.raises(DownloadFailed) as caught:
        read_listing(COMMIT, [("config.json", size, oid)])
    assert caught.value.details["file"] == "config.json"
    assert read_listing(COMMIT, [("README.md", size, oid)]).files == {}, "what is not fetched does not matter"


def test_names_that_a_file_system_may_take_for_the_same_are_refused() -> None:
    with pytest.raises(DownloadFailed):
        read_listing(COMMIT, [("config.json", 1, OID), ("Config.json", 1, OID)])
    with pytest.raises(DownloadFailed):
        read_listing(COMMIT, [("a.json", 1, OID), ("b.json", 2, OID)])


def test_names_that_are_no_text_are_left_out() -> None:
    assert read_listing(COMMIT, [(None, 1, OID), (5, 1, OID), (["x"], 1, OID)]).files == {}


def test_without_an_index_the_weights_are_those_that_mlx_lm_would_load() -> None:
    weights, others = choose(listing("config.json", "tokenizer.json", "model.safetensors", "other.safetensors"), None)
    assert [file.name for file in weights] == ["model.safetensors"]
    assert [file.name for file in others] == ["config.json", "tokenizer.json"]


def test_with_an_index_the_weights_are_those_that_it_names() -> None:
    found = listing(
        "config.json", "tokenizer.json", INDEX, "model-1.safetensors", "model-2.safetensors", "x.safetensors"
    )
    index = json.dumps({"weight_map": {"a": "x.safetensors", "b": "model-1.safetensors"}}).encode()
    weights, _ = choose(found, index)
    assert [file.name for file in weights] == ["model-1.safetensors", "x.safetensors"]


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}',
     b'{"weight_map": {"a": "../x.safetensors"}}',
     b'{"weight_map": {"a": "/etc/x.safetensors"}}', b'{"weight_map": {"a": "model.bin"}}', b"\xff", b"[" * 100_000,
     b'{"weight_map": {"a": "config.json"}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(index: bytes) -> None:
    with pytest.raises(ModelInvalid):
        indexed(index)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "tokenizer.json"], "no safetensors"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "pickle"),
        (["tokenizer.json", "model.safetensors"], r"no config\.json"),
        (["config.json", "model.safetensors"], "no tokenizer"),
        (["config.json", "tokenizer.json", "adapters.safetensors"], "no safetensors"),
    ],
)
def test_what_cannot_be_a_model_is_not_fetched(names: list[str], said: str) -> None:
    with pytest.raises(ModelInvalid, match=said):
        choose(listing(*names), None)


@pytest.mark.parametrize("weights", ["adapters.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("others", [[], ["config.json", "tokenizer.json", "adapter_model.bin", "x.safetensors"]])
def test_of_an_adapter_two_files_are_fetched(weights: str, others: list[str]) -> None:
    found = choose(listing("adapter_config.json", weights, *others), None)
    assert [[file.name for file in files] for files in found] == [[weights], ["adapter_config.json"]]


def test_what_has_the_weights_of_a_model_is_one() -> None:
    beside = listing(
        "adapter_config.json", "adapters.safetensors", "config.json", "tokenizer.json", "model.safetensors"
    )
    weights, _ = choose(beside, None)
    assert [file.name for file in weights] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_config.json", "adapter_model.bin"], "pickle"),
        (["adapter_config.json", "tokenizer.json"], r"no adapters\.safetensors"),
        (["adapter_model.safetensors", "tokenizer.json"], r"no adapter_config\.json"),
    ],
)
def test_what_cannot_be_an_adapter_is_not_fetched(names: list[str], said: str) -> None:
    with pytest.raises(ModelInvalid, match=said):
        choose(listing(*names), None)


def test_an_index_that_names_what_is_not_there_is_refused() -> None:
    with pytest.raises(ModelInvalid) as caught:
        choose(listing("config.json", "tokenizer.json", INDEX), b'{"weight_map": {"a": "model-1.safetensors"}}')
    assert caught.value.details["file"] == "model-1.safetensors"
