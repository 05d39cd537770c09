"""The models that everything is measured on, as folders that daemon, mlx_lm and its server load alike.

`cleanup` is the built-in model, `shape` a Qwen3 of random weights, quantised to 4 bits, `dense` a smaller one that is
not, so that a CPU makes the more of it the more rows there are. All name a token that does not exist as their end of
text: every answer then has exactly as many tokens as were asked for, on every side. On a CPU all are float32, as
workers have it there, because half precision is far slower with mlx's CPU backend.

Run as a process, since only processes that end may import mlx here: `python -m benchmarks.models NAME FOLDER [WIDTH
LAYERS]`.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from .processes import environment

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As short as a template can be: what is measured is not how long prompts take.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- message.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"
)
CONTEXT = 4096


def make(name: str, temp: Path, width: int = 0, layers: int = 0) -> Path:
    """The folder of the model `name`, made anew in `temp`."""
    folder = temp / name
    command = [sys.executable, "-m", "benchmarks.models", name, str(folder)]
    if name != "cleanup":
        command += [str(width), str(layers)]
    subprocess.run(command, env=environment(temp), check=True)
    return folder


def make_cleanup(folder: Path) -> None:
    """A copy of the built-in model that goes on after its end."""
    import mlx.core as mx

    import mlxd

    source = Path(mlxd.__file__).parent / "models" / "cleanup"
    shutil.copytree(source, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    dtype, dtype_name = _dtype()
    weights: Any = mx.load(str(folder / "model.safetensors"))
    weights = {key: value.astype(dtype) for key, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    # Longer prompts than it was made for cost what they cost, whatever it makes of them.
    config |= {"eos_token_id": config["vocab_size"], "torch_dtype": dtype_name, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]  # mlx_lm adds it to what the config says
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_shape(folder: Path, width: int, layers: int, *, quantised: bool) -> None:
    """A Qwen3 of the given size, made of noise. Only tokens of two or three letters are ever chosen, so that each
    brings text at once."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3 import Model, ModelArgs

    folder.mkdir(parents=True)
    tokens = write_tokenizer(folder)
    vocabulary = -(-len(tokens) // 64) * 64
    dtype, dtype_name = _dtype()
    quantization = {"group_size": 32 if width % 64 else 64, "bits": 4} if quantised else None
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": width,
        "num_hidden_layers": layers, "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 192), "head_dim": 64,
        "rms_norm_eps": 1e-6, "vocab_size": vocabulary, "max_position_embeddings": CONTEXT, "rope_theta": 1e6,
        "tie_word_embeddings": True, "torch_dtype": dtype_name, "eos_token_id": vocabulary,
    } | ({"quantization": quantization} if quantization else {})  # fmt: skip
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    # Wider than nn's default, which keeps the logits apart: greedy decoding has no near-ties. Rows of zeros make
    # logits of zero, which are never the largest of thousands.
    chosen = mx.array([[float(len(text) in (2, 3) and text.isalpha())] for text in tokens])
    chosen = mx.concatenate([chosen, mx.zeros((vocabulary - len(tokens), 1))])
    model.model.embed_tokens.weight = mx.random.normal((vocabulary, width)) * 0.5 * chosen
    model.set_dtype(dtype)
    if quantization:
        nn.quantize(model, **quantization)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> list[str]:
    """A byte-level BPE of all bytes and all pairs and triples of letters; nothing is learned. Returns its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = list(itertools.product(ascii_lowercase, repeat=2))
    merges = [*pairs, *((a + b, c) for (a, b) in pairs for c in ascii_lowercase)]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokens


def parameters(folder: Path) -> int:
    """How many parameters the model in `folder` has, from its config."""
    config = json.loads((folder / "config.json").read_text())
    width, heads = config["hidden_size"], config["head_dim"]
    attention = 2 * width * heads * (config["num_attention_heads"] + config["num_key_value_heads"])
    return int(
        config["vocab_size"] * width
        + config["num_hidden_layers"] * (attention + 3 * width * config["intermediate_size"])
    )


def _dtype() -> tuple[Any, str]:
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return (mx.float32, "float32") if on_cpu else (mx.bfloat16, "bfloat16")


if __name__ == "__main__":
    if sys.argv[1] == "cleanup":
        make_cleanup(Path(sys.argv[2]))
    else:
        make_shape(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), quantised=sys.argv[1] == "shape")
