"""Tiny random models from their configs, and prompt groups of odd shapes."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import models as families

from orpo_ray.preference.groups import PromptGroup, RowId

VOCABULARY = 96
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
MIXTURES = ("mixtral", "olmoe", "qwen2-moe", "qwen3-moe")
_LAYERS = {"sliding_window": 8, "head_dim": 8}


def _config(name: str) -> Any:
    if name == "llama":
        return families.llama.LlamaConfig(**_LLAMA_LIKE)
    if name == "llama-wide":  # heads as wide as FlexAttention wants them on GPUs
        return families.llama.LlamaConfig(**_LLAMA_LIKE, head_dim=16)
    if name == "llama-tied":
        return families.llama.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True)
    if name == "mistral":
        return families.mistral.MistralConfig(**_LLAMA_LIKE, **_LAYERS)
    if name == "qwen2":
        return families.qwen2.Qwen2Config(**_LLAMA_LIKE)
    if name == "qwen3":
        return families.qwen3.Qwen3Config(**_LLAMA_LIKE, head_dim=8)
    if name == "gemma2":
        return families.gemma2.Gemma2Config(
            **_LLAMA_LIKE,
            **_LAYERS,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    if name == "phi3":
        return families.phi3.Phi3Config(**_LLAMA_LIKE, pad_token_id=0, sliding_window=8)
    if name == "gemma3":
        return families.gemma3.Gemma3TextConfig(
            **_LLAMA_LIKE,
            **_LAYERS,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    if name == "gpt-neox":
        wanted = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
        return families.gpt_neox.GPTNeoXConfig(**wanted)
    if name == "gpt2":
        return families.gpt2.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128
        )
    if name == "mixtral":
        return families.mixtral.MixtralConfig(**_LLAMA_LIKE, **_EXPERTS, num_local_experts=4)
    experts = _LLAMA_LIKE | _EXPERTS | {"num_experts": 4}
    if name == "olmoe":
        return families.olmoe.OlmoeConfig(**experts)
    if name == "qwen2-moe":
        return families.qwen2_moe.Qwen2MoeConfig(
            **experts, moe_intermediate_size=24, shared_expert_intermediate_size=24
        )
    if name == "qwen3-moe":
        return families.qwen3_moe.Qwen3MoeConfig(**experts, moe_intermediate_size=24, head_dim=8)
    if name == "lfm2":  # short convolutions between tokens
        return families.lfm2.Lfm2Config(**_LLAMA_LIKE, layer_types=["conv", "full_attention"])
    if name == "falcon":  # attention of its own: cannot be packed
        wanted = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return families.falcon.FalconConfig(**{k: _LLAMA_LIKE[k] for k in wanted})
    if name == "gpt-oss":  # attention sinks
        return families.gpt_oss.GptOssConfig(
            **experts, head_dim=8, layer_types=["full_attention"] * 2
        )
    if name == "smollm3":
        return families.smollm3.SmolLM3Config(**_LLAMA_LIKE, pad_token_id=0)
    raise ValueError(name)


def tiny_model(name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A random model of a family; weights large enough that logits differ clearly."""
    config = _config(name)
    for setting in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, setting):
            setattr(config, setting, 0.0)
    torch.manual_seed(seed)
    # Eager attention takes its softmax in fp32 whatever the model's type: SDPA does not.
    attention = "eager" if name in ("gemma2", "gpt-oss") else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model.to(dtype).eval()


def odd_groups(seed: int) -> list[PromptGroup]:
    """Groups with lengths from 1 to 17: 2 to 5 completions, no prompt, one token, a cut answer.

    Pairs share chosen and rejected completions, as rankings do.
    """
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(2, VOCABULARY, length).astype(np.int32)

    shapes: list[tuple[int, list[int], list[tuple[int, int]]]] = [
        (7, [5, 3], [(0, 1)]),
        (1, [1, 17], [(1, 0)]),
        (0, [2, 9], [(0, 1)]),
        (11, [4, 1, 6], [(0, 1), (0, 2), (1, 2)]),
        (17, [3, 3, 8, 2], [(2, 0), (2, 1), (3, 0)]),
        (0, [5, 2, 7], [(1, 0), (1, 2)]),
        (2, [6, 1, 2, 9, 4], [(0, 1), (2, 1), (0, 3), (4, 3)]),
        (16, [1, 1], [(1, 0)]),  # as truncation leaves it: no end-of-sequence token
    ]
    groups = []
    for n_prompt, lengths, pairs in shapes:
        row_ids = tuple(RowId(0, len(groups) * 10 + i) for i in range(len(pairs)))
        completions = tuple(ids(length) for length in lengths)
        groups.append(PromptGroup(ids(n_prompt), completions, tuple(pairs), row_ids))
    return groups
