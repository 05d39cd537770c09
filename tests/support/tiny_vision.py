"""Builds small random-weight folders of models that see, as mlx-vlm loads them: real processor files, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_model import write_tokenizer

HIDDEN = 64
# What a family's chat template puts where an image belongs.
PLACEHOLDERS = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "smolvlm": "<image>",
    "idefics3": "<image>",
}
_QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] + [
    f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)
]
MARKERS = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
}
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- 'PLACEHOLDER' }}{%- else %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def build(
    folder: Path,
    family: str = "qwen2_vl",
    *,
    seed: int = 0,
    quantize: int | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a model of `family`, one of PLACEHOLDERS, into `folder` and return it.

    Args:
        quantize: bits of the language model's weights; None leaves them in float32.
        config: members that replace those of config.json.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder, family)
    settings = _config(family, ids, 1 + max(ids.values()))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(family)))
    if family in _PROCESSORS:
        (folder / "processor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    mx.random.seed(seed)
    module, _ = get_model_and_args(settings)
    made = module.ModelConfig.from_dict(settings)
    made = update_module_configs(made, module, settings, ["text", "vision"])
    model = module.Model(made)
    # Scales at which layers, and what is seen, matter: greedy decoding wanders, and has no near-ties.
    for name, part in model.named_modules():
        if name.endswith("embed_tokens"):
            part.weight = mx.random.normal(part.weight.shape) * (HIDDEN**-0.5 if family == "gemma3" else 1.0)
        elif name.endswith("lm_head"):
            part.weight = mx.random.normal(part.weight.shape) * (3.0 / HIDDEN**0.5)
        elif name.startswith("language_model") and name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            part.weight = part.weight * 2.5
        elif name.endswith(("patch_embed.proj", "patch_embedding")):
            part.weight = part.weight * 20.0
        elif name in _LAST:
            part.weight = part.weight * 8.0
    if quantize is not None:
        nn.quantize(model.language_model, group_size=32, bits=quantize)
        settings["quantization"] = {"group_size": 32, "bits": quantize}
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


def _write_tokenizer(folder: Path, family: str) -> dict[str, int]:
    """Write the tokenizer with the family's markers. Returns their ids."""
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(folder, 400, TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[family]), thinking=False)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in MARKERS[family]])
    tokenizer.save(path)
    if family == "gemma3":
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        names = dict(zip(("boi_token", "image_token", "eoi_token"), MARKERS["gemma3"], strict=True))
        file.write_text(json.dumps(settings | names | {"extra_special_tokens": names}))
    return {marker: tokenizer.token_to_id(marker) for marker in MARKERS[family]}


def _config(family: str, ids: dict[str, int], vocabulary: int) -> dict[str, Any]:
    base: dict[str, Any] = {"model_type": family, "eos_token_id": 2, "vocab_size": vocabulary}
    text = _TEXT | {"vocab_size": vocabulary}
    if family.startswith("qwen"):
        return base | _qwen(family, ids, text)
    text |= {"head_dim": HIDDEN // 4}
    vision: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "patch_size": 8,
        "image_size": 32, "num_channels": 3, "layer_norm_eps": 1e-6, "model_type": "siglip_vision_model",
    }  # fmt: skip
    if family == "gemma3":
        text |= {
            "model_type": "gemma3_text", "mm_tokens_per_image": 4, "sliding_window": 32, "sliding_window_pattern": 3,
            "num_hidden_layers": 3, "query_pre_attn_scalar": 16,
        }  # fmt: skip
        image = {"image_token_index": ids["<image_soft_token>"], "hidden_size": HIDDEN, "pad_token_id": 0}
    else:
        text |= {"model_type": "llama"}
        image = {"image_token_id": ids["<image>"], "image_token_index": ids["<image>"], "scale_factor": 2}
    return base | {"text_config": text, "vision_config": vision} | image


def _qwen(family: str, ids: dict[str, int], text: dict[str, Any]) -> dict[str, Any]:
    image = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }  # fmt: skip
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    if family == "qwen2_vl":
        vision: dict[str, Any] = {
            "model_type": family, "depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2,
        }  # fmt: skip
        return image | text | {"vision_config": vision}
    vision = {
        "model_type": family, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN,
        "num_heads": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    if family == "qwen2_5_vl":
        return image | text | {"vision_config": vision}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return image | {"vision_config": vision, "text_config": text | {"model_type": "qwen3_vl_text", "head_dim": 16}}


def _preprocessor(family: str) -> dict[str, Any]:
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    if family.startswith("qwen"):
        kind = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
        pixels = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}
        return kind | means | pixels | {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    if family == "gemma3":
        return means | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
    kind = {"image_processor_type": "SmolVLMImageProcessor" if family == "smolvlm" else "Idefics3ImageProcessor"}
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
    return kind | means | sizes


# What an image goes through last.
_LAST = ("vision_tower.merger.mlp.2", "vision_tower.merger.linear_fc2", "connector.modality_projection.proj")
_PROCESSORS: dict[str, dict[str, Any]] = {
    "gemma3": {"image_seq_length": 4},
    "smolvlm": {"image_seq_len": 4},
    "idefics3": {"image_seq_len": 4},
}
