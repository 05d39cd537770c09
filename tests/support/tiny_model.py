"""Builds small random-weight folders, of Qwen3 or another family, that mlx_lm loads like any model; no download.

The tokenizer is a byte-level BPE learned from a few lines, so that every Unicode text has tokens and characters beyond
ASCII take several. Weights are random by seed: the text is noise, but the same noise each time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.families import FAMILIES, MORE

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{ raise_exception('no tool turns here') }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it rests",
    "system user assistant you are a helpful model that answers with words",
    "So I think we should meet on Monday at 3 PM, if that is fine with you.",
    "numbers like 1 2 3 10 100 and signs . , ! ? : ; - ( ) \" ' /",
    "Grüße aus Köln, 你好, привет, 😀🎉",
]


def build(
    folder: Path,
    *,
    family: str = "qwen3",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 400,
    context: int = 512,
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    quantize: int | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a model into `folder` and return it.

    Args:
        family: one of support.families, either list.
        hidden: width; the feed-forward part is three times as wide.
        vocabulary: the wished tokenizer size; the small corpus may give less. Embeddings have exactly this many rows.
        chat_template: None writes a tokenizer without one.
        quantize: bits of the weights; None leaves them in float32.
        config: members that replace those of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocabulary, chat_template)
    settings: dict[str, Any] = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    } | (FAMILIES | MORE)[family]
    _write_weights(folder, settings, vocabulary, hidden, seed, quantize)
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    return folder


def _write_weights(
    folder: Path, settings: dict[str, Any], vocabulary: int, hidden: int, seed: int, quantize: int | None
) -> None:
    """Random ones. What `quantize` makes of them is added to `settings`."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes as get_classes

    mx.random.seed(seed)
    model_class, arguments_class = get_classes(settings)
    model = model_class(arguments_class.from_dict(settings))
    # Scales at which layers matter and logits lie apart: greedy decoding wanders, and has no near-ties.
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "backbone.embeddings")):
            module.weight = mx.random.normal((vocabulary, hidden))
        elif name == "lm_head":
            module.weight = mx.random.normal((vocabulary, hidden)) * (3.0 / hidden**0.5)
    if quantize is not None:
        nn.quantize(model, group_size=32, bits=quantize)
        settings["quantization"] = {"group_size": 32, "bits": quantize}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})


def write_tokenizer(folder: Path, vocabulary: int, chat_template: str | None, *, thinking: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE, the chat markers of Qwen, and for `thinking`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if thinking:
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
