"""Models of made weights whose answers are known beforehand, at the cost of real ones: no layer is left out.

`copier` says its prompt's tokens again, one by one, as an edit does: every tenth kind of word is replaced by another.
One head looks back by exactly as many tokens as the prompt has; all other layers compute as usual and add next to
nothing. `target` and `draft` are a pair that mostly agrees: the draft is the target's first layers, and what the others
add is small.

Run as a process: `python -m benchmarks.speculation_models NAME FOLDER`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from .models import CONTEXT, write_tokenizer
from .processes import environment

WIDTH, COPIER_LAYERS, TARGET_LAYERS, DRAFT_LAYERS = 512, 8, 12, 2
HEADS, KV_HEADS, HEAD = 8, 4, 64
# How many tokens the copier's prompts have, its template's aside.
SOURCE = 256
# How much the layers that hardly count add.
FAINT, SMALL = 1e-3, 0.08


def make(name: str, temp: Path) -> Path:
    """The folder of a model, made anew in `temp`."""
    folder = temp / name
    command = [sys.executable, "-m", "benchmarks.speculation_models", name, str(folder)]
    subprocess.run(command, env=environment(temp), check=True)
    return folder


def _build(folder: Path, layers: int) -> tuple[Any, list[str], dict[str, Any]]:
    """A Qwen3 of noise, with its tokens and its config; nothing but the tokenizer is written."""
    import mlx.core as mx
    from mlx_lm.models.qwen3 import Model, ModelArgs

    folder.mkdir(parents=True)
    tokens = write_tokenizer(folder)
    vocabulary = -(-len(tokens) // 64) * 64
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": WIDTH,
        "num_hidden_layers": layers, "intermediate_size": 1344, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 1e-6, "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT, "rope_theta": 1e4, "tie_word_embeddings": False,
        "torch_dtype": "float32", "eos_token_id": vocabulary,
    }  # fmt: skip
    mx.random.seed(0)
    return Model(ModelArgs.from_dict(config)), tokens, config


def _write(folder: Path, model: Any, config: dict[str, Any]) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def _weaken(layers: list[Any], share: float) -> None:
    for layer in layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * share
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * share


def make_copier(folder: Path) -> None:
    import mlx.core as mx

    model, tokens, config = _build(folder, COPIER_LAYERS)
    vocabulary, code = config["vocab_size"], WIDTH // 2 - 1
    codes = mx.random.randint(0, 2, (vocabulary, code)).astype(mx.float32) * 2 - 1
    # What stands for a token goes in on one half of the width and out on the other; the first number is constant.
    constant = mx.full((vocabulary, 1), math.sqrt(WIDTH / 2))
    empty = mx.zeros((vocabulary, WIDTH // 2))
    model.model.embed_tokens.weight = mx.concatenate([constant, codes, empty], axis=1)
    _weaken(model.model.layers, FAINT)
    first = model.model.layers[0].self_attn
    turns = [SOURCE * 1e4 ** (-i / (HEAD // 2)) for i in range(HEAD // 2)]
    looking = mx.array([math.cos(turn) for turn in turns] + [-math.sin(turn) for turn in turns])
    seen = mx.array([1.0] * (HEAD // 2) + [0.0] * (HEAD // 2))
    queries, keys = mx.zeros((HEADS * HEAD, WIDTH)), mx.zeros((KV_HEADS * HEAD, WIDTH))
    queries[:, 0], keys[:, 0] = mx.tile(looking, HEADS), mx.tile(seen, KV_HEADS)
    first.q_proj.weight, first.k_proj.weight = queries, keys
    first.q_norm.weight = first.k_norm.weight = mx.full((HEAD,), 12.0)
    values, out = mx.zeros((KV_HEADS * HEAD, WIDTH)), mx.zeros((WIDTH, HEADS * HEAD))
    for i in range(code):
        values[i, 1 + i] = 1.0
        out[WIDTH // 2 + i, (i // HEAD) * (HEADS // KV_HEADS) * HEAD + i % HEAD] = 4.0
    first.v_proj.weight, first.o_proj.weight = values, out
    said = mx.array(_edited(tokens, vocabulary))
    model.lm_head.weight = mx.concatenate([empty, codes[said], empty[:, :1]], axis=1)
    _write(folder, model, config)


def _edited(tokens: list[str], vocabulary: int) -> list[int]:
    """What each token becomes: of the words of three letters every tenth changes places with the one after it."""
    said = list(range(vocabulary))
    words = [index for index, text in enumerate(tokens) if len(text) == 3 and text.isalpha()]
    for index in words[:-1:20]:
        said[index], said[index + 1] = index + 1, index
    return said


def make_pair(target: Path, draft: Path) -> None:
    import mlx.core as mx

    for folder, layers in ((target, TARGET_LAYERS), (draft, DRAFT_LAYERS)):
        model, tokens, config = _build(folder, TARGET_LAYERS)
        vocabulary = config["vocab_size"]
        chosen = mx.array([[float(len(text) in (2, 3) and text.isalpha())] for text in tokens])
        chosen = mx.concatenate([chosen, mx.zeros((vocabulary - len(tokens), 1))])
        mx.random.seed(1)
        model.model.embed_tokens.weight = mx.random.normal((vocabulary, WIDTH))
        model.lm_head.weight = mx.random.normal((vocabulary, WIDTH)) * 0.2 * chosen
        _weaken(model.model.layers[DRAFT_LAYERS:], SMALL)
        model.model.layers = model.model.layers[:layers]
        _write(folder, model, config | {"num_hidden_layers": layers})


if __name__ == "__main__":
    if sys.argv[1] == "copier":
        make_copier(Path(sys.argv[2]))
    else:
        make_pair(Path(sys.argv[2]), Path(sys.argv[2] + "-draft"))
