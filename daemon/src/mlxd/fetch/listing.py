"""What a repository of the hub holds, as the hub says, and what of it a model or an adapter needs. Pure; all of it may
be hostile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mlxd_client.errors import DownloadFailed, ModelInvalid

from ..store import adapter
from ..store import hub as names

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_SIZE = 2**50
MAX_FILES = 20_000
# What is no weights is read into memory by whoever uses the model; larger ones are something else, and left out.
MAX_OTHER_BYTES = 512 * 1024 * 1024
MAX_JSON_BYTES = 16 * 1024 * 1024

_ALLOWED = re.compile(r".+\.(?:safetensors|json|model|txt|tiktoken|jinja)\Z|vocab\.[a-z]+\Z")
# The one file in a folder that is fetched: it says how vectors are made of what a model computes.
_POOLING = re.compile(r"[0-9]{1,3}_Pooling/config\.json\Z")
_CODE = re.compile(r".*\.(?:py|pyc|so|sh|bin|pt|pth|ckpt|pkl|pickle|npz|gguf|onnx|h5|msgpack)\Z", re.IGNORECASE)
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"})


class File(msgspec.Struct, frozen=True):
    """A file of the repository. `oid` is what its bytes hash to: SHA-256 where it is in LFS, else git's SHA-1."""

    name: str
    oid: str
    size: int


class Listing(msgspec.Struct, frozen=True):
    """A revision's commit and those of its files that may be fetched at all, by name; `pickled` where others are
    weights that can run code."""

    commit: str
    files: dict[str, File]
    pickled: bool = False


def may_fetch(name: str) -> bool:
    """Whether a file of this name is one that models are made of: weights, settings, tokenizer, chat templates."""
    if _POOLING.match(name) is not None:
        return True
    return (
        len(name) <= 200
        and "/" not in name
        and names.is_file_name(name)
        and _ALLOWED.match(name) is not None
        and _CODE.match(name) is None
    )


def read_listing(commit: Any, siblings: Iterable[tuple[Any, Any, Any]]) -> Listing:
    """Make sure of what the hub says.

    Args:
        commit: as the hub has it.
        siblings: (name, size, oid) of each file, as the hub has them.

    Raises:
        DownloadFailed: it is nonsense; `details.file` says about which file.
    """
    if not isinstance(commit, str) or not names.is_commit(commit):
        raise DownloadFailed("the hub's answer names no commit")
    files: dict[str, File] = {}
    alike: set[str] = set()
    sizes: dict[str, int] = {}
    pickled = False
    for number, (name, size, oid) in enumerate(siblings):
        if number >= MAX_FILES:
            raise DownloadFailed(f"the hub's answer names more than {MAX_FILES} files")
        if not isinstance(name, str) or not may_fetch(name):
            pickled = pickled or (isinstance(name, str) and name.endswith(_PICKLE))
            continue
        if name.lower() in alike:
            raise DownloadFailed(f"the hub's answer has two files that are named like {name}", file=name)
        if type(size) is not int or not 0 <= size < MAX_SIZE:
            raise DownloadFailed(f"the hub's answer gives no sound size for {name}", file=name)
        if not isinstance(oid, str) or not names.is_oid(oid):
            raise DownloadFailed(f"the hub's answer gives no sound hash for {name}", file=name)
        if sizes.setdefault(oid, size) != size:
            raise DownloadFailed(f"the hub's answer gives two sizes for the bytes of {name}", file=name)
        alike.add(name.lower())
        files[name] = File(name, oid, size)
    return Listing(commit, files, pickled)


def choose(listing: Listing, index: bytes | None) -> tuple[list[File], list[File]]:
    """What to fetch: the weights, and all else. `index` is the content of the weights' index, where there is one.

    Raises:
        ModelInvalid: it cannot be a model that runs here, nor an adapter of one.
    """
    files = listing.files
    if adapter.is_adapter(files):
        return _choose_adapter(listing)
    weights = _weights(listing, index)
    if CONFIG not in files:
        raise ModelInvalid("the repository has no config.json", file=CONFIG)
    if not _TOKENIZERS & files.keys():
        raise ModelInvalid("the repository has no tokenizer", file="tokenizer.json")
    others = [
        file
        for name, file in files.items()
        if not name.endswith(".safetensors") and (file.size <= MAX_OTHER_BYTES or name == CONFIG)
    ]
    return weights, sorted(others, key=lambda file: file.name)


def _choose_adapter(listing: Listing) -> tuple[list[File], list[File]]:
    """The two files that an adapter is made of. What else is there belongs to its training, or to the base model."""
    files = listing.files
    format = adapter.format_of(files)
    if format is None:
        _refuse_pickle(listing)
        raise ModelInvalid(f"the repository has no {' or '.join(adapter.WEIGHTS.values())}")
    config = files.get(adapter.CONFIG)
    if config is None:
        raise ModelInvalid(f"the repository has no {adapter.CONFIG}", file=adapter.CONFIG)
    if config.size > adapter.MAX_CONFIG_BYTES:
        told = f"{adapter.CONFIG} is larger than {adapter.MAX_CONFIG_BYTES} bytes"
        raise ModelInvalid(told, file=adapter.CONFIG)
    return [files[adapter.WEIGHTS[format]]], [config]


def _weights(listing: Listing, index: bytes | None) -> list[File]:
    files = listing.files
    if index is not None:
        named = indexed(index)
        missing = [name for name in named if name not in files]
        if missing:
            raise ModelInvalid(f"its index names {missing[0]}, which the repository does not have", file=missing[0])
        return [files[name] for name in named]
    found = sorted(name for name in files if name.startswith("model") and name.endswith(".safetensors"))
    if found:
        return [files[name] for name in found]
    _refuse_pickle(listing)
    raise ModelInvalid("the repository has no safetensors weights")


def _refuse_pickle(listing: Listing) -> None:
    if listing.pickled:
        raise ModelInvalid("the repository has pickle weights only, and those can run code; only safetensors are used")


def indexed(raw: bytes) -> list[str]:
    """The files that an index of weights names, sorted. Raises ModelInvalid."""
    weight_map = parse_object(raw, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelInvalid("the index names no files", file=INDEX)
    named = sorted(set(weight_map.values()))
    if not all(may_fetch(name) and name.endswith(".safetensors") for name in named):
        raise ModelInvalid("the index names files that are no weights of this repository", file=INDEX)
    return named


def parse_object(raw: bytes, name: str) -> Mapping[str, Any]:
    """A JSON object. Raises ModelInvalid."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelInvalid(f"{name} is no JSON", file=name) from None
    if not isinstance(value, dict):
        raise ModelInvalid(f"{name} holds no JSON object", file=name)
    return value
