"""Try every architecture that mlx_lm has: build a tiny model of it, load it, decode alone and in a batch.

    python tools/try_families.py            all of them, as a table in Markdown
    python tools/try_families.py llama …    some of them

Configs are guessed from what each architecture's arguments are called. What cannot be guessed says nothing about the
architecture; it is listed as "not tried", with where the guess ended. Each one is tried in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 120.0

# What modules of mlx_lm.models are not: architectures.
HELPERS = frozenset(
    "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm switch_layers".split()
)

LAYERS, HIDDEN, HEADS, VOCABULARY, CONTEXT = 4, 64, 4, 400, 512
# Arguments by name, for any architecture that has them. What is not here is guessed from its type.
GUESSES: dict[str, Any] = {
    "hidden_size": HIDDEN, "d_model": HIDDEN, "n_embd": HIDDEN, "model_dim": HIDDEN, "embed_dim": HIDDEN, "dim": HIDDEN,
    "num_hidden_layers": LAYERS, "n_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS,
    "num_attention_heads": HEADS, "n_heads": HEADS, "n_head": HEADS, "num_heads": HEADS, "attention_heads": HEADS,
    "num_key_value_heads": 2, "n_kv_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2, "num_query_heads": HEADS,
    "intermediate_size": 128, "ffn_hidden_size": 128, "ffn_dim": 128, "n_inner": 128, "hidden_dim": 128, "d_ff": 128,
    "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT,
    "n_ctx": CONTEXT, "max_seq_len": CONTEXT, "sliding_window": 32, "sliding_window_size": 32, "rope_theta": 10000.0,
    "rope_base": 10000.0, "rotary_emb_base": 10000, "rope_global_base_freq": 10000.0, "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "norm_epsilon": 1e-5, "rope_scaling": None,
    "layernorm_epsilon": 1e-5,
    "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_layer_freq": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_expert_group": 1, "router_aux_loss_coef": 0.0, "moe_layer_start_index": 1,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "expert_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 64, "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    # states
    "state_size": 16, "conv_kernel": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "expand": 2,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_n_groups": 1, "n_groups": 1,
    "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16,
    "time_step_limit": [0.0, 10.0], "use_bias": False, "use_conv_bias": True, "conv_bias": True, "conv_L_cache": 3,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "partial_rotary_factor": 0.5, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "query_pre_attn_scalar": 16,
    "lru_width": HIDDEN, "attention_window_size": 32, "conv1d_width": 4, "logits_soft_cap": 30.0,
    "block_types": ["recurrent", "attention"], "decay_low_rank_dim": 8, "gate_low_rank_dim": 8, "a_low_rank_dim": 8,
    "v_low_rank_dim": 8, "norm_bias": False,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "layer_types": None,
    "lm_head_multiplier": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 0.25,
    "residual_multiplier": 1.0, "logit_scale": 1.0, "scale_emb": 1.0, "scale_depth": 1.0, "dim_model_base": HIDDEN,
    "mlp_ratio": 2, "sliding_window_pattern": 2,
    "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 128},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}  # fmt: skip


# What some architectures need beyond that, or want otherwise.
SLIDING = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": SLIDING},
    "bailing_moe_v3": {},
    "deepseek_v2": {
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
        },
    },
    "exaone4": {"layer_types": SLIDING, "sliding_window_pattern": None},
    "exaone_moe": {"layer_types": SLIDING, "is_moe_layer": [False, True] * 2},
    "gear": {"layer_types": SLIDING},
    "gemma3n": {
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "rope_local_base_freq": 10000.0,
        "layer_types": SLIDING, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 16, "altup_coef_clip": 120.0, "altup_correct_scale": True,
        "altup_active_idx": 0, "laurel_rank": 8,
    },
    "gemma4": {"layer_types": SLIDING, **GEMMA4},
    "gemma4_text": {"layer_types": SLIDING, **GEMMA4},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": HEADS, "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "gpt_oss": {"layer_types": SLIDING, "rope_scaling": None, "tie_word_embeddings": None},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3], "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_dim": HIDDEN, "block_ff_dim": 128,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "llama4_text": {"layer_types": None, "no_rope_layers": [1, 1, 1, 0], "intermediate_size_mlp": 128},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"layer_types": SLIDING},
    "llama4": {
        "attention_bias": False, "attention_chunk_size": 32, "interleave_moe_layer_step": 2, "use_qk_norm": True,
        "intermediate_size_mlp": 128, "rope_scaling": None, "num_experts_per_tok": 1,
    },
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": CONTEXT, "short_factor": 1.0, "long_factor": 1.0},
    },
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT, "llama_4_scaling_beta": 0.1,
            "type": "default",
        },
        "layer_types": SLIDING,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "M", "-"], "layers_block_type": None},
    "phixtral": {"rotary_dim": 8, "num_local_experts": 4},
}  # fmt: skip


def architectures() -> list[str]:
    import mlx_lm.models

    return sorted(each.name for each in pkgutil.iter_modules(mlx_lm.models.__path__) if each.name not in HELPERS)


# --- one of them, in a process of its own -----------------------------------------------------------------------------


def guess(arguments: Any, kind: str, own: dict[str, Any]) -> dict[str, Any]:
    """A config for the arguments of an architecture: what is asked for by name, else by type."""
    made: dict[str, Any] = {"model_type": kind}
    hints = typing.get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name == "model_type":
            continue
        if field.name in own:
            if own[field.name] is not None or required:
                made[field.name] = own[field.name]
        elif field.name == "text_config":
            made[field.name] = {"tie_word_embeddings": False} | GUESSES | own | {"model_type": kind}
        elif field.name in GUESSES and GUESSES[field.name] is not None:
            made[field.name] = GUESSES[field.name]
        elif required:
            made[field.name] = _by_type(hints.get(field.name))
    return made


def _by_type(hint: Any) -> Any:
    found = {bool: False, int: 4, float: 1.0, str: "silu", list: [], dict: {}}
    kinds = [hint, typing.get_origin(hint), *typing.get_args(hint)]
    return next((found[kind] for kind in kinds if kind in found), None)


def attempt(kind: str) -> dict[str, Any]:
    """{stage, told}: how far the architecture got. Stages: config, load, alone, batch, prefix, all."""
    sys.path.insert(0, str(ROOT / "tests"))
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache

    from support.families import FAMILIES
    from support.tiny_model import CHAT_TEMPLATE, write_tokenizer

    stage = "config"
    facts: dict[str, Any] = {"kind": kind}
    try:
        module = importlib.import_module(f"mlx_lm.models.{kind}")
        config = guess(module.ModelArgs, kind, OWN.get(kind) or FAMILIES.get(kind, {}))
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        weights = dict(tree_flatten(model.parameters()))
        for name, array in weights.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weights[name] = mx.random.normal(array.shape)
        facts["caches"] = sorted({type(cache).__name__ for cache in _leaves(make_prompt_cache(model))})
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_tokenizer(folder, VOCABULARY, CHAT_TEMPLATE)
            mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
            whole = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT} | config
            (folder / "config.json").write_text(json.dumps(whole))
            stage = "load"
            facts |= _serve(folder)
    except (Exception, SystemExit) as error:
        return facts | {"stage": facts.get("stage", stage), "told": f"{type(error).__name__}: {error}"}
    return facts


def _leaves(caches: Any) -> list[Any]:
    return [leaf for cache in caches for leaf in (_leaves(cache.caches) if hasattr(cache, "caches") else [cache])]


def _serve(folder: Path) -> dict[str, Any]:
    """Load it as a worker does, and compare what a batch says with what each says alone."""
    from mlxd.worker.engine import Engine
    from mlxd.worker.load import load

    loaded = load(str(folder), lambda fraction: None)
    loaded.tokenizer.eos_token_ids = []
    texts = ["hello", "the quick brown fox jumps over the lazy dog " * 3, "numbers 1 2 3"]

    def run(engine: Engine, *asked: str) -> list[Any]:
        for number, text in enumerate(asked):
            engine.submit(number, _request(text))
            for _ in range(3):
                _collect(engine, ends)
        while engine.busy:
            _collect(engine, ends)
        return [_tokens(ends.pop(number)) for number in range(len(asked))]

    ends: dict[int, Any] = {}
    try:
        alone = [run(Engine(loaded, max_batch=1, prefill_step=16), text)[0] for text in texts]
    except Exception as error:
        return {"stage": "alone", "told": f"{type(error).__name__}: {error}"}
    try:
        together = run(Engine(loaded, max_batch=8, prefill_step=16), *texts)
    except Exception as error:
        return {"stage": "batch", "told": f"{type(error).__name__}: {error}"}
    if together != alone:
        return {"stage": "batch", "told": "a batch says something else than each alone"}
    engine = Engine(loaded, max_batch=8, prefill_step=16, cache_bytes=1 << 26)
    if engine.cache is None:
        return {"stage": "prefix", "told": "its caches are of kinds that no prefixes are kept of"}
    if [run(engine, text)[0] for text in texts[1:] * 2] != alone[1:] * 2:
        return {"stage": "prefix", "told": "from a kept prefix it says something else"}
    if engine.cache.hits == 0:
        return {"stage": "prefix", "told": "no prefix was found again"}
    return {"stage": "all", "told": ""}


def _request(text: str) -> Any:
    from mlxd.childwire import Generate

    options = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 10, "logprobs": 0}
    return Generate(kind="chat", messages=[{"role": "user", "content": text}], options=options)


def _collect(engine: Any, ends: dict[int, Any]) -> None:
    for number, end in engine.step().ended:
        if isinstance(end, Exception):
            raise end
        ends[number] = end


def _tokens(end: Any) -> list[int]:
    return [entry["token_id"] for entry in end.logprobs]


# --- all of them ------------------------------------------------------------------------------------------------------


def tried(kind: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"kind": kind, "stage": "load", "told": f"no end within {LIMIT_S:g} s"}
    except (ValueError, IndexError):
        return {"kind": kind, "stage": "load", "told": f"the process ended: {done.stderr.strip()[-200:]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--one", metavar="KIND", help="in this process, as one line of JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(attempt(arguments.one)))
        return
    print("| architecture | caches | gets to | |\n|---|---|---|---|")
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(tried, arguments.kinds or architectures()):
            told = str(one["told"]).replace("\n", " ").replace("|", "/")[:160]
            print(f"| `{one['kind']}` | {', '.join(one.get('caches', []))} | {one['stage']} | {told} |", flush=True)


if __name__ == "__main__":
    main()
