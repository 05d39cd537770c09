"""The config of a tiny model by family: what mlx_lm's architectures need beyond the numbers that they share."""

from __future__ import annotations

from typing import Any

_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
WINDOW = 32

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen3_moe": _MOE,
    # Windows that slide, on two layers of three.
    "gemma3_text": {
        "sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16, "num_hidden_layers": 3,
    },
    "gpt_oss": {
        "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"], "rope_scaling": None,
    },
    # States that each token overwrites: on all layers, beside attention in each, on three layers of four.
    "mamba2": {
        "num_heads": 4, "head_dim": 32, "state_size": 16, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1,
        "use_bias": False, "use_conv_bias": True, "time_step_limit": [0.0, 10.0], "time_step_rank": "auto",
        "intermediate_size": 128,
    },
    "falcon_h1": {
        "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_heads": 4, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "lm_head_multiplier": 1.0, "embedding_multiplier": 1.0,
    },
    "qwen3_next": _MOE | {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.5, "full_attention_interval": 2,
    },
}  # fmt: skip

# Architectures that mlx_lm cannot batch, or not in every way; see mlxd/worker/families.py.
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 4, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_bigcode": {
        "n_embd": 64, "n_layer": 2, "n_inner": 128, "n_head": 4, "n_positions": 4096, "layer_norm_epsilon": 1e-5,
        "num_key_value_heads": 1,
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "intermediate_size_mlp": 128, "head_dim": 16,
            "vocab_size": 400, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
            "rope_scaling": None, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_bias": False,
            "attention_chunk_size": WINDOW, "interleave_moe_layer_step": 2, "use_qk_norm": True,
        },
    },
}  # fmt: skip
