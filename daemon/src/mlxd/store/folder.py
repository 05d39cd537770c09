"""What a model's folder says about itself: is it whole, how large, how long its context. Weights are never read.

Folders come from anywhere, so nothing in them is trusted: sizes are bounded before reading, only regular files are
opened, weights are safetensors (pickle can run code) whose headers must fit their files.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxd_client.errors import InvalidParams, ModelInvalid, ModelNotFound, RpcError, Unsupported

from .adapter import PartOfAdapter, examine_adapter, is_adapter
from .safetensors import SafetensorsError, check_safetensors

__all__ = ["Folder", "Incomplete", "estimate", "examine", "fingerprint"]

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_FILES = 20_000
DEFAULT_CONTEXT = 4096
MIN_CONTEXT, MAX_CONTEXT = 8, 16_777_216
# What a worker takes beside weights and KV cache: the interpreter, mlx_lm, the tokenizer, compiled kernels.
WORKER_BYTES = 128 * 1024 * 1024
# A load reserves the KV cache of a conversation of this length, not of the longest that the model could hold.
RESERVED_TOKENS = 4096

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Incomplete(ModelInvalid):
    """Files are missing, as in a download that was cut short."""


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one folder.

    Attributes:
        kind: an adapter takes its weights' memory in the worker of another model, and has no context.
        size_bytes: all its files.
        weights_bytes: tensor data on disk.
        resident_bytes: tensor data in memory; more than on disk where the backend computes in float32.
        kv_token_bytes: what one token takes in the KV cache.
        context_length: tokens of prompt and answer together.
        architectures: as config.json names them.
    """

    size_bytes: int
    weights_bytes: int
    resident_bytes: int
    kv_token_bytes: int
    context_length: int
    architectures: tuple[str, ...] = ()
    kind: Literal["model", "adapter"] = "model"

    @property
    def memory_bytes(self) -> int:
        """The memory that running the model is expected to take."""
        if self.kind == "adapter":
            return self.resident_bytes
        return self.resident_bytes + self.kv_token_bytes * min(self.context_length, RESERVED_TOKENS) + WORKER_BYTES


def examine(folder: Path, inside: tuple[Path, ...] = ()) -> Folder:
    """Look at the folder of a model, or of an adapter.

    Args:
        folder: absolute.
        inside: every file, links followed, has to be there and in one of these; none of them allows any place.

    Raises:
        Incomplete: files are missing.
        ModelInvalid: it holds something that is no usable model; `details.file` says which file.
        OSError: it cannot be read.
    """
    names = {entry.name for entry in _entries(folder)}
    if inside:
        _check_links(folder, names, inside)
    if is_adapter(names):
        return _examine_adapter(folder, inside)
    config = _read_config(folder)
    files = _weight_files(folder, names)
    if not names & set(_TOKENIZERS):
        raise Incomplete("it has no tokenizer", file="tokenizer.json")
    weights = 0
    for file in files:
        _require_file(file)
        try:
            weights += check_safetensors(file)
        except SafetensorsError as error:
            raise ModelInvalid(f"{file.name}: {error}", file=file.name) from None
    return estimate(config, sum(size for _, size, _ in fingerprint(folder)), weights)


def _examine_adapter(folder: Path, inside: tuple[Path, ...]) -> Folder:
    """As `examine` says it, whereas examine_adapter speaks of the parameter of a request."""
    try:
        found = examine_adapter(str(folder), inside)
    except (ModelNotFound, PartOfAdapter) as error:
        raise Incomplete(error.message, **_file(error)) from None
    except (InvalidParams, Unsupported) as error:
        raise ModelInvalid(error.message, **_file(error)) from None
    return adapter(sum(size for _, size, _ in fingerprint(folder)), found.bytes)


def _file(error: RpcError) -> dict[str, Any]:
    return {key: value for key, value in error.details.items() if key == "file"}


def adapter(size_bytes: int, weights_bytes: int) -> Folder:
    """What an adapter is like, from the sizes of its files."""
    return Folder(
        size_bytes=size_bytes, weights_bytes=weights_bytes, resident_bytes=weights_bytes, kv_token_bytes=0,
        context_length=0, kind="adapter",
    )  # fmt: skip


