"""An adapter's folder becomes a Delta for each layer that it changes, or a typed error that says what does not fit.

The work is cut into pieces, so that decode steps go on in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxd_client.errors import InvalidParams, RpcError

from ..store.adapter import CONFIG, MAX_RANK, WEIGHTS, AdapterFolder, mark
from .adapted import Delta, dimensions, kind_of, magnitude_scale

__all__ = ["Content", "read_adapter"]

HASH_BYTES = 16 * 1024 * 1024

# What the arrays of a layer are called: mlx_lm's names, and PEFT's.
_MLX = {".lora_a": "a", ".lora_b": "b", ".m": "m"}
_PEFT = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
    ".lora_embedding_A": "a", ".lora_embedding_B": "b",
}  # fmt: skip
_PEFT_PREFIX = "base_model.model."
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(slots=True)
class Content:
    """`identity` is a hash of all that the adapter consists of; `deltas` are by the path of the layer."""

    identity: bytes = b""
    deltas: dict[str, Delta] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.deltas.values())


def read_adapter(folder: AdapterFolder, model: Any, content: Content) -> Iterator[None]:
    """Read it in pieces, into `content`, which is complete when the iteration ends.

    Raises:
        InvalidParams: it is not sound, or does not fit the model; the message says which layer.
    """
    try:
        yield from _identify(folder, content)
        arrays = mx.load(str(Path(folder.path) / WEIGHTS[folder.format]))
    except (OSError, RuntimeError, ValueError) as error:
        raise misfit(folder, f"its weights cannot be read: {error}") from None
    if not isinstance(arrays, dict) or not arrays:
        raise misfit(folder, "it holds no weights")
    modules = dict(model.named_modules())
    plans = [_plan(folder, path, parts, modules) for path, parts in _by_layer(folder, arrays, modules).items()]
    for plan in plans:
        content.deltas[plan.path] = _delta(folder, plan)
        yield
    if mark(folder.path) != folder.mark:
        raise misfit(folder, "its files changed while they were read")


def misfit(folder: AdapterFolder, what: str) -> RpcError:
    base = f" (it says that it was made for {folder.base})" if folder.base else ""
    return InvalidParams(f"the adapter {folder.path} cannot be used: {what}{base}", field="adapter")


def _identify(folder: AdapterFolder, content: Content) -> Iterator[None]:
    hashed = hashlib.blake2b(digest_size=32)
    for name in (CONFIG, WEIGHTS[folder.format]):
        with open(Path(folder.path) / name, "rb") as file:
            while piece := file.read(HASH_BYTES):
                hashed.update(piece)
                yield
        hashed.update(b"\0")
    content.identity = hashed.digest()


def _by_layer(folder: AdapterFolder, arrays: dict[str, Any], modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{layer: {a, b, m: array}}"""
    suffixes = _PEFT if folder.format == "peft" else _MLX
    layers: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        suffix = next((each for each in suffixes if name.endswith(each)), None)
        if suffix is None or (suffixes[suffix] == "m" and folder.kind != "dora"):
            raise misfit(folder, f"{name[:120]} is nothing that an adapter of type {folder.kind} has")
        path = name.removesuffix(suffix)
        if folder.format == "peft":
            path = _module_of(path, modules)
        layers.setdefault(path, {})[suffixes[suffix]] = array
    return layers


def _module_of(path: str, modules: dict[str, Any]) -> str:
    """The layer that PEFT names after the original model's. mlx_lm keeps names, but may nest a language model."""
    path = path.removeprefix(_PEFT_PREFIX)
    inner = path.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    guesses = (path, f"language_model.{path}", f"model.{inner}", f"language_model.model.{inner}", inner)
    return next((guess for guess in guesses if guess in modules), path)


class _Plan(NamedTuple):
    path: str
    layer: Any
    kind: str
    parts: dict[str, Any]


def _plan(folder: AdapterFolder, path: str, parts: dict[str, Any], modules: dict[str, Any]) -> _Plan:
    """Check a layer's arrays by their shapes and types; nothing is read yet. They come back in mlx_lm's layout."""
    layer = modules.get(path)
    kind = None if layer is None else kind_of(layer, modules.get(path.rpartition(".")[0]))
    if kind is None:
        told = "there is no such layer" if layer is None else f"layers of type {type(layer).__name__} take no adapter"
        raise misfit(folder, f"{path[:120]}: {told}")
    if not {"a", "b"} <= parts.keys():
        raise misfit(folder, f"{path}: one of its two matrices is missing")
    if any(array.dtype not in _FLOATS for array in parts.values()):
        raise misfit(folder, f"{path}: its numbers are no floats")
    if folder.kind == "dora" and kind == "experts":
        raise misfit(folder, f"{path}: there is no DoRA for experts")
    inputs, outputs, experts = dimensions(layer)
    a, b = parts["a"], parts["b"]
    if folder.format == "peft":
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    # `given` first: an embedding is given tokens.
    given, made = (outputs, inputs) if kind == "embedding" else (inputs, outputs)
    rank = folder.rank or a.shape[-2 if experts else -1]
    wanted = [(experts, rank, given), (experts, made, rank)] if experts else [(given, rank), (rank, made)]
    for array, shape in zip((a, b), wanted, strict=True):
        if array.shape != shape or not 1 <= rank <= MAX_RANK:
            raise misfit(folder, f"{path}: a matrix of shape {list(array.shape)}, where the model has {list(shape)}")
    if "m" in parts and parts["m"].shape != (outputs,):
        raise misfit(folder, f"{path}: magnitudes of shape {list(parts['m'].shape)}, where the model has [{outputs}]")
    return _Plan(path, layer, kind, parts | {"a": a, "b": b})


def _delta(folder: AdapterFolder, plan: _Plan) -> Delta:
    """Bring one layer's arrays to memory, as the layer will use them."""
    path, layer, kind, parts = plan
    if mx.default_device() == mx.Device(mx.cpu):
        parts = {name: array.astype(mx.float32) for name, array in parts.items()}  # as the model's weights are there
    a, b = parts["a"], parts["b"]
    down, up = {"linear": (a, b), "embedding": (b.T, a.T)}.get(kind, (a.swapaxes(-1, -2), b.swapaxes(-1, -2)))
    up = (folder.scale * up.astype(mx.float32)).astype(up.dtype)
    columns = magnitude_scale(layer, down, up, parts.get("m")) if folder.kind == "dora" else None
    delta = Delta(mx.contiguous(down), mx.contiguous(up), columns)
    try:
        sound = bool(mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in delta.arrays])).item())
    except RuntimeError as error:
        raise misfit(folder, f"its weights cannot be read: {error}") from None
    if not sound:
        raise misfit(folder, f"{path}: it holds values that are no finite numbers")
    return delta
