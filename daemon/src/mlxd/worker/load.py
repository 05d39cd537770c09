"""A folder becomes a LoadedModel, part by part, or a typed error that says what is wrong with it.

Folders come from anywhere. Weights are safetensors whose headers are checked before MLX maps them, no code of the
folder runs, and numbers that would make building the model hang are refused first.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config, load_model, load_tokenizer

from mlxd_client.errors import LoadFailed, ModelInvalid, RpcError

from ..childside import PipeClosed
from ..store.safetensors import SafetensorsError, check_safetensors
from .calls import can_call
from .early import start_early
from .families import Batching, prepare
from .grammar import can_constrain
from .options import check_defaults
from .pooling import Pooling, inner_of, read_pooling
from .vision import FAMILIES, HOW_TO_INSTALL, Family, Vision, family_of, installed, load_seeing

MAX_JSON_BYTES = 64 * 1024 * 1024
# Of what is no weights, and is read into memory whole.
MAX_OTHER_BYTES = 512 * 1024 * 1024
DEFAULT_CONTEXT = 4096
MIN_CONTEXT, MAX_CONTEXT = 8, 16_777_216
# Weights are brought to memory in parts of this size, with a word to the daemon in between.
PART_BYTES = 256 * 1024 * 1024

# Larger than any model; building a model takes time and memory in proportion to these.
_LIMITS = {
    "num_hidden_layers": 2_000,
    "n_layers": 2_000,
    "num_layers": 2_000,
    "n_layer": 2_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 4_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "vocab_size": 10_000_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
    "depth": 2_000,
    "embed_dim": 1_000_000,
    "out_hidden_size": 1_000_000,
    "image_size": 100_000,
    "num_position_embeddings": 10_000_000,
}


@dataclass(slots=True)
class LoadedModel:
    """A model that is in memory, and what its folder says about using it.

    Attributes:
        vocabulary: rows of the embeddings: tokens are 0 to vocabulary - 1.
        context_length: tokens of prompt and answer together.
        defaults: sampling options for requests that set none, checked.
        batching: how far its requests may be computed together.
        faithful: the model promises to invent no words when it processes text.
        vision: what sees, where the model does and can be asked to.
        blind: else why not.
        pooling: how vectors of texts are made of what it computes.
    """

    model: Any
    tokenizer: TokenizerWrapper
    context_length: int
    vocabulary: int
    defaults: dict[str, Any] = field(default_factory=dict)
    faithful: bool = False
    batching: Batching = "together"
    vision: Vision | None = None
    blind: str | None = "this model sees no images"
    pooling: Pooling = field(default_factory=Pooling)

    @property
    def capabilities(self) -> list[str]:
        found = ["process", "logprobs", "seed", "adapters"]
        if self.tokenizer.has_chat_template:
            found.append("chat")
        if self.tokenizer.has_thinking:
            found.append("thinking")
        if self.faithful:
            found.append("faithful")
        if can_constrain(self.tokenizer):
            found += ["structured", "grammar"]
        if self.vision is not None:
            found.append("vision")
        if can_call(self.tokenizer):
            found.append("tools")
        if self.pooling.refusal is None and inner_of(self.model) is not None:
            found.append("embed")
        return found


def load(path: str, progress: Callable[[float], None], most_context: int = 0) -> LoadedModel:
    """Load the model in the folder `path`.

    Args:
        progress: called with 0 to 1 between parts; what it raises ends the load.
        most_context: bounds the context, in tokens, where it is not 0.

    Raises:
        ModelInvalid: the folder is no usable model; the message says why.
        LoadFailed: it may be one, but could not be read.
    """
    folder = Path(path)
    config: dict[str, Any] = {}
    try:
        check_files(folder)
        config = read_config(folder)
        settings = _read_settings(folder)
        check_weights(folder)
        progress(0.0)
        loaded = _load(folder, config, settings, progress)
        if most_context:
            loaded.context_length = min(loaded.context_length, most_context)
        return loaded
    except (RpcError, PipeClosed):
        raise
    except (OSError, MemoryError) as error:
        raise LoadFailed(f"the model could not be read: {error}") from error
    except (Exception, SystemExit) as error:  # an architecture that lacks a package of its own ends the program
        # mlx_lm, transformers and MLX raise nearly anything on a folder that is no model.
        told = f"the folder is no model that mlx_lm can load: {type(error).__name__}: {error}"
        if config.get("model_type") in FAMILIES and not installed():
            told += f"; {HOW_TO_INSTALL}"
        raise ModelInvalid(told) from error


def _load(
    folder: Path, config: dict[str, Any], settings: dict[str, Any], progress: Callable[[float], None]
) -> LoadedModel:
    family, vision = family_of(folder, config), None
    if family is not None and installed():
        model, vision = load_seeing(folder, config, family)
        loaded_config = load_config(folder)
    else:
        model, loaded_config = load_model(folder, lazy=True)
    batching = prepare(model)
    vocabulary = model.vocabulary if vision is not None else _whole(_text_config(config).get("vocab_size"))
    if vocabulary is None:
        raise ModelInvalid("config.json: no vocab_size", file="config.json")
    tokenizer = load_tokenizer(
        folder, {"trust_remote_code": False}, eos_token_ids=loaded_config.get("eos_token_id", None)
    )
    if vision is not None:
        tokenizer, vision = _fit_template(folder, tokenizer, vision, loaded_config.get("eos_token_id", None))
    # Tokens added to a tokenizer may lie beyond the embeddings (some families ship so); its own vocabulary may not.
    own = getattr(tokenizer, "vocab_size", None)
    if isinstance(own, int) and own > vocabulary:
        raise ModelInvalid(f"the tokenizer has {own} tokens, the model {vocabulary}", file="tokenizer.json")
    on_cpu = sys.platform == "linux" and mx.default_device() == mx.Device(mx.cpu)
    if on_cpu:
        # Half-precision scales make quantised matrix products twenty times slower on this backend.
        model.set_dtype(mx.float32)
    _materialise(model, progress)
    if on_cpu:
        start_early(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        context_length=context_length(config),
        vocabulary=vocabulary,
        defaults=check_defaults(settings.get("defaults", {})),
        faithful=settings.get("guard") == "faithful",
        batching=batching,
        vision=vision,
        blind=None if vision is not None else _blind(family),
        pooling=read_pooling(folder, config),
    )


def _blind(family: Family | None) -> str:
    if family is None:
        return "this model sees no images, or is of a family that is not served with them"
    return "the model's chat template has no place for images" if installed() else HOW_TO_INSTALL


def _fit_template(folder: Path, tokenizer: Any, vision: Vision, eos: Any) -> tuple[Any, Vision | None]:
    """The tokenizer with the chat template that lies with the processor, where it has none of its own. Without a
    template that has a place for images the model is one for text."""
    if not tokenizer.has_chat_template and vision.template:
        options = {"trust_remote_code": False, "chat_template": vision.template}
        tokenizer = load_tokenizer(folder, options, eos_token_ids=eos)
    return tokenizer, vision if vision.fits(tokenizer) else None


def _materialise(model: Any, progress: Callable[[float], None]) -> None:
    """Bring the weights to memory in parts, with `progress` in between."""
    parameters = [array for _, array in tree_flatten(model.parameters())]
    total = sum(array.nbytes for array in parameters) or 1
    done = 0
    part: list[mx.array] = []
    part_bytes = 0
    spoken_at = time.monotonic()
    for array in parameters:
        part.append(array)
        part_bytes += array.nbytes
        if part_bytes >= PART_BYTES or part_bytes * 20 >= total:
            mx.eval(part)
            done += part_bytes
            part, part_bytes = [], 0
            if time.monotonic() - spoken_at > 0.05:
                progress(min(done / total, 1.0))
                spoken_at = time.monotonic()
    mx.eval(part)
    progress(1.0)


def check_files(folder: Path) -> None:
    """Check that nothing in the folder would block, or never end, when it is read. Raises ModelInvalid, OSError."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelInvalid("there is no such folder") from None
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:
            continue  # a link that leads nowhere is as good as no file
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ModelInvalid(f"{entry.name} is no file", file=entry.name)
        if status.st_size > MAX_OTHER_BYTES and not entry.name.endswith(".safetensors") and _is_read(entry.name):
            raise ModelInvalid(f"{entry.name} has {status.st_size} bytes", file=entry.name)


