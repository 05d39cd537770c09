"""How a folder says that one vector is made of a text's hidden states; read from what sentence-transformers writes.

`modules.json` lists what follows on the model: pooling, whose folder has a config of its own, and normalisation. A
folder without it is a language model: its last token's state is taken, which has seen the whole text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Pooling", "inner_of", "read_pooling"]

MODES = ("lasttoken", "mean", "cls")
MAX_BYTES = 1024 * 1024
_FOLDER = re.compile(r"[0-9]{1,3}_Pooling\Z")
_DEFAULT_FOLDER = "1_Pooling"


@dataclass(frozen=True, slots=True)
class Pooling:
    """`mode` is one of MODES. `refusal` says why this model gives no vectors here, where that is so."""

    mode: str = "lasttoken"
    normalize: bool = True
    refusal: str | None = None


def inner_of(model: Any) -> Any:
    """The part of an mlx_lm model whose output the logits are made of; None where there is none."""
    inner = getattr(getattr(model, "language_model", model), "model", None)
    return inner if callable(inner) else None


class _Refused(Exception):
    pass


def read_pooling(folder: Path, config: dict[str, Any]) -> Pooling:
    """What a model's folder and its config.json say. Never raises: a folder of whatever kind still generates."""
    try:
        if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
            raise _Refused("it attends in both directions, which this engine does not compute")
        modules = _read(folder / "modules.json")
        if modules is None:
            pooling = _read(folder / _DEFAULT_FOLDER / "config.json")
            return Pooling() if pooling is None else Pooling(_mode(pooling))
        return _of_modules(folder, modules)
    except _Refused as refused:
        return Pooling(refusal=str(refused))


def _of_modules(folder: Path, modules: Any) -> Pooling:
    if not isinstance(modules, list):
        raise _Refused("modules.json is no list")
    mode, normalize = "lasttoken", False
    for module in modules:
        kind = module.get("type") if isinstance(module, dict) else None
        name = kind.rpartition(".")[2] if isinstance(kind, str) else ""
        if name == "Pooling":
            path = module.get("path")
            if not isinstance(path, str) or _FOLDER.match(path) is None:
                raise _Refused("modules.json names no sound folder for its pooling")
            pooling = _read(folder / path / "config.json")
            if pooling is None:
                raise _Refused(f"modules.json names {path}/config.json, which is not there")
            mode = _mode(pooling)
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer":
            raise _Refused(f"modules.json asks for a module {name[:80]!r}, which this engine does not have")
    return Pooling(mode, normalize)


def _mode(pooling: Any) -> str:
    """The one mode that a pooling's config turns on."""
    if not isinstance(pooling, dict):
        raise _Refused("its pooling's config is no object")
    named = pooling.get("pooling_mode")
    if isinstance(named, str):
        found = [named]
    else:
        prefix = "pooling_mode_"
        on = [name.removeprefix(prefix) for name, value in pooling.items() if name.startswith(prefix) and value is True]
        found = [name.removesuffix("_token").removesuffix("_tokens") for name in on]
    if len(found) != 1 or found[0] not in MODES:
        raise _Refused(f"it pools by {', '.join(sorted(found))[:80] or 'nothing'}; here are {', '.join(MODES)}")
    return found[0]


def _read(path: Path) -> Any:
    """The JSON in a file; None where there is no such file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _Refused(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError("it is too long")
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{path.name} is no JSON: {error}") from None
