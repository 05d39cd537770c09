"""What an adapter's folder says about itself: whose format it is in, how large it is. Weights are never read.

Two formats: mlx_lm's (adapters.safetensors, `lora_parameters` in adapter_config.json) and PEFT's
(adapter_model.safetensors, `r` and `lora_alpha`). Only regular files of bounded size are opened.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxd_client.errors import InvalidParams, ModelNotFound, RpcError, Unsupported

from .safetensors import SafetensorsError, check_safetensors

__all__ = [
    "CONFIG", "MAX_CONFIG_BYTES", "MAX_RANK", "WEIGHTS", "AdapterFolder", "Kind", "PartOfAdapter", "check_config",
    "examine_adapter", "format_of", "is_adapter", "mark",
]  # fmt: skip

Format = Literal["mlx", "peft"]

CONFIG = "adapter_config.json"
WEIGHTS: dict[Format, str] = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
MAX_CONFIG_BYTES = 1024 * 1024
MAX_RANK = 4096
MAX_SCALE = 1e4

Kind = Literal["lora", "dora"]


class PartOfAdapter(InvalidParams):
    """A file is missing, as in a download that was cut short."""


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder or a repository with these files is an adapter, or a part of one, and not a model.

    What has weights of a model is a model, whatever lies beside them; a model's config.json makes one of what has no
    weights yet.
    """
    if any(name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return False
    signs = (CONFIG in names) + (format_of(names) is not None)
    return signs == 2 or (signs == 1 and "config.json" not in names)


def format_of(names: Collection[str]) -> Format | None:
    """Whose format the weights among these files have; mlx_lm's where there are both."""
    return next((format for format, name in WEIGHTS.items() if name in names), None)


class AdapterFolder(msgspec.Struct, frozen=True, kw_only=True):
    """
    Attributes:
        path: the folder, absolute.
        format: whose names and layout the weights have.
        kind: how they change a layer.
        rank: of the matrices; None where the config leaves it to the weights.
        scale: what their product is multiplied by.
        base: the model that it says it was made for.
        bytes: tensor data on disk.
        mark: changes when the files do.
    """

    path: str
    format: Format
    kind: Kind
    rank: int | None
    scale: float
    base: str | None
    bytes: int
    mark: tuple[tuple[int, int, int], ...]


def examine_adapter(path: str, inside: tuple[Path, ...] = ()) -> AdapterFolder:
    """Look at an adapter's folder.

    Args:
        path: absolute.
        inside: its files, links followed, have to be in one of these; none of them allows any place.

    Raises:
        ModelNotFound: there is no such folder, or it holds no adapter.
        InvalidParams: it holds something that is no usable adapter; `details.file` says which file. PartOfAdapter where
            that file is missing.
        Unsupported: a sort of adapter that is not computed here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelNotFound(f"there is no folder {path}", field="adapter", adapter=path)
    format = format_of([name for name in WEIGHTS.values() if os.path.lexists(folder / name)])
    if format is None:
        raise ModelNotFound(f"{path} holds no {' or '.join(WEIGHTS.values())}", field="adapter", adapter=path)
    weights = folder / WEIGHTS[format]
    for name in (CONFIG, weights.name):
        _require_file(folder / name, inside)
    try:
        with open(folder / CONFIG, "rb") as file:
            config = _parse(file.read(MAX_CONFIG_BYTES + 1))
        size = check_safetensors(weights)
        marked = mark(path)
    except SafetensorsError as error:
        raise _bad(f"{weights.name}: {error}", weights.name) from None
    except OSError as error:
        raise _bad(f"it cannot be read: {error.strerror}", weights.name) from None
    kind, rank, scale = _read(config, format)
    base = config.get("base_model_name_or_path" if format == "peft" else "model")
    return AdapterFolder(
        path=path, format=format, kind=kind, rank=rank, scale=scale, bytes=size, mark=marked,
        base=base[:200] if isinstance(base, str) else None,
    )  # fmt: skip


def mark(path: str) -> tuple[tuple[int, int, int], ...]:
    """(inode, size, modification time in ns) of its files that are there: as long as it is the same, so are they."""
    found = []
    for name in (CONFIG, *WEIGHTS.values()):
        try:
            status = os.stat(os.path.join(path, name))
        except OSError:
            continue
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _require_file(path: Path, inside: tuple[Path, ...]) -> None:
    """A regular file, and nothing that would block or never end when read."""
    try:
        mode = path.stat().st_mode
    except OSError:
        told = f"the adapter cannot be used: {path.name} is missing"
        raise PartOfAdapter(told, field="adapter", file=path.name) from None
    if not stat.S_ISREG(mode):
        raise _bad(f"{path.name} is no file", path.name)
    roots = tuple(os.path.realpath(place) + os.sep for place in inside)
    if inside and not os.path.realpath(path).startswith(roots):
        raise _bad(f"{path.name} leads outside the cache", path.name)


# --- adapter_config.json ----------------------------------------------------------------------------------------------


def check_config(raw: bytes, format: Format) -> None:
    """Raises InvalidParams, Unsupported: an adapter with this adapter_config.json cannot be used."""
    _read(_parse(raw), format)


def _read(config: dict[str, Any], format: Format) -> tuple[Kind, int | None, float]:
    return _of_peft(config) if format == "peft" else _of_mlx(config)


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_CONFIG_BYTES:
        raise _bad(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes", CONFIG)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is no JSON: {error}", CONFIG) from None
    if not isinstance(value, dict):
        raise _bad(f"{CONFIG} holds no JSON object", CONFIG)
    return value


def _of_mlx(config: dict[str, Any]) -> tuple[Kind, int | None, float]:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        told = (
            "an adapter of type full replaces whole layers: it is a model of its own once `mlx_lm fuse` has made it so"
        )
        raise Unsupported(told, option="adapter", field="adapter")
    if kind not in ("lora", "dora"):
        raise Unsupported(f"there are no adapters of type {_shown(kind)} here", option="adapter", field="adapter")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise _bad(f"{CONFIG} has no lora_parameters", CONFIG)
    return kind, _rank(parameters.get("rank"), "rank"), _scale(parameters.get("scale"), "scale")


# What PEFT computes in another way where it is set, and what it says where it is not.
_NOT_OF_PEFT: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
}


def _of_peft(config: dict[str, Any]) -> tuple[Kind, int | None, float]:
    if config.get("peft_type", "LORA") != "LORA":
        told = f"there are no adapters of type {_shown(config['peft_type'])} here"
        raise Unsupported(told, option="adapter", field="adapter")
    for name, plain in _NOT_OF_PEFT.items():
        if config.get(name) not in plain:
            told = f"{CONFIG}: {name} is {_shown(config[name])}, which is not computed here"
            raise Unsupported(told, option="adapter", field="adapter", file=CONFIG)
    rank = _rank(config.get("r"), "r")
    if rank is None:
        raise _bad(f"{CONFIG}: there is no r", CONFIG)
    alpha = _scale(config.get("lora_alpha"), "lora_alpha")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank
    return "dora" if config.get("use_dora") is True else "lora", rank, scale


def _rank(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _bad(f"{CONFIG}: {name} is {_shown(value)}, not 1 to {MAX_RANK}", CONFIG)
    return value


def _scale(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_SCALE:  # which nan is not, either
        raise _bad(f"{CONFIG}: {name} is {_shown(value)}, no number up to {MAX_SCALE:g}", CONFIG)
    return float(value)


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _bad(message: str, file: str) -> RpcError:
    return InvalidParams(f"the adapter cannot be used: {message}", field="adapter", file=file)
