"""A small Llama written as a GGUF file by the package gguf, as llama.cpp's converter does."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_ray.demo.model import train_tokenizer

TEXTS = ["what is 7 plus 5?", "twelve it is, i should think", "no idea"] * 5
N_HEADS, N_KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(name: str) -> str:
    name, _, _ = name.rpartition(".weight")
    if name in OUTER:
        return f"{OUTER[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of queries or keys in the order in which llama.cpp applies RoPE."""
    split = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path, kind: str = "F32", drop: str = "none", architecture: str = "llama"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Write the file; gives the model and tokenizer that it was made of.

    Args:
        path: of the file.
        kind: type of matrices: F32, F16 or Q8_0; vectors are in F32.
        drop: part of the names of weights that are left out.
        architecture: that the file claims to have.
    """
    tokenizer = train_tokenizer(TEXTS)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    write_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, N_HEADS if "q_proj" in name else N_KV_HEADS)
        if drop in name:
            continue
        if values.ndim == 2 and kind == "Q8_0":
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name(name), gguf.quantize(values, q8), raw_dtype=q8)
        else:
            is_half = kind == "F16" and values.ndim == 2
            writer.add_tensor(tensor_name(name), values.astype(np.float16 if is_half else "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(content["model"]["vocab"].items(), key=lambda word: word[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if word in special else 1 for word, _ in words])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template)