def _is_read(name: str) -> bool:
    return name.endswith((".json", ".jinja", ".model", ".txt", ".tiktoken"))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the numbers that size a model within reason. Raises ModelInvalid."""
    config = _read_json(folder, "config.json")
    if config is None:
        raise ModelInvalid("the folder has no config.json", file="config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelInvalid("config.json: no model_type", file="config.json")
    tower = config.get("vision_config")
    for part in (config, _text_config(config), tower if isinstance(tower, dict) else {}):
        for name, limit in _LIMITS.items():
            value = part.get(name)
            if isinstance(value, int | float) and not 0 <= value <= limit:
                raise ModelInvalid(f"config.json: {name} is {value}", file="config.json")
    return config


def check_weights(folder: Path) -> None:
    """Check that the weights are there and whole, by their headers. Raises ModelInvalid."""
    files = sorted(folder.glob("model*.safetensors"))
    index = _read_json(folder, "model.safetensors.index.json")
    if index is not None:
        weight_map = index.get("weight_map")
        named = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        missing = sorted(str(name) for name in named if str(name) not in {file.name for file in files})
        if missing:
            raise ModelInvalid(f"weight files are missing: {', '.join(missing[:3])}", file=missing[0])
    if not files:
        raise ModelInvalid("the folder has no model*.safetensors")
    for file in files:
        try:
            check_safetensors(file)
        except SafetensorsError as error:
            raise ModelInvalid(f"{file.name}: {error}", file=file.name) from None


def context_length(config: dict[str, Any]) -> int:
    """How many tokens the model was made for, in tokens, as its config says; clamped where it says nonsense."""
    text = _text_config(config)
    length: float | None = None
    for name in ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "seq_length"):
        length = _whole(text.get(name))
        if length:
            break
    length = length or DEFAULT_CONTEXT
    scaling = text.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
        factor = scaling.get("factor")
        if isinstance(factor, int | float) and 1 <= factor <= 1000:
            # YaRN stretches the original length, and configs differ in which of the two lengths they give.
            if kind == "yarn":
                length = max(length, (_whole(scaling.get("original_max_position_embeddings")) or length) * factor)
            elif kind in ("linear", "dynamic"):
                length *= factor
    return int(min(max(length, MIN_CONTEXT), MAX_CONTEXT))


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = _read_json(folder, "mlxd.json") or {}
    check_defaults(settings.get("defaults", {}))
    return settings


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object from the folder; None where there is no such file. Raises ModelInvalid, OSError."""
    try:
        with open(folder / name, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        value = json.loads(raw) if len(raw) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{name} is no JSON: {error}", file=name) from None
    if not isinstance(value, dict):
        raise ModelInvalid(f"{name} holds no JSON object", file=name)
    return value


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers of the language model are: multimodal configs nest them."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
