"""Builds adapters of a tiny model, in mlx_lm's format or PEFT's, with random weights that change what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def build(
    folder: Path,
    base: Path,
    *,
    kind: str = "lora",
    rank: int = 4,
    scale: float = 4.0,
    layers: int = 2,
    keys: list[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write an adapter of the model in `base` into `folder`, as mlx_lm's tuner does, and return it.

    Args:
        kind: "lora" or "dora".
        layers: how many of the last layers it changes.
        keys: paths of modules within a layer, or of the whole model; None takes all that mlx_lm would.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    model.freeze()
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    key = mx.random.key(seed)
    weights = {}
    for name, array in tree_flatten(model.trainable_parameters()):
        key, own = mx.random.split(key)
        noise = mx.random.normal(array.shape, key=own)
        if name.endswith(".m"):
            weights[name] = array * (1 + 0.3 * noise)
        else:
            weights[name] = noise * (array.shape[0] ** -0.5 if name.endswith("lora_a") else 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": base.name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def to_peft(adapter: Path, folder: Path) -> Path:
    """The same adapter as PEFT would have saved it, of linear layers and embeddings."""
    import mlx.core as mx

    weights: Any = mx.load(str(adapter / "adapters.safetensors"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    turned = {}
    for name, array in weights.items():
        path, _, part = name.rpartition(".")
        own = part.replace("lora_", "lora_embedding_").replace("_a", "_A").replace("_b", "_B")
        as_peft = own if path.endswith("embed_tokens") else names[part]
        turned[f"base_model.model.{path}.{as_peft}"] = array if part == "m" else mx.contiguous(array.T)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), turned)
    rank, scale = config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "bias": "none", "fan_in_fan_out": False}
    settings["use_dora"] = config["fine_tune_type"] == "dora"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Replace members of its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