def estimate(config: dict[str, Any], size_bytes: int, weights_bytes: int) -> Folder:
    """What a model will be like once it is here, from its config.json and the sizes of its files alone.

    Args:
        config: as parsed; nothing in it is trusted.
        size_bytes: all its files.
        weights_bytes: tensor data on disk; the size of the safetensors files is near enough.
    """
    text = _text_config(config)
    half = (
        not config.get("quantization")
        and _computes_in_float32()
        and text.get("dtype", config.get("torch_dtype")) in ("float16", "bfloat16")
    )
    architectures = config.get("architectures")
    return Folder(
        size_bytes=size_bytes,
        weights_bytes=weights_bytes,
        resident_bytes=weights_bytes * 2 if half else weights_bytes,
        kv_token_bytes=_kv_token_bytes(text),
        context_length=_context_length(text),
        architectures=tuple(filter(_is_text, architectures)) if isinstance(architectures, list) else (),
    )


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, size, modification time in ns) of each file that is there: as long as it is the same, so is the folder."""
    found = []
    for entry in _entries(folder):
        try:
            status = entry.stat()
        except OSError:
            continue  # a link that leads nowhere
        if stat.S_ISREG(status.st_mode):
            found.append((entry.name, status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= MAX_FILES:
                raise ModelInvalid(f"it holds more than {MAX_FILES} files")
            yield entry


def _check_links(folder: Path, names: set[str], inside: tuple[Path, ...]) -> None:
    roots = tuple(os.path.realpath(place) + os.sep for place in inside)
    for name in sorted(names):
        target = os.path.realpath(folder / name)
        if not target.startswith(roots):
            raise ModelInvalid(f"{name} leads outside the cache", file=name)
        if not os.path.lexists(target):
            raise Incomplete(f"{name} is missing", file=name)


def _require_file(path: Path) -> None:
    """A regular file, and nothing that would block or never end when read. Raises Incomplete, ModelInvalid."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Incomplete(f"{path.name} is missing", file=path.name) from None
    if not stat.S_ISREG(mode):
        raise ModelInvalid(f"{path.name} is no file", file=path.name)


# --- weights ------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path, names: set[str]) -> list[Path]:
    """The files that mlx_lm would load: those that the index names, else every `model*.safetensors`."""
    index = _read_json(folder, "model.safetensors.index.json") if "model.safetensors.index.json" in names else None
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_text, weight_map.values())):
            raise ModelInvalid("the index names no files", file="model.safetensors.index.json")
        named = sorted(set(weight_map.values()))
        if any(os.path.basename(name) != name or not name.endswith(".safetensors") for name in named):
            raise ModelInvalid("the index names files elsewhere", file="model.safetensors.index.json")
        return [folder / name for name in named]
    found = sorted(name for name in names if name.startswith("model") and name.endswith(".safetensors"))
    if found:
        return [folder / name for name in found]
    if any(name.endswith(_PICKLE) for name in names):
        raise ModelInvalid("it has pickle weights only, and those can run code; only safetensors are loaded")
    raise Incomplete("it has no model*.safetensors", file="model.safetensors")


# --- config.json --------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder, "config.json")
    if not _is_text(config.get("model_type")):
        raise ModelInvalid("config.json names no model_type", file="config.json")
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from the folder. Raises Incomplete, ModelInvalid, OSError."""
    path = folder / name
    _require_file(path)
    with open(path, "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ModelInvalid(f"{name} is larger than {MAX_JSON_BYTES} bytes", file=name)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{name} is no JSON: {error}", file=name) from None
    if not isinstance(value, dict):
        raise ModelInvalid(f"{name} holds no JSON object", file=name)
    return value


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers of the language model are: multimodal configs nest them."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _context_length(config: dict[str, Any]) -> int:
    """As the worker will find it, but for stretched positions, which only lengthen it."""
    for name in ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "seq_length"):
        if length := _whole(config.get(name)):
            return min(max(length, MIN_CONTEXT), MAX_CONTEXT)
    return DEFAULT_CONTEXT


def _kv_token_bytes(config: dict[str, Any]) -> int:
    """Keys and values of one token: layers x KV heads x head dimension x 2 x bytes of one number.

    An upper bound for models that compress or skip some of it; 0 where the config does not say.
    """
    layers = _first(config, "num_hidden_layers", "n_layers", "num_layers", "n_layer")
    heads = _first(config, "num_attention_heads", "n_heads", "n_head")
    kv_heads = _first(config, "num_key_value_heads", "multi_query_group_num") or heads
    dimension = _first(config, "head_dim") or (_first(config, "hidden_size", "d_model", "n_embd") // max(heads, 1))
    return layers * kv_heads * dimension * 2 * (4 if _computes_in_float32() else 2)


def _computes_in_float32() -> bool:
    """Whether workers turn half-precision weights into float32: MLX's Linux CPU backend is slow with anything less."""
    return sys.platform == "linux"


def _first(config: dict[str, Any], *names: str) -> int:
    return next((value for name in names if (value := _whole(config.get(name)))), 0)


def _whole(value: Any) -> int:
    """`value` where it is a sane positive whole number, else 0: a config cannot make the arithmetic explode."""
    return value if type(value) is int and 0 < value < 2**40 else 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
