"""Tiny configs of all families of transformers' causal mapping, made from their default configs."""

import dataclasses
import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 96
WIDTH = 32
LAYERS = 2
# What a config names, by whatever name: every one that a config has is set.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "emb_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size"), WIDTH),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "cross_attention_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_encoder_layers",), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head", "attention_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "d_ff", "dff", "n_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("context_length",), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **{"eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "cls_token_id": 1},
    "hidden_size_global": WIDTH,
    "is_decoder": True,
    # What stands between hidden states and logits, away from its neutral value.
    **{"logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 0.3, "dim_model_base": 8},
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap"), 3.0),
    **dict.fromkeys(("output_logit_soft_cap",), 3.0),
    **dict.fromkeys(("index_topk", "indexer_budget"), 4),
}


def _fields(cls: type) -> set[str]:
    names = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    return names - {"self", "args", "kwargs"}


def _made(cls: type, own: dict[str, Any]) -> PreTrainedConfig:
    fields, names = _fields(cls), getattr(cls, "attribute_map", {})
    sizes = {k: v for k, v in _SIZES.items() if k in fields or names.get(k) in fields}
    sizes = {k: v for k, v in sizes.items() if names.get(k) not in sizes}
    if "kv_lora_rank" in fields and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for part in getattr(cls, "sub_configs", {}):
        if isinstance(own.get(part), dict):
            own = own | {part: _made(type(getattr(cls(), part)), own[part])}
    return cls(**(sizes | own))  # type: ignore[no-any-return]


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = _LINEAR | {
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_MAMBA_ATTENTION = _MAMBA | {"layer_types": ["linear_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_GEMMA4: dict[str, Any] = {
    **_SLIDING,
    **{"num_kv_shared_layers": 0, "global_head_dim": 16, "vocab_size_per_layer_input": 96},
    "hidden_size_per_layer_input": 8,
}
_HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"]}
_ROTARY = {"rotary_dim": 4}
_DOTS3: dict[str, Any] = {
    **_SPARSE,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "num_key_value_heads": 4,
}
_QWEN4: dict[str, Any] = {
    **_DELTA,
    "layer_types": ["linear_attention", "indexed_attention"],
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_compress_ratio": 2, "num_key_value_heads": 1},
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TEXT: dict[str, Any] = {"text_config": {}, "vision_config": {}}

OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"), _SLIDING),
    **dict.fromkeys(("flint", "gemma3_text", "kolibri1", "olmo3"), _SLIDING),
    "bailing_hybrid": _LINEAR | _SPARSE,
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    **dict.fromkeys(("beam", "deepseek_v32", "glm_moe_dsa"), _SPARSE),
    **dict.fromkeys(("codegen", "gptj"), _ROTARY),
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["moe", "hash_moe"],
    },
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3, "vision_config": {}, "audio_config": {}},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **_SLIDING,
        **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96},
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": _MAMBA_ATTENTION,
    **dict.fromkeys(("inkling2_text", "inkling_text"), _HYBRID),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention"]}
    | {"num_hidden_layers": 3},
    "llama4_text": {
        **{"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        "moe_layers": [1],
        "num_experts_per_tok": 1,
    },
    "longcat_flash": {"zero_expert_num": 2},  # else a rank may use none that has weights
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": _MAMBA,
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "olmo_hybrid", "minimax"), _DELTA
    ),
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4, "vision_config": {}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        **{"axial_pos_shape": [16, 8], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
        "attn_layers": ["local", "lsh"],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        **{"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        **{"num_hidden_layers": 4, "n_mamba_heads": 2, "num_key_value_heads": 4},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "blt": {
        "patcher_config": {},
        "encoder_config": {},
        "decoder_config": {},
        "global_config": {},
        "encoder_hash_byte_group_vocab": 64,
    },
    **dict.fromkeys(("gemma3", "llama4", "got_ocr2", "mllama", "qwen3_5", "qwen3_5_moe"), _TEXT),
    "gemma4": {"text_config": _GEMMA4, "vision_config": {}, "audio_config": {}},
    "gemma4_unified": _TEXT,
    "gemma4_assistant": {"text_config": _GEMMA4 | {"hidden_size_per_layer_input": 0}},
    "fuyu": {"text_config": {}},
    "emu3": {"text_config": {}, "vq_config": {}},
    "git": {"vision_config": {}},
    "moss_transcribe_diarize": {"text_config": {}, "audio_config": {}},
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        **{"index_block_size": 4, "index_topk_blocks": 2, "index_head_dim": 8},
    },
}


def tiny_config(family: str) -> PreTrainedConfig:
    """A config of two narrow layers, with every window and chunk shorter than the test's rows."""
    return _made(CONFIG_MAPPING[family], OWN.get(family, {}))
