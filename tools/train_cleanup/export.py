"""Writes a checkpoint as an ordinary model folder: Hugging Face names, half precision."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from model import Model, Shape
from safetensors.torch import save_file

DEFAULTS = {
    "defaults": {"temperature": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 512},
    "guard": "faithful",
}


def weights(state: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Torch names and fused matrices to those of Qwen3ForCausalLM."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    out = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(shape.num_hidden_layers):
        old, new = f"layers.{i}.", f"model.layers.{i}."
        parts = state[old + "qkv.weight"].split((q, kv, kv))
        for name, part in zip("qkv", parts, strict=True):
            out[f"{new}self_attn.{name}_proj.weight"] = part
        gate, up = state[old + "gate_up.weight"].chunk(2)
        out |= {
            new + "self_attn.o_proj.weight": state[old + "out.weight"],
            new + "self_attn.q_norm.weight": state[old + "q_norm.weight"],
            new + "self_attn.k_norm.weight": state[old + "k_norm.weight"],
            new + "mlp.gate_proj.weight": gate,
            new + "mlp.up_proj.weight": up,
            new + "mlp.down_proj.weight": state[old + "down.weight"],
            new + "input_layernorm.weight": state[old + "norm1.weight"],
            new + "post_attention_layernorm.weight": state[old + "norm2.weight"],
        }
    return out


def config(shape: Shape, dtype: str) -> dict:
    """config.json of a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def put(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def export(state: dict[str, torch.Tensor], shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and configs; the tokenizer's files are already in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    tensors = {k: v.to(dtype).contiguous().clone() for k, v in weights(state, shape).items()}
    temporary = folder / "model.safetensors.new"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, folder / "model.safetensors")
    put(folder / "config.json", json.dumps(config(shape, name), indent=2) + "\n")
    greedy = {"do_sample": False, "eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": 512}
    put(folder / "generation_config.json", json.dumps(greedy, indent=2) + "\n")
    put(folder / "mlxd.json", json.dumps(DEFAULTS, indent=2) + "\n")


def count(shape: Shape) -> int:
    """Number of parameters, tied embeddings once."""
    return sum(p.numel() for p in Model(shape).parameters())
